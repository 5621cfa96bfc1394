"""Named presets: how pixels are resized, augmented and normalised.

A preset belongs to the backbone and to the protocol, never to the method. An image
passes through three stages:

1. The host resizes it to a square of side `Preset.stored_size(image_size)`, kept as
   uint8 (`resize`): once, for a split in memory. Rounding to whole grey levels moves a
   pixel by at most half a level from the float result of the published code.
2. Training draws a crop and a flip anew each time (`draw_windows`). They are applied to
   the stored pixels where these are: on the device for splits in memory (`augment`), on
   the host for streams (`cut_window`), with equal results.
3. The device normalises what the backbone sees (`normalise`); evaluation crops the
   centre first (`eval_preprocess`).

Letters in shapes: b batch, h and w height and width in pixels, s = `stored_size`.
"""

from collections.abc import Sequence
import dataclasses
import re

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int, Key, UInt8
import numpy as np

from insvp_jax import trees

HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# `Preset.resize` in words.
_RESIZES = {
  "tf1": "stretched bilinearly as TF1 does (no half-pixel centres, no antialias)",
  "antialias": "stretched bilinearly with antialias",
  "shorter_side": "shorter side bilinearly with antialias, aspect ratio kept",
  "bicubic": "stretched bicubically with antialias",
  "shorter_side_bicubic": "shorter side bicubically with antialias, aspect ratio kept",
}


@dataclasses.dataclass(frozen=True)
class Preset:
  """How images become inputs of the backbone.

  Attributes:
    name: the preset's key in `PRESETS`.
    mean: what is subtracted from pixels in [0, 1], per channel.
    std: what the difference is divided by, per channel.
    resize: "tf1", "antialias" and "bicubic" stretch the image to the stored square and
      ignore its aspect ratio. "shorter_side" and "shorter_side_bicubic" keep the aspect
      ratio: training crops from the whole image, evaluation sees the centre.
    margin: side of the stored square as a multiple of the model's input. Training crops
      at random from the square, evaluation at its centre.
    pad: border that training adds on each side by reflection before the random crop, as
      a share of the model's input size.
    flip: whether training mirrors an image with probability 1/2.
    crop: share of the resized image's side that is kept, its centre, in training, too.
  """

  name: str
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  resize: str
  margin: float = 1.0
  pad: float = 0.0
  flip: bool = False
  crop: float = 1.0

  @property
  def augments(self) -> bool:
    """Returns whether training sees other pixels of an image each time."""
    return self.margin > 1 or self.pad > 0 or self.flip

  @property
  def keeps_aspect(self) -> bool:
    """Returns whether the resize keeps an image's aspect ratio."""
    return self.resize.startswith("shorter_side")

  @property
  def resize_key(self) -> str:
    """Returns what tells stored squares of one size from each other."""
    return self.resize if self.crop == 1 else f"{self.resize} {self.crop:.6g}"

  @property
  def crops_whole_images(self) -> bool:
    """Returns whether training crops from whole images instead of stored squares.

    This makes a difference for elongated images only: a square image and its stored
    square are the same.
    """
    return self.augments and self.keeps_aspect

  @property
  def value_range(self) -> tuple[float, float]:
    """Returns the least and the greatest value of a normalised pixel, e.g. (-1, 1)."""
    low = min((0 - m) / s for m, s in zip(self.mean, self.std, strict=True))
    high = max((1 - m) / s for m, s in zip(self.mean, self.std, strict=True))
    return low, high

  def stored_size(self, image_size: int) -> int:
    """Returns the side in pixels of the squares that the host keeps.

    Args:
      image_size: side of the model's input in pixels.
    """
    # Rounded down, as VPT does: 224 -> 256, 384 -> 438, 448 -> 512. The small term
    # keeps a product such as 255.99999 from becoming 255.
    return int(image_size * self.margin + 1e-6)

  def resized_size(self, image_size: int) -> int:
    """Returns the side in pixels that images are resized to before `crop`."""
    return int(self.stored_size(image_size) / self.crop + 1e-6)

  def summary(self) -> str:
    """Returns one line that says all that the preset does."""
    steps = [_RESIZES[self.resize]]
    if self.margin > 1:
      steps.append(f"{self.margin:.4g} x larger, random crop / centre crop in eval")
    if self.crop < 1:
      steps.append(f"centre of {self.crop:.4g} x side")
    if self.pad:
      steps.append(f"reflected border of {self.pad:.4g} x side, random crop")
    steps.append("random flip" if self.flip else "no flip")
    low, high = self.value_range
    steps.append(f"mean {list(self.mean)}, std {list(self.std)}")
    steps.append(f"values in [{low:.4g}, {high:.4g}]")
    return f"preset {self.name}: " + "; ".join(steps)


PRESETS = {
  # google-research/task_adaptation, with the input range of its ViTs, [-1, 1].
  "vtab": Preset("vtab", HALF, HALF, "tf1"),
  # VPT on VTAB-1k: the same resize, but ImageNet's mean and standard deviation.
  "vpt": Preset("vpt", IMAGENET_MEAN, IMAGENET_STD, "tf1"),
  # Resize(256), RandomCrop(224), flip. Also for digits and signs, as published.
  "insvp_release": Preset(
    "insvp_release", IMAGENET_MEAN, IMAGENET_STD, "shorter_side", 256 / 224, flip=True
  ),
  # The usual training of small images from random initialisation: 4 pixels around 32.
  "cifar": Preset("cifar", HALF, HALF, "antialias", pad=4 / 32, flip=True),
  # For one's own work: `vtab` without the aliasing of TF1's resize.
  "modern": Preset("modern", HALF, HALF, "antialias"),
  # As timm, DINO and DINOv2 evaluate; as CLIP does; as SigLIP does.
  "imagenet": Preset(
    "imagenet", IMAGENET_MEAN, IMAGENET_STD, "shorter_side_bicubic", crop=0.875
  ),
  "clip": Preset("clip", CLIP_MEAN, CLIP_STD, "shorter_side_bicubic"),
  "siglip": Preset("siglip", HALF, HALF, "bicubic"),
}


# The protocol's own: where no weights say otherwise.
DEFAULT_PRESET = "vtab"


def get_preset(name: str) -> Preset:
  """Returns the preset of that name.

  Args:
    name: a key of `PRESETS`, or all numbers of a preset as `preset_name` writes them.

  Raises:
    ValueError: if the name is unknown; the message lists the known ones.
  """
  match = re.fullmatch(r"mean=(\S+) std=(\S+) resize=(\S+) crop=(\S+)", name)
  if not match:
    return trees.lookup(PRESETS, name, "preset")
  try:
    mean, std = (tuple(map(float, part.split(","))) for part in match.groups()[:2])
    crop, is_right = float(match[4]), len(mean) == len(std) == 3
    is_right &= min(std) > 0 and 0.1 <= crop <= 1 and match[3] in _RESIZES
  except ValueError:
    is_right = False
  if not is_right:
    raise ValueError(
      f"the preset {name!r} is not usable; expected three numbers each for mean and "
      f"std, one of {', '.join(_RESIZES)}, and a share in [0.1, 1]."
    )
  return Preset(name, mean, std, match[3], crop=crop)


def preset_name(
  mean: Sequence[float], std: Sequence[float], resize: str, crop: float
) -> str:
  """Returns the name of the preset with these numbers and without augmentation."""
  for preset in PRESETS.values():
    numbers = (*mean, *std, crop), (*preset.mean, *preset.std, preset.crop)
    if preset.resize == resize and not preset.augments and np.allclose(*numbers):
      return preset.name
  mean, std = (",".join(f"{x:.9g}" for x in numbers) for numbers in (mean, std))
  return f"mean={mean} std={std} resize={resize} crop={crop:.6g}"


# --- On the host: from decoded pixels to the stored square.

# The most pixels that a resize may make, and hold between its two directions. It takes
# an image 100 times as long as wide to come near it.
_MAX_RESIZED, _MAX_BETWEEN = 2**25, 2**26


def _check_elongated(height: int, width: int, rows: int, columns: int) -> None:
  """Checks that a resize to rows x columns takes little memory.

  Raises:
    ValueError: the image is so elongated that it does not.
  """
  if rows * columns > _MAX_RESIZED or height * columns > _MAX_BETWEEN:
    raise ValueError(
      f"an image of {width} x {height} pixels is too elongated to be resized to "
      f"{columns} x {rows}; cut it into pieces, or leave it out."
    )


class Resized(np.ndarray):
  """Squares that `resize` has made already: a `Run` takes them as they are.

  Not every preset's resize leaves its own results alone: some cut the centre out. Made
  by `array.view(Resized)`, of uint8 [..., h, w, 3] as splits hold them.
  """


def resize_tf1(
  images: UInt8[np.ndarray, "*n h w c"], height: int, width: int
) -> Float32[np.ndarray, "*n height width c"]:
  """Resizes as `tf.compat.v1.image.resize_bilinear` does, bit for bit.

  Args:
    images: pixels in [0, 255], with any leading axes.
    height: height of the output in pixels.
    width: width of the output in pixels.

  Returns:
    Pixels in [0, 255], not rounded.

  Source: TensorFlow's ResizeBilinear with align_corners=False and
    half_pixel_centers=False, which VTAB's and VPT's published code call.
  """
  top, bottom, y_weight = _taps(images.shape[-3], height)
  left, right, x_weight = _taps(images.shape[-2], width)
  # Rows that no output row looks at need not be interpolated.
  if images.shape[-3] > 4 * height:
    rows, positions = np.unique([top, bottom], return_inverse=True)
    images = np.take(images, rows, -3)
    top, bottom = positions.reshape(2, -1)
  # TF interpolates along x in both rows, then along y; the order decides the last bit.
  # Converting to float after the selection spares the pixels that a strong reduction
  # never looks at.
  columns = _lerp(
    np.take(images, left, -2).astype(np.float32),
    np.take(images, right, -2).astype(np.float32),
    x_weight[:, None],
  )
  return _lerp(
    np.take(columns, top, -3), np.take(columns, bottom, -3), y_weight[:, None, None]
  )


def _taps(size: int, out_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns for each output pixel its two input pixels and the second's weight."""
  # float32 throughout, because TensorFlow's kernel computes positions in it.
  scale = np.float32(size) / np.float32(out_size)
  position = np.arange(out_size, dtype=np.float32) * scale
  low = np.floor(position).astype(np.int64)
  return low, np.minimum(low + 1, size - 1), position - low.astype(np.float32)


def _lerp(low: np.ndarray, high: np.ndarray, weight: np.ndarray) -> np.ndarray:
  """Returns low + (high - low) * weight, in place: both arguments are overwritten."""
  high -= low
  high *= weight
  low += high
  return low


def resize_antialias(
  image: UInt8[np.ndarray, "h w 3"], height: int, width: int, bicubic: bool = False
) -> UInt8[np.ndarray, "height width 3"]:
  """Resizes as PIL (and torchvision's Resize on PIL images) does, bilinearly or not."""
  from PIL import Image

  _check_elongated(*image.shape[:2], height, width)
  kind = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
  return np.asarray(Image.fromarray(image).resize((width, height), kind))


def resize_whole(
  preset: Preset, image: UInt8[np.ndarray, "h w 3"], image_size: int
) -> UInt8[np.ndarray, "h2 w2 3"]:
  """Resizes an image without cutting the stored square out of it.

  Args:
    preset: how to resize; `preset.resized_size(image_size)` is the shorter side of the
      result.
    image: pixels in [0, 255].
    image_size: side of the model's input in pixels.

  Returns:
    Pixels in [0, 255]; of the aspect ratio of `image` where the preset keeps it.
  """
  size = preset.resized_size(image_size)
  height, width = image.shape[:2]
  if (height, width) == (size, size):
    return image
  if preset.resize == "tf1":
    return np.rint(resize_tf1(image, size, size)).astype(np.uint8)
  bicubic = preset.resize.endswith("bicubic")
  if not preset.keeps_aspect:
    return resize_antialias(image, size, size, bicubic)
  # torchvision's Resize: the longer side is truncated, not rounded.
  shorter = min(height, width)
  sides = size * height // shorter, size * width // shorter
  return resize_antialias(image, *sides, bicubic)


def central_square(
  image: UInt8[np.ndarray, "h w 3"], size: int, crop: int
) -> UInt8[np.ndarray, "size size 3"]:
  """Returns the middle of an image.

  Args:
    image: pixels in [0, 255], at least `size` on either side.
    size: side of the result in pixels.
    crop: side in pixels of the centre crop that evaluation takes of the result. The
      square is placed so that this crop is exactly where torchvision's CenterCrop finds
      it in the image.
  """
  # Two roundings, as two centre crops one in the other have: a single one would be off
  # by a pixel for some sizes.
  margin = round((size - crop) / 2)
  top, left = (round((side - crop) / 2) - margin for side in image.shape[:2])
  return image[top : top + size, left : left + size]


def resize(
  preset: Preset, image: UInt8[np.ndarray, "h w 3"], image_size: int
) -> UInt8[np.ndarray, "s s 3"]:
  """Returns the square that the host keeps, of side `preset.stored_size(image_size)`.

  Args:
    preset: how to resize.
    image: pixels in [0, 255].
    image_size: side of the model's input in pixels.
  """
  whole = resize_whole(preset, image, image_size)
  return central_square(whole, preset.stored_size(image_size), image_size)


def resize_all(
  preset: Preset, images: UInt8[np.ndarray, "n h w 3"], image_size: int
) -> UInt8[np.ndarray, "n s s 3"]:
  """Returns `resize` of each of n images of one size."""
  size = preset.stored_size(image_size)
  if images.shape[1:3] == (size, size) and preset.crop == 1:
    return images
  out = np.empty((len(images), size, size, 3), np.uint8)
  for i, image in enumerate(images):
    out[i] = resize(preset, image, image_size)
  return out


# --- Random crops and flips: drawn once, applied on the device or on the host.


def draw_windows(
  preset: Preset,
  key: Key[Array, ""],
  heights: Int[Array, "b"],
  widths: Int[Array, "b"],
  image_size: int,
) -> tuple[Int[Array, "b 2"], Bool[Array, "b"]]:
  """Draws which part of each stored image training sees; pure and jit-able.

  The arithmetic is in whole numbers only, so that the host and any device draw the
  same.

  Args:
    preset: how far to pad and whether to flip; static under jit, as is `image_size`.
    key: the key of the whole batch; each image draws its own crop and flip from it.
    heights: heights of the stored images in pixels.
    widths: their widths in pixels.
    image_size: side of the crops in pixels.

  Returns:
    (offsets, flips): top and left of each crop in pixels, negative where it begins in
    the reflected border; and whether the crop is mirrored.
  """
  pad = round(image_size * preset.pad)
  slack = jnp.stack([heights, widths], axis=-1) + (2 * pad - image_size)
  crop_key, flip_key = jax.random.split(key)
  # The upper bound of randint is exclusive, and both ends are valid offsets.
  offsets = jax.random.randint(crop_key, slack.shape, 0, slack + 1) - pad
  flips = jax.random.bernoulli(flip_key, 0.5, (len(heights), 1)) & preset.flip
  return offsets, flips[:, 0]


def augment(
  preset: Preset,
  images: UInt8[Array, "b s s 3"],
  key: Key[Array, ""],
  image_size: int,
) -> UInt8[Array, "b h w 3"]:
  """Crops and flips a batch of stored squares on the device; pure and jit-able.

  Args:
    preset: how to crop and flip; static under jit, as is `image_size`.
    images: stored pixels in [0, 255], of side `preset.stored_size(image_size)`.
    key: the key of the whole batch; each image draws its own crop and flip from it.
    image_size: side h = w of the result in pixels.
  """
  b, stored = images.shape[:2]
  _check_stored(preset, stored, image_size)
  if not preset.augments:
    return images
  sides = jnp.full((b,), stored, jnp.int32)
  offsets, flips = draw_windows(preset, key, sides, sides, image_size)
  # Crop, border and flip are one selection of rows and columns: nothing is padded, and
  # each pixel is moved once.
  i = jnp.arange(image_size)[None]
  rows = _reflect(offsets[:, :1] + i, stored)
  columns = jnp.where(flips[:, None], i[:, ::-1], i)
  columns = _reflect(offsets[:, 1:] + columns, stored)
  return jax.vmap(_take)(images, rows, columns)


def cut_window(
  image: UInt8[np.ndarray, "h w 3"],
  offset: Int[np.ndarray, "2"],
  flip: bool | np.bool_,
  image_size: int,
) -> UInt8[np.ndarray, "size size 3"]:
  """Crops and flips one image on the host, as `augment` does for the same draw.

  Args:
    image: stored pixels in [0, 255].
    offset: top and left of the crop in pixels, from `draw_windows`.
    flip: whether the crop is mirrored, from `draw_windows`.
    image_size: side of the crop in pixels.
  """
  i = np.arange(image_size)
  rows = _reflect(int(offset[0]) + i, image.shape[0])
  columns = _reflect(int(offset[1]) + (i[::-1] if flip else i), image.shape[1])
  return image[rows].take(columns, axis=1)


# --- On the device: what the backbone sees.


def eval_preprocess(
  preset: Preset, images: UInt8[Array, "b s s 3"], image_size: int
) -> Float32[Array, "b h w 3"]:
  """Crops the centre and normalises one batch on the device; pure and jit-able.

  Args:
    preset: how to normalise; static under jit, as is `image_size`.
    images: stored pixels in [0, 255], of side `preset.stored_size(image_size)`.
    image_size: side h = w of the result in pixels.

  Returns:
    Images as the backbone expects them, with values in `preset.value_range`.
  """
  stored = images.shape[1]
  _check_stored(preset, stored, image_size)
  start = round((stored - image_size) / 2)
  stop = start + image_size
  return normalise(preset, images[:, start:stop, start:stop])


def normalise(
  preset: Preset, images: UInt8[Array, "b h w 3"]
) -> Float32[Array, "b h w 3"]:
  """Maps pixels in [0, 255] to `preset.value_range`; pure and jit-able."""
  mean = jnp.array(preset.mean).reshape(1, 1, 1, 3)
  std = jnp.array(preset.std).reshape(1, 1, 1, 3)
  return (images.astype(jnp.float32) / 255 - mean) / std


def _reflect(index, size: int):
  """Maps indices in (-size, 2 size - 1) into [0, size), mirrored at the edge pixels."""
  return size - 1 - abs(size - 1 - abs(index))


def _take(image, rows, columns):
  """Returns the given rows and columns of an image [h, w, c]."""
  # All indices are in range; "clip" spares the mask that the default mode computes.
  return jnp.take(jnp.take(image, rows, 0, mode="clip"), columns, 1, mode="clip")


def _check_stored(preset: Preset, stored: int, image_size: int):
  """Checks that images are as large as the preset stores them."""
  if stored != preset.stored_size(image_size):
    raise ValueError(
      f"images of {stored} pixels came, but the preset {preset.name!r} keeps "
      f"{preset.stored_size(image_size)} pixels for image_size={image_size}. Load "
      f"the data with the same preset and image_size as the model's."
    )

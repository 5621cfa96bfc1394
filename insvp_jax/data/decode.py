"""From the bytes of an image file to RGB pixels."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import functools
import importlib.metadata
import io
import os
from pathlib import Path
import re
import sys
import threading
from typing import Any
import warnings

from jaxtyping import UInt8
import ml_collections
import numpy as np

from insvp_jax import files
from insvp_jax.data import metadata

# Decoders of PIL that are tried. A file's content decides, not its name: cameras and
# the web write wrong suffixes.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Formats whose decoder may be missing, and PIL's name of it where it is a part of PIL,
# which can be built without. A file of them is known by its first bytes
# (`optional_format`), so that a message can say what it needs.
_OPTIONAL_FORMATS = {"AVIF": "avif", "JPEG2000": "jpg_2000", "HEIF": ""}
_JPEG2000_STARTS = (b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0cjP  \r\n\x87\n")
# What files of AV1 and HEVC images say that they are, in their first box.
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys(
  (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), "HEIF"
)
# Of any codec: the brands beside these tell which.
_CONTAINER_BRANDS = {b"mif1", b"msf1"}

# PIL warns above so many pixels, which a small file decodes to in less than 1 GiB.
MAX_PIXELS = 89_478_485
MAX_FILE_MB = 512
# The greatest value of 16 bits.
_WHITE = 65535
# Larger images are converted some rows at a time.
_PIXELS_AT_ONCE = 2**24

# Files that end so, in lower case, are images, whatever is in them: one that does not
# decode is an error. The others are tried by their first bytes (`image_kinds`).
IMAGE_SUFFIXES = (
  ".jpg",
  ".jpeg",
  ".png",
  ".webp",
  ".bmp",
  ".gif",
  ".tif",
  ".tiff",
  ".ppm",
  ".pgm",
  ".avif",
  ".jp2",
  ".j2k",
  ".jpx",
  ".heic",
  ".heif",
  ".hif",
  *(".jfif", ".jpe", ".jif", ".dib", ".pbm", ".pnm", ".j2c", ".jpc", ".jpf"),
)


def decoder_versions() -> dict[str, str]:
  """Returns the versions of what decodes: others may give other pixels, or none."""
  import PIL

  versions = {"pillow": PIL.__version__}
  with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    versions["pillow_heif"] = importlib.metadata.version("pillow-heif")
  return versions


class Range16Bit:
  """What the values of a set's 16-bit images are, of those that were decoded.

  Attributes:
    count: number of images.
    highest: the highest value of them.
    bits: those that are set in any value, of which PIL gives them all.
  """

  def __init__(self):
    self.count = self.highest = self.bits = 0
    # Images are decoded by several threads.
    self._lock = threading.Lock()

  def add(self, highest: int, bits: int) -> None:
    """Takes an image into account, by its highest value and all bits that are set."""
    with self._lock:
      self.count += 1
      self.highest = max(self.highest, highest)
      self.bits |= bits


@dataclasses.dataclass(frozen=True)
class DecodeOptions:
  """How image files become pixels.

  Attributes:
    max_pixels: of an image; larger ones are refused before they are decoded.
    max_bytes: of a file; larger ones are refused before they are read.
    max_16bit: the value of 16-bit images that is white, 255; 0 for 65535.
    range_16bit: is told of each 16-bit image whose range only `max_16bit` can tell.
  """

  max_pixels: int = MAX_PIXELS
  max_bytes: int = MAX_FILE_MB * 2**20
  max_16bit: int = 0
  range_16bit: Range16Bit = dataclasses.field(default_factory=Range16Bit, compare=False)

  @classmethod
  def from_config(
    cls, data_config: ml_collections.ConfigDict | Mapping[str, Any]
  ) -> "DecodeOptions":
    """Returns the options that a section config.data, also a stored one, sets."""
    # Runs of earlier versions have no such keys.
    return cls(
      max_pixels=data_config.get("max_pixels", MAX_PIXELS),
      max_bytes=data_config.get("max_file_mb", MAX_FILE_MB) * 2**20,
      max_16bit=data_config.get("max_16bit", 0),
    )

  def unused_bits(self) -> str:
    """Returns what to say of 16-bit images that leave bits unused; "" for nothing."""
    found, white = self.range_16bit, _WHITE
    # Two bits or more: pictures of half the brightness are no rarity. Who has set the
    # range has dark pictures.
    if self.max_16bit or not found.highest or found.highest > white // 4:
      return ""
    # Dark ones of less bits, each moved up, leave the lowest bits unused instead.
    if found.highest > white // 16 and not found.bits & 3:
      return ""
    known = [2**b - 1 for b in (8, 10, 12, 14) if found.highest < 2**b <= white]
    choices = " or ".join(f"{top} ({top.bit_length()} bits)" for top in known)
    return (
      f"no value of the {found.count} 16-bit images that were read is above "
      f"{found.highest}, so that they become dark: {white} is white. If their values "
      f"have fewer bits, set config.data.max_16bit={choices}"
    )


_DEFAULTS = DecodeOptions()


def decode_image(
  data: bytes, name: str, options: DecodeOptions | None = None
) -> UInt8[np.ndarray, "h w 3"]:
  """Decodes one image as a person would see it.

  The image is turned as its orientation says, where it can be read. Grey, palette and
  CMYK become RGB; 16-bit values keep their full range (65535, or what the options say,
  becomes 255); transparent pixels are laid on white; of an animation the first frame
  is taken. Colour profiles are not applied, and no other metadata have to be sound.

  Args:
    data: the content of the image file.
    name: how errors name the file.
    options: limits, and the range of 16-bit values; None for the defaults.

  Returns:
    Pixels in [0, 255].

  Raises:
    ValueError: if the file is empty, truncated, corrupt, absurdly large, or no image,
      or what decodes it is not installed.
  """
  with decoded(data, name, options) as pixels:
    return pixels


@contextlib.contextmanager
def decoded(
  data: bytes, name: str, options: DecodeOptions | None = None
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
  """Yields what `decode_image` returns, to be made smaller inside of the with block.

  Threads that decode and resize at once wait for each other, so that their images never
  have more pixels together than the largest one may have.

  Args:
    data: as for `decode_image`.
    name: as for `decode_image`.
    options: as for `decode_image`.

  Raises:
    ValueError: as `decode_image`.
  """
  options = options or DecodeOptions()
  with contextlib.ExitStack() as room:
    try:
      pixels = _decode(data, name, options, room)
    except _DecodeError:
      # Only now, as most files are sound.
      pixels_alone = metadata.without_metadata(data)
      if pixels_alone is None:
        raise
      room.close()
      # If it fails, too, its error is about the pixels.
      pixels = _decode(pixels_alone, name, options, room)
    yield pixels


class _Room:
  """So many pixels may be worked on at a time, or one image that has more."""

  def __init__(self, num_pixels: int):
    self._num_pixels, self._taken = num_pixels, 0
    self._changed = threading.Condition()

  @contextlib.contextmanager
  def take(self, num_pixels: int) -> Iterator[None]:
    """Waits until there is room, and takes it inside of the with block."""

    def is_free() -> bool:
      return not self._taken or self._taken + num_pixels <= self._num_pixels

    with self._changed:
      self._changed.wait_for(is_free)
      self._taken += num_pixels
    try:
      yield
    finally:
      with self._changed:
        self._taken -= num_pixels
        self._changed.notify_all()


_ROOM = _Room(MAX_PIXELS)


def image_size(
  data: bytes, name: str, options: DecodeOptions | None = None
) -> tuple[int, int]:
  """Returns (width, height) of an image, of which only the header is read.

  They are those of the stored image, before it is turned.

  Args:
    data: as for `decode_image`.
    name: as for `decode_image`.
    options: as for `decode_image`.

  Raises:
    ValueError: as `decode_image`.
  """
  with open_image(data, name, options) as image:
    return image.size


class _DecodeError(ValueError):
  """A file that a decoder stumbled over, maybe over its metadata alone."""


def _decode(
  data: bytes, name: str, options: DecodeOptions, room: contextlib.ExitStack
) -> np.ndarray:
  """Returns the pixels; the room that they take is given up with `room`."""
  with open_image(data, name, options) as image:
    room.enter_context(_ROOM.take(image.width * image.height))
    return _to_rgb(image, data, options)


@contextlib.contextmanager
def open_image(
  data: bytes, name: str, options: DecodeOptions | None = None
) -> Iterator[Any]:
  """Opens an image, of which only the header is read, as a PIL image.

  Args:
    data: the content of the image file.
    name: how errors name the file.
    options: limits; None for the defaults.

  Raises:
    ValueError: as `decode_image`, also for what is raised while the image is open.
  """
  from PIL import Image, UnidentifiedImageError

  options = options or _DEFAULTS
  if not data:
    raise ValueError(f"{name} is empty (0 bytes).")
  optional = optional_format(data)
  if optional:
    _check_decoder(optional, name)
  _prepare_pillow(options.max_pixels)
  shape = ""
  try:
    formats = (optional,) if optional else _FORMATS
    with Image.open(io.BytesIO(data), formats=formats) as image:
      shape = f"{image.width} x {image.height}"
      if image.width * image.height > options.max_pixels:
        raise Image.DecompressionBombError(image.width * image.height)
      if 0 in image.size:
        raise ValueError(f"it has {shape} pixels")
      yield image
  except UnidentifiedImageError as error:
    if optional:
      raise _DecodeError(
        f"{name} does not decode: it begins as {optional}, but what follows is damaged."
      ) from error
    raise _DecodeError(
      f"{name} is not an image of a known format "
      f"({', '.join((*_FORMATS, *_OPTIONAL_FORMATS))})."
    ) from error
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    # PIL's own begins "Image size (400000000 pixels) exceeds ...".
    number = re.search("[0-9]+", str(error))
    raise _too_many_pixels(name, number[0] if number else "?", options) from error
  except MemoryError as error:
    raise ValueError(
      f"{name} does not decode: there is no memory for its {shape} pixels. Store it "
      "smaller or leave it out."
    ) from error
  except Exception as error:
    # PIL's decoders raise whatever a broken file makes them stumble over: SyntaxError,
    # struct.error, IndexError, RuntimeError and more.
    reason = str(error) or type(error).__name__
    raise _DecodeError(f"{name} does not decode: {reason}") from error


def _too_many_pixels(name: str, number: str, options: DecodeOptions) -> ValueError:
  return ValueError(
    f"{name} has suspiciously many pixels (a decompression bomb?): {number}, "
    f"config.data.max_pixels is {options.max_pixels}. Store it smaller, leave it out, "
    f"or set --config.data.max_pixels={number}."
  )


def read_image(
  path: str | Path, options: DecodeOptions | None = None
) -> UInt8[np.ndarray, "h w 3"]:
  """Reads and decodes one image file; see `decode_image`.

  Returns:
    Pixels in [0, 255].

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is no regular file, or does not decode.
  """
  path = Path(path)
  if not path.exists():
    raise FileNotFoundError(f"no image file {path}.")
  options = options or _DEFAULTS
  return decode_image(files.read_bytes(path, options.max_bytes), str(path), options)


def from_pillow(
  image: Any, name: str, options: DecodeOptions | None = None
) -> UInt8[np.ndarray, "h w 3"]:
  """Returns the pixels of an image of Pillow as `decode_image` does those of a file.

  Args:
    image: a `PIL.Image.Image` of any mode that whole numbers have.
    name: how errors name it.
    options: limits, and the range of 16-bit values; None for the defaults.

  Raises:
    ValueError: it has too many pixels, no known range, or its file is damaged.
  """
  options = options or _DEFAULTS
  width, height = image.size
  if not width * height:
    raise ValueError(f"{name} has no pixels: it is {width} x {height}.")
  if width * height > options.max_pixels:
    raise _too_many_pixels(name, f"{width * height}", options)
  if image.mode == "F":
    raise ValueError(
      f"{name} has floating-point pixels, which have no known range; give 8 or 16 bits."
    )
  try:
    # Of a file only the header may have been read.
    image.load()
    image = _turn(image)
    if image.mode.startswith("I"):
      return _grey_to_rgb(image, options.max_16bit or _WHITE)[0]
    return _by_rows(_lay_on_white if image.has_transparency_data else _plain_rgb, image)
  except (OSError, SyntaxError, ValueError) as error:
    raise ValueError(f"{name} does not decode: {error}") from error


# How many first bytes `may_be_16bit` looks at.
HEAD_BYTES = 32


def may_be_16bit(head: bytes) -> bool:
  """Returns whether an image file may have 16-bit values, by its first bytes alone."""
  if head.startswith(b"\x89PNG\r\n\x1a\n"):
    return head[24:25] == b"\x10"
  return head.startswith((b"II", b"MM", b"P5", b"P6", *_JPEG2000_STARTS))


def is_16bit(data: bytes, name: str, options: DecodeOptions | None = None) -> bool:
  """Returns whether an image has 16-bit values of which it does not tell the range.

  Args:
    data: as for `decode_image`, of which only the header is read.
    name: as for `decode_image`.
    options: as for `decode_image`.

  Raises:
    ValueError: as `decode_image`.
  """
  options = options or _DEFAULTS
  with open_image(data, name, options) as image:
    return not _white(image, data, options)[1]


@functools.cache
def _set_up_pillow() -> None:
  """Keeps PIL's warnings off the terminal: what they are about is ignored or an error.

  Not by `warnings.catch_warnings`, which threads undo for each other.
  """
  from PIL import Image

  warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
  warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
  if "PILLOW_BLOCK_SIZE" not in os.environ:
    # Above 32 MiB glibc gives memory back as soon as it is free. Of smaller blocks each
    # thread would keep those of its largest image.
    Image.core.set_block_size(2**26)


def _prepare_pillow(max_pixels: int) -> None:
  """Lets PIL open images of so many pixels: its own limit is one for the process."""
  from PIL import Image

  _set_up_pillow()
  limit = Image.MAX_IMAGE_PIXELS
  if limit is not None and limit < max_pixels:
    Image.MAX_IMAGE_PIXELS = max_pixels


def optional_format(data: bytes) -> str:
  """Returns which of `_OPTIONAL_FORMATS` a file is, by its first bytes; "" for none."""
  if data.startswith(_JPEG2000_STARTS):
    return "JPEG2000"
  if data[4:8] != b"ftyp":
    return ""
  # The box: its size, "ftyp", the major brand, a version, the other brands. The first
  # brand of a codec decides.
  box = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
  brands = [box[i : i + 4] for i in range(0, len(box), 4)]
  codecs = [_BRANDS[brand] for brand in brands if brand in _BRANDS]
  # pillow-heif says what else such a container holds.
  return codecs[0] if codecs else "HEIF" if _CONTAINER_BRANDS & {*brands} else ""


def _check_decoder(file_format: str, name: str) -> None:
  """Checks that the decoder of one of `_OPTIONAL_FORMATS` is here; readies it.

  Raises:
    ValueError: if it is not; the message says what to install.
  """
  import PIL
  from PIL import features

  feature = _OPTIONAL_FORMATS[file_format]
  if feature:
    if not features.check(feature):
      raise ValueError(
        f"{name} is an image in the format {file_format}, but the installed Pillow "
        f"{PIL.__version__} was built without it: pip install --force-reinstall pillow"
      )
    return
  try:
    import pillow_heif
  except ImportError as error:
    raise ValueError(
      f"{name} is a HEIC image, which needs pillow-heif: pip install 'insvp_jax[heif]'"
    ) from error
  # Costs nothing where it is registered already.
  pillow_heif.register_heif_opener()


# --- From an open PIL image to pixels.


def _to_rgb(image: Any, data: bytes, options: DecodeOptions) -> np.ndarray:
  """Returns the pixels uint8 [h, w, 3] of an open PIL image.

  Args:
    image: of which only the header was read.
    data: the content of its file.
    options: the range of 16-bit values.
  """
  if image.mode == "F":
    raise ValueError("floating-point pixels have no known range; store 8 or 16 bits.")
  tile, (white, told) = image.tile, _white(image, data, options)
  image.load()
  # Modes I and I;16 are 16-bit grey, which PIL's own conversion would clip at 255.
  if image.mode.startswith("I"):
    pixels, highest, bits = _grey_to_rgb(_turn(image), white)
    if not told:
      options.range_16bit.add(highest, bits)
    return pixels
  if not told and image.mode in ("RGB", "RGBA"):
    # Alpha comes last.
    level = max(high for _, high in image.getextrema()[:3])
    # PIL gives the high bytes, of PPM rounded levels: the greatest and least that fit.
    highest = 257 * level - 128 if image.format == "PPM" else 256 * level + 255
    # All low bits, as far as is known.
    options.range_16bit.add(highest if level else 0, 255)
    if white != _WHITE:
      low = _low_bytes(image.format, data, tile)
      return _deep_to_rgb(_turn(image), low and _turn(low), white)
  image = _turn(image)
  # The pixels below full transparency are arbitrary, often black: lay white beneath.
  return _by_rows(_lay_on_white if image.has_transparency_data else _plain_rgb, image)


def _turn(image: Any) -> Any:
  """Returns a loaded image as its orientation says that it is seen."""
  from PIL import ExifTags, Image

  # The decoders of AVIF and HEIF leave no orientation that they have applied.
  turned = None
  with contextlib.suppress(Exception):  # PIL reads all of a block, sound or not
    turned = image.getexif().get(ExifTags.Base.Orientation)
  if turned is None and isinstance(exif := image.info.get("exif"), bytes):
    turned = metadata.orientation(exif)
  methods = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
  }
  # Not ImageOps.exif_transpose, which writes EXIF anew, and fails where it cannot.
  if isinstance(turned, int) and turned in methods:
    return image.transpose(methods[turned])
  return image


def _by_rows(function: Callable[..., np.ndarray], *images: Any) -> np.ndarray:
  """Returns what a function makes of images of one size, uint8 [h, w, 3].

  Of large images it is given some rows at a time, which takes less memory.
  """
  width, height = images[0].size
  rows = max(1, _PIXELS_AT_ONCE // width)
  if rows >= height:
    return function(*images)
  pixels = np.empty((height, width, 3), np.uint8)
  for top in range(0, height, rows):
    bottom = min(top + rows, height)
    parts = [image.crop((0, top, width, bottom)) for image in images]
    pixels[top:bottom] = function(*parts)
  return pixels


def _plain_rgb(image: Any) -> np.ndarray:
  return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _lay_on_white(image: Any) -> np.ndarray:
  from PIL import Image

  image = image.convert("RGBA")
  white = Image.new("RGBA", image.size, "white")
  return _plain_rgb(Image.alpha_composite(white, image))


# --- 16-bit values.


def _white(image: Any, data: bytes, options: DecodeOptions) -> tuple[int, bool]:
  """Returns the value that is white, and whether the header tells it.

  Where it does not, values have 16 bits, which may hold anything.

  Args:
    image: of which only the header was read.
    data: the content of its file.
    options: tell what is white where the header does not.
  """
  args = image.tile[0][3] if image.tile else ()
  rawmode, *more = (args,) if isinstance(args, str) else args or ("",)
  grey, told = image.mode.startswith("I"), True
  if image.format in ("PNG", "TIFF"):
    if rawmode == "I;12":
      return 2**12 - 1, True
    told = not grey and ";16" not in str(rawmode)
  elif image.format == "PPM":
    # PIL scales other ranges to 16 bits.
    told = rawmode != "I;16B" and more[:1] != [_WHITE]
  elif image.format == "JPEG2000":
    # Likewise.
    told = not grey or _jpeg2000_bits(data) != 16
  return _WHITE if told else options.max_16bit or _WHITE, told


def _jpeg2000_bits(data: bytes) -> int:
  """Returns the bits of a value in a stream of JPEG 2000; 0 where it is none."""
  # The marker of its sizes, and how far behind it the bits of the first channel stand.
  start = data.find(b"\xff\x4f\xff\x51")
  bits = data[start + 42 : start + 43] if start >= 0 else b""
  return (bits[0] & 0x7F) + 1 if bits else 0


def _scale(values: np.ndarray, white: int) -> np.ndarray:
  """Maps whole numbers in [0, white] to the nearest level in [0, 255]."""
  return ((values * 510 + white) // (2 * white)).astype(np.uint8)


def _check_range(lowest: int, highest: int, white: int) -> None:
  if lowest < 0 or highest > _WHITE:
    raise ValueError(f"grey values outside 0..{_WHITE}: {lowest}..{highest}.")
  if highest > white:
    raise ValueError(
      f"it has the value {highest}, but config.data.max_16bit says that none is above "
      f"{white}."
    )


def _grey_to_rgb(image: Any, white: int) -> tuple[np.ndarray, int, int]:
  """Returns the pixels of a loaded grey image, its highest value and all bits set."""
  highest = bits = 0

  def to_rgb(part: Any) -> np.ndarray:
    nonlocal highest, bits
    values = np.asarray(part).astype(np.int64)
    _check_range(int(values.min()), int(values.max()), white)
    highest = max(highest, int(values.max()))
    bits |= int(np.bitwise_or.reduce(values, axis=None))
    return np.repeat(_scale(values, white)[..., None], 3, axis=-1)

  return _by_rows(to_rgb, image), highest, bits


def _low_bytes(file_format: str, data: bytes, tile: Any) -> Any:
  """Returns an image of the low bytes of 16-bit colours; None where PIL cannot.

  PIL keeps the high bytes of such colours. In the other order of bytes these are the
  low ones.
  """
  from PIL import Image

  native_is_little = sys.byteorder == "little"
  swapped = {"L": "B", "B": "L", "N": "B" if native_is_little else "L"}
  tiles = []
  for part in tile:
    rawmode, *more = (part[3],) if isinstance(part[3], str) else part[3]
    if not re.fullmatch("(RGB|RGBA|RGBX);16[LBN]", str(rawmode)):
      return None
    rawmode = rawmode[:-1] + swapped[rawmode[-1]]
    args = (rawmode, *more) if more else rawmode
    tiles.append(part._replace(args=args))
  with Image.open(io.BytesIO(data), formats=(file_format,)) as image:
    image.tile = tiles
    image.load()
    return image


def _deep_to_rgb(image: Any, low: Any, white: int) -> UInt8[np.ndarray, "h w 3"]:
  """Returns the pixels of 16-bit colours.

  Args:
    image: the high bytes, RGB or RGBA.
    low: the low bytes; None where they are not known.
    white: the value that is white.
  """
  from PIL import Image

  def to_rgb(high: Any, low: Any = None) -> np.ndarray:
    values = np.asarray(high)[..., :3].astype(np.int64)
    if low is None:
      # The high bytes, or 65535 levels rounded to 255.
      _check_range(0, max(0, 256 * int(values.max()) - 128), white)
      values = np.minimum(257 * values, white)
    else:
      values = 256 * values + np.asarray(low)[..., :3]
      _check_range(0, int(values.max()), white)
    rgb = _scale(values, white)
    if not high.has_transparency_data:
      return rgb
    coloured = Image.fromarray(rgb)
    coloured.putalpha(high.convert("RGBA").getchannel("A"))
    return _lay_on_white(coloured)

  return _by_rows(to_rgb, *(image, low) if low else (image,))

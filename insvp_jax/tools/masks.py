"""What segmenters find: masks as PNG files, pictures over images, what it is worth."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import io
from pathlib import Path, PurePath
import sys
from typing import Any

from jaxtyping import Int, UInt8
import numpy as np

from insvp_jax.data.label_maps import MaskStyle
from insvp_jax.errors import one_line, printable
from insvp_jax.logs import writers

# Share of the class's colour in an overlay.
_OPACITY = 0.55
# A palette has so many colours; masks of greater values have 16 bits and none.
_MOST_COLORS = 256


def palette(num_classes: int) -> UInt8[np.ndarray, "k 3"]:
  """Returns a colour for each class, the same for every run.

  Source: PASCAL VOC's development kit: bit i of a class's number, in turn for red,
  green and blue, becomes bit 7 - i // 3 of the colour. The first class is black.
  """
  classes, colors = np.arange(num_classes), np.zeros((num_classes, 3), np.int64)
  for bit in range(8):
    for channel in range(3):
      colors[:, channel] |= ((classes >> (3 * bit + channel)) & 1) << (7 - bit)
  return colors.astype(np.uint8)


def colors_of(style: MaskStyle) -> UInt8[np.ndarray, "k 3"]:
  """Returns the colour of each class: of the masks, or of the palette at its value."""
  if style.colors:
    channels = np.array(style.colors)[:, None] >> np.array([16, 8, 0])
    return (channels & 255).astype(np.uint8)
  return palette(max(style.values) + 1)[list(style.values)]


def png(labels: Int[np.ndarray, "h w"], style: MaskStyle) -> bytes:
  """Returns a mask as a PNG file of one channel, with the values of the classes.

  It has a palette, so that it opens in the colours that the run's own masks have, or 16
  bits and none where values do not fit into 8.

  Args:
    labels: the class of each pixel.
    style: what classes are in files.
  """
  from PIL import Image

  values = np.array(style.values)[labels]
  if max(style.values) >= _MOST_COLORS:
    image = Image.fromarray(values.astype(np.uint16))
  else:
    image = Image.fromarray(values.astype(np.uint8))
    colors = palette(_MOST_COLORS)
    colors[list(style.values)] = colors_of(style)
    # The values become indices of it.
    image.putpalette(colors.ravel().tolist())
  return as_png(image)


def overlay(
  image: UInt8[np.ndarray, "h w 3"],
  labels: Int[np.ndarray, "h w"],
  style: MaskStyle,
) -> UInt8[np.ndarray, "h w 3"]:
  """Returns an image under the colours of its classes; that of others stays.

  Args:
    image: of any size.
    labels: the class of each pixel; `IGNORED` for none.
    style: has the colours.
  """
  mixed = (1 - _OPACITY) * image + _OPACITY * colors_of(style)[labels]
  is_real = (labels >= 0)[..., None]
  return np.where(is_real, mixed.round(), image).astype(np.uint8)


def as_png(image: Any) -> bytes:
  """Returns a picture of Pillow's as a PNG file."""
  file = io.BytesIO()
  image.save(file, "PNG", optimize=False)
  return file.getvalue()


def write(
  run: Any,
  images: Sequence[Any],
  folder: str | Path,
  errors: Any,
  *,
  overlays: bool = False,
  changes: Mapping[str, Any] | None = None,
) -> Iterator[tuple[str, Path]]:
  """Writes the mask of each image that decodes.

  Args:
    run: a segmenter, from `load_run`.
    images: from `tools.find_images`.
    folder: gets <name>.png and, with overlays, <name>_overlay.png.
    errors: `add` gets an error for each of the others, which is also printed if there
      are several images.
    overlays: whether pictures are written, too.
    changes: of the run's evaluation; see `Run.segment`.

  Yields:
    (the image, the file of its mask).

  Raises:
    OSError: the disk is full or read-only.
  """
  from PIL import Image

  from insvp_jax.data import prefetch

  def read(image: Any) -> Any:
    try:
      return image.read_pixels(run.decode_options)
    except ValueError as error:
      return error

  taken: set[str] = set()
  Path(folder).mkdir(parents=True, exist_ok=True)
  # Few at a time: these are whole pictures.
  with contextlib.closing(prefetch.ordered_map(read, images, ahead=4)) as decoded:
    for image, pixels in zip(images, decoded, strict=True):
      if isinstance(pixels, ValueError):
        errors.add(pixels)
        if len(images) > 1:
          print(f"insvp_jax: {one_line(pixels)}", file=sys.stderr, flush=True)
        continue
      labels = run.segment(pixels, **(changes or {}))[0]
      path = Path(folder) / f"{_free_name(image.name, taken)}.png"
      writers.write_bytes(path, png(labels, run.mask_style))
      if overlays:
        picture = as_png(Image.fromarray(overlay(pixels, labels, run.mask_style)))
        writers.write_bytes(path.with_name(f"{path.stem}_overlay.png"), picture)
      yield str(image), path


def _free_name(name: str, taken: set[str]) -> str:
  """Returns an image's name without folders and ending, numbered where it is taken."""
  stem = printable(PurePath(name).stem)
  free, number = stem, 2
  # Some file systems do not tell cases apart.
  while free.lower() in taken:
    free, number = f"{stem}_{number}", number + 1
  taken.add(free.lower())
  return free


def score(
  run: Any,
  split: Any,
  columns: Int[np.ndarray, "k"],
  changes: Mapping[str, Any] | None = None,
  on_image: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
  """Returns what a segmenter is worth on a split, as JSON holds it.

  Args:
    run: from `load_run`.
    split: images with masks.
    columns: for each class of the masks that of the run.
    changes: of the run's evaluation; see `Run.segment`.
    on_image: called after each image.

  Returns:
    In [0, 1] "miou", "pixel_accuracy" and "mean_accuracy"; "num_examples" and
    "num_pixels"; in "classes" of each its name, "iou" (None for one that is nowhere),
    "recall" (None without pixels) and "num_pixels"; "confusion" counts pixels of true
    classes by predicted ones.
  """
  from insvp_jax.data.label_maps import IGNORED
  from insvp_jax.train.objectives import segmentation

  num_classes = len(run.class_names)
  confusion = np.zeros((num_classes, num_classes), np.int64)
  with contextlib.closing(split.pairs(range(len(split)))) as pairs:
    for image, labels in pairs:
      labels = np.where(labels == IGNORED, IGNORED, columns[labels])
      found = run.segment(image, **(changes or {}))[0]
      confusion += segmentation.confusion_of(labels, found, num_classes)
      on_image()
  found, pixels = segmentation.metrics(confusion), confusion.sum(axis=1)
  iou = found["class_iou"]
  return {
    **{name: found[name] for name in ("miou", "pixel_accuracy", "mean_accuracy")},
    "num_examples": len(split),
    "num_pixels": int(pixels.sum()),
    "classes": [
      {
        "name": name,
        "iou": None if np.isnan(iou[i]) else float(iou[i]),
        "recall": float(confusion[i, i] / pixels[i]) if pixels[i] else None,
        "num_pixels": int(pixels[i]),
      }
      for i, name in enumerate(run.class_names)
    ],
    "confusion": confusion.tolist(),
  }


def format_score(scored: Mapping[str, Any], name: str) -> str:
  """Returns a line about a split."""
  return (
    f"{name}: mIoU {100 * scored['miou']:.2f}%, pixel accuracy "
    f"{100 * scored['pixel_accuracy']:.2f}%, mean accuracy "
    f"{100 * scored['mean_accuracy']:.2f}%, {scored['num_examples']} images, "
    f"{scored['num_pixels']:,} pixels"
  )


def format_classes(scored: Mapping[str, Any]) -> str:
  """Returns a table with a line for each class that any pixel has or is said to."""
  rows = [row for row in scored["classes"] if row["iou"] is not None]
  width = max(5, *(len(printable(row["name"])) for row in rows))
  lines = [f"{'class':{width}}      IoU   recall        pixels"]
  for row in rows:
    recall = "-" if row["recall"] is None else f"{100 * row['recall']:.2f}%"
    lines.append(
      f"{printable(row['name']):{width}}  {100 * row['iou']:6.2f}%  {recall:>7}  "
      f"{row['num_pixels']:12,}"
    )
  return "\n".join(lines)

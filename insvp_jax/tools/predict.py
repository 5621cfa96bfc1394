"""Prints a run's predictions for images.

insvp predict --run=runs/folder/insvp/seed0 photo.jpg more_photos/ photos.zip
insvp predict --run=runs/folder/insvp/seed0 --top=1 --format=csv --output=of.csv photos/
insvp predict --run=runs --best "photos/**/*.jpg"
insvp predict --run=runs/segment --output=masks --overlays photos/

Of segmentation --output is a folder: it gets a PNG mask of each image, whose values are
the classes' as in the run's own masks, and with --overlays pictures of both.

Images that do not decode are named on stderr, and the others are predicted. The status
is then 2 at the end; with --skip_corrupt it is 0.

Without the command `insvp` it is python -m insvp_jax.tools.predict.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import csv
import dataclasses
import io
import json
import sys
from typing import Any

from insvp_jax import tools
from insvp_jax.errors import one_line
from insvp_jax.tools import runs

BATCH_SIZE = 32  # images decoded at a time
_LARGEST_BATCH = 2**12
# An image's path, and its most probable classes with their probabilities.
Row = tuple[str, Sequence[tuple[str, float]]]


def top_classes(
  run: Any, images: Sequence[Any], top: int = 5
) -> Iterator[list[tuple[str, float]]]:
  """Yields for each image its most probable classes, the most probable one first.

  Args:
    run: from `load_run`.
    images: paths or uint8 arrays.
    top: how many classes.

  Yields:
    Pairs of class name and probability in [0, 1].
  """
  for start in range(0, len(images), BATCH_SIZE):
    for probabilities in run.predict(images[start : start + BATCH_SIZE]):
      # Stable, so that ties go to the first class.
      labels = (-probabilities).argsort(kind="stable")[:top]
      yield [(run.class_names[i], float(probabilities[i])) for i in labels]


@dataclasses.dataclass
class _Errors:
  """The images that do not decode: how many, and why the first one does not."""

  count: int = 0
  first: Exception | None = None

  def add(self, error: Exception) -> None:
    """Counts an error; only the first one, which keeps its file's content, stays."""
    self.count += 1
    self.first = self.first or error


def _batches(
  run: Any, images: Sequence[tools.ImageFile], errors: _Errors, size: int
) -> Iterator[list[tuple[tools.ImageFile, Any]]]:
  """Yields batches of images with their resized pixels, those that decode.

  Args:
    run: from `load_run`.
    images: the files, decoded some way ahead.
    errors: gets an error for each of the others, which is also printed if there are
      several images.
    size: images of a batch.
  """
  from insvp_jax.data import prefetch, preprocess

  def read(image: tools.ImageFile) -> Any:
    try:
      # Resized at once, so that no more than a few large images are in memory.
      with image.decoded(run.decode_options) as pixels:
        square = preprocess.resize(run.preset, pixels, run.model.input_size)
      return square.view(preprocess.Resized)
    except (ValueError, OSError) as error:
      return error

  batch = []
  squares = prefetch.ordered_map(read, images, ahead=size)
  with contextlib.closing(squares):
    for image, square in zip(images, squares, strict=True):
      if isinstance(square, Exception):
        errors.add(square)
        if len(images) > 1:
          print(f"insvp_jax: {one_line(square)}", file=sys.stderr, flush=True)
        continue
      batch.append((image, square))
      if len(batch) == size:
        yield batch
        batch = []
  if batch:
    yield batch


def format_classes(path: Any, classes: Sequence[tuple[str, float]]) -> str:
  """Returns the path, and on lines of their own the classes."""
  lines = [f"  {100 * probability:5.1f}%  {name}" for name, probability in classes]
  return "\n".join([str(path), *lines])


def _as_table(rows: Iterable[Row]) -> Iterator[str]:
  for path, classes in rows:
    yield f"{format_classes(path, classes)}\n"


def _as_csv(rows: Iterable[Row]) -> Iterator[str]:
  """Yields lines of RFC 4180, a class in each."""

  def line(*cells: Any) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()

  yield line("image", "rank", "class", "probability")
  for path, classes in rows:
    for rank, (name, probability) in enumerate(classes, 1):
      yield line(path, rank, name, f"{probability:.6g}")


def _as_json(rows: Iterable[Row]) -> Iterator[str]:
  """Yields a list with an object for each image, one on a line."""
  before = "[\n"
  for path, classes in rows:
    found = [{"class": n, "probability": float(f"{p:.6g}")} for n, p in classes]
    yield before + json.dumps({"image": path, "classes": found}, ensure_ascii=False)
    before = ",\n"
  yield "\n]\n" if before == ",\n" else "[]\n"


# How predictions are written, by name: rows -> pieces of text.
FORMATS: dict[str, Callable[[Iterable[Row]], Iterator[str]]] = {
  "table": _as_table,
  "csv": _as_csv,
  "json": _as_json,
}


def _print_classes(
  run: Any,
  images: Sequence[tools.ImageFile],
  args: argparse.Namespace,
  errors: _Errors,
) -> None:
  """Prints or writes the classes of images.

  Args:
    run: a classifier.
    images: the files.
    args: of the tool.
    errors: gets an error for each image that does not decode.
  """
  from rich.console import Console
  from rich.progress import MofNCompleteColumn, Progress

  from insvp_jax.logs import writers

  def rows(bar: Any) -> Iterator[Row]:
    task = bar.add_task("images", total=len(images))
    for read in _batches(run, images, errors, args.batch):
      squares = [square for _, square in read]
      predictions = top_classes(run, squares, args.top)
      for (image, _), classes in zip(read, predictions, strict=True):
        yield str(image), classes
      bar.advance(task, len(read))

  # Beside what is printed it would be in the way.
  is_printed = not args.output and sys.stdout.isatty()
  hidden = is_printed or not sys.stderr.isatty()
  columns = (*Progress.get_default_columns(), MofNCompleteColumn())
  with Progress(*columns, console=Console(stderr=True), disable=hidden) as bar:
    pieces = FORMATS[args.format](rows(bar))
    if args.output:
      writers.write_text(args.output, pieces)
    for piece in pieces:
      print(piece, end="", flush=True)


def _write_masks(
  run: Any,
  images: Sequence[tools.ImageFile],
  args: argparse.Namespace,
  changes: Mapping[str, Any],
  errors: _Errors,
) -> None:
  """Writes the masks of images, and prints their files.

  Args:
    run: a segmenter.
    images: the files.
    args: of the tool.
    changes: of the run's evaluation.
    errors: gets an error for each image that does not decode.
  """
  from insvp_jax.tools import masks

  if not args.output:
    raise ValueError("this run segments: name the folder of the masks by --output.")
  found = masks.write(
    run, images, args.output, errors, overlays=args.overlays, changes=changes
  )
  for path, mask in found:
    print(f"{path}: {mask}", flush=True)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
  """Runs the tool; returns its exit status: 0, or 2 after bad input.

  Args:
    argv: the arguments; None for those of the process.
    prog: the command that was typed; see `tools.argument_parser`.
  """
  parser = tools.argument_parser(__doc__, "predict", prog)
  runs.add_arguments(parser)
  parser.add_argument("--top", type=int, default=5, help="how many classes to print")
  parser.add_argument(
    "--skip_corrupt", action="store_true", help="images that do not decode are no error"
  )
  parser.add_argument(
    "--format", choices=tuple(FORMATS), default="table", help="table is the default"
  )
  parser.add_argument(
    "--output",
    help="file to write to, complete or not at all; else it is printed. Of "
    "segmentation the folder of the masks",
  )
  parser.add_argument(
    "--batch", type=int, default=BATCH_SIZE, help=f"images decoded ahead, {BATCH_SIZE}"
  )
  tools.add_segment_arguments(parser)
  parser.add_argument(
    "--overlays", action="store_true", help="segmentation: write pictures, too"
  )
  parser.add_argument(
    "images",
    nargs="+",
    help="image files, folders or .zip archives of them, or patterns in quotes",
  )
  args = parser.parse_args(argv)

  def work() -> None:
    if args.top < 1:
      raise ValueError(f"--top is {args.top}, expected at least 1.")
    if not 1 <= args.batch <= _LARGEST_BATCH:
      raise ValueError(
        f"--batch is {args.batch}, expected a number from 1 to {_LARGEST_BATCH}."
      )
    images = tools.find_images(args.images)
    # Imported late, so that a wrong flag costs no start-up time.

    run = runs.load(args)
    errors = _Errors()

    changes = tools.segment_changes(args, run)
    if run.segments:
      _write_masks(run, images, args, changes, errors)
    else:
      if args.overlays:
        raise ValueError("--overlays is of segmentation; leave it out.")
      _print_classes(run, images, args, errors)
    if unused := run.decode_options.unused_bits():
      print(f"insvp_jax: {unused} in training", file=sys.stderr)
    if errors.first and len(images) == 1:
      raise errors.first
    if errors.first:
      count = f"{errors.count} of {len(images)} images"
      if not args.skip_corrupt:
        raise ValueError(
          f"{count} have no prediction, since they do not decode: mend or remove them, "
          f"or pass --skip_corrupt."
        )
      print(f"insvp_jax: {count} were skipped as corrupt", file=sys.stderr)

  return tools.run_tool(work)


if __name__ == "__main__":
  sys.exit(main())

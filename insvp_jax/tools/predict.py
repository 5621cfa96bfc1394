"""Prints a run's predictions for images.

insvp predict --run=runs/folder/insvp/seed0 photo.jpg more_photos/

Without the command `insvp` it is python -m insvp_jax.tools.predict.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
import sys
from typing import Any

from insvp_jax import tools

BATCH_SIZE = 32  # images decoded at a time


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


def format_classes(path: Path, classes: Sequence[tuple[str, float]]) -> str:
  """Returns the path, and on lines of their own the classes."""
  lines = [f"  {100 * probability:5.1f}%  {name}" for name, probability in classes]
  return "\n".join([str(path), *lines])


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
  """Runs the tool; returns its exit status: 0, or 2 after bad input.

  Args:
    argv: the arguments; None for those of the process.
    prog: the command that was typed; see `tools.argument_parser`.
  """
  parser = tools.argument_parser(__doc__, "predict", prog)
  parser.add_argument("--run", required=True, help=tools.RUN_HELP)
  parser.add_argument("--backbone", help="the backbone's file, if it has moved")
  parser.add_argument("--top", type=int, default=5, help="how many classes to print")
  parser.add_argument("images", nargs="+", help="image files, or folders of them")
  args = parser.parse_args(argv)

  def work() -> None:
    if args.top < 1:
      raise ValueError(f"--top is {args.top}, expected at least 1.")
    paths = tools.find_images(args.images)
    # Imported late, so that a wrong flag costs no start-up time.
    from insvp_jax.run import load_run

    run = load_run(args.run, backbone=args.backbone)
    predictions = top_classes(run, paths, args.top)
    for path, classes in zip(paths, predictions, strict=True):
      print(format_classes(path, classes), flush=True)

  return tools.run_tool(work)


if __name__ == "__main__":
  sys.exit(main())

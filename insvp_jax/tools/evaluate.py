"""Prints a run's accuracy and loss on the splits of its task.

insvp evaluate --run=runs/folder/insvp/seed0 --splits train_val test
insvp evaluate --run=runs/folder/insvp/seed0 --by_class --confusion=confusion.png
insvp evaluate --run=runs/folder/insvp/seed0 --format=json > scores.json
insvp evaluate --run=runs/segment --by_class --scales 0.5 1 1.5 --flips

Of segmentation it prints the mIoU; scales and flips are those of the run, unless given.

Its batches are not the trainer's, which the last bits depend on: with
`backbone.dtype=bfloat16` single images may be classified otherwise than in result.json.

Without the command `insvp` it is python -m insvp_jax.tools.evaluate.
Not to select by: a result on the test split that selected something is no test result.
"""

from collections.abc import Sequence
import functools
import json
from pathlib import Path
import sys
from typing import Any

import numpy as np

from insvp_jax import tools
from insvp_jax.data import tasks
from insvp_jax.tools import masks, run_data, runs, scores, visualize
from insvp_jax.tools.run_data import RunData

CHUNK_SIZE = 256  # images in memory at a time


def predict_split(run: Any, data: RunData, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns (labels int [n], probabilities float32 [n, k]) of a split.

  Args:
    run: from `load_run`.
    data: images at the stored size of the run's preset; read chunk by chunk.
    name: of the split.
  """
  split = data.data.splits[name]
  indices = np.arange(len(split))
  chunks = [indices[i : i + CHUNK_SIZE] for i in range(0, len(split), CHUNK_SIZE)]
  from insvp_jax.data.preprocess import Resized

  probabilities = [run.predict(images.view(Resized)) for images in split.read(chunks)]
  return data.labels(name), np.concatenate(probabilities)


def _text(run: Any, scored: dict[str, Any], name: str) -> str:
  """Returns two lines about a split."""
  from insvp_jax.train import evaluate, report

  columns = {
    "class_accuracy": "recall",
    "class_f1": "f1",
    "class_count": "num_examples",
  }
  evaluated = {
    # None is NaN.
    key: np.array([row[column] for row in scored["classes"]], float)
    for key, column in columns.items()
  }
  # Runs of before do not know how many there were to train on.
  train_count = run.meta.get("train_count")
  by_class = evaluate.balanced(evaluated, run.class_names, train_count)
  accuracy = f"{100 * scored['accuracy']:.2f}%{report.by_class_text(by_class)}"
  return (
    f"{name}: accuracy {accuracy}, loss {scored['loss']:.3f} nats, "
    f"{scored['num_examples']} images\n  {scores.format_scores(scored)}"
  )


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
  """Runs the tool; returns its exit status: 0, or 2 after bad input.

  Args:
    argv: the arguments; None for those of the process.
    prog: the command that was typed; see `tools.argument_parser`.
  """
  parser = tools.argument_parser(__doc__, "evaluate", prog)
  runs.add_arguments(parser)
  parser.add_argument("--splits", nargs="+", help="train, val, test (the default), ...")
  parser.add_argument(
    "--root", default="", help="another folder or .zip of images of the run's classes"
  )
  parser.add_argument(
    "--by_class", action="store_true", help="a table with a line for each class"
  )
  parser.add_argument(
    "--confusion", help="file of the confusion matrix: .csv, .png, .pdf or .svg"
  )
  parser.add_argument(
    "--ordered",
    action="store_true",
    help="the classes are grades, in this order: print the quadratic kappa, too",
  )
  tools.add_segment_arguments(parser)
  parser.add_argument(
    "--format", choices=("text", "json"), default="text", help="text is the default"
  )
  args = parser.parse_args(argv)

  def work() -> None:
    if args.confusion and Path(args.confusion).suffix.lower() != ".csv":
      visualize.check_format(Path(args.confusion))
      visualize.check_matplotlib()
    run = runs.load(args)
    changes = tools.segment_changes(args, run)
    if run.segments and args.ordered:
      raise ValueError("--ordered is of classes of images; leave it out.")
    data = run_data.read(run, args.root)
    splits = data.data.splits
    # A folder of classes alone is all there is to score.
    default = "test" if "test" in splits or not args.root else "train"
    if run.segments and "test" not in splits and "val" in splits:
      default = "val"
    names = args.splits or [default]
    for name in names:
      if name not in splits:
        raise ValueError(
          f"--splits has {name!r}, but the task {data.data.name!r} has only "
          f"{', '.join(splits)}."
        )
    if args.confusion and len(names) > 1:
      raise ValueError(
        f"--confusion is of one split, but --splits has {len(names)}; name one."
      )
    stored = run.meta.get("config") or {}
    ordered = args.ordered or tasks.are_ordered(
      run.meta.get("task") or "", stored.get("data") or {}
    )
    found = {}
    for name in names:
      if run.segments:
        split = data.data.splits[name]
        found[name] = masks.score(run, split, data.columns, changes)
      else:
        labels, probabilities = predict_split(run, data, name)
        found[name] = scores.score(
          labels, probabilities, run.class_names, ordered=ordered
        )
      if args.format == "text":
        whole = args.root and not args.splits and name == "train"
        title, scored = "all" if whole else name, found[name]
        text = masks.format_score if run.segments else functools.partial(_text, run)
        print(text(scored, title), flush=True)
        if args.by_class:
          table = masks if run.segments else scores
          print(table.format_classes(scored), flush=True)
      if args.confusion:
        scores.write_confusion(found[name], args.confusion)
    if args.format == "json":
      print(json.dumps({"task": data.data.name, "splits": found}, indent=1))

  return tools.run_tool(work)


if __name__ == "__main__":
  sys.exit(main())

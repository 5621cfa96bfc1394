"""Prints a run's accuracy and loss on the splits of its task.

insvp evaluate --run=runs/folder/insvp/seed0 --splits train_val test

Its batches are not the trainer's, which the last bits depend on: with
`backbone.dtype=bfloat16` single images may be classified otherwise than in result.json.

Without the command `insvp` it is python -m insvp_jax.tools.evaluate.
Not to select by: a result on the test split that selected something is no test result.
"""

from collections.abc import Sequence
import sys
from typing import Any

import numpy as np

from insvp_jax import tools
from insvp_jax.tools import run_data
from insvp_jax.tools.run_data import RunData

CHUNK_SIZE = 256  # images in memory at a time


def evaluate_split(run: Any, data: RunData, name: str) -> dict[str, Any]:
  """Returns what `train.evaluate.evaluate` does, for one split.

  Args:
    run: from `load_run`.
    data: images at the stored size of the run's preset; read chunk by chunk.
    name: of the split.
  """
  from insvp_jax.train import evaluate

  split, labels = data.data.splits[name], data.labels(name)
  indices = np.arange(len(split))
  chunks = [indices[i : i + CHUNK_SIZE] for i in range(0, len(split), CHUNK_SIZE)]
  is_correct, of_label = np.empty(len(split), bool), np.empty(len(split), np.float32)
  for chunk, images in zip(chunks, split.read(chunks), strict=True):
    # They have the stored size already, so `Run.predict` does not resize them.
    probabilities = run.predict(images)
    is_correct[chunk] = probabilities.argmax(axis=1) == labels[chunk]
    of_label[chunk] = probabilities[np.arange(len(chunk)), labels[chunk]]
  # float32 underflows to 0 beyond 100 nats.
  nats = -np.log(np.maximum(of_label, np.finfo(np.float32).tiny))
  num_classes = len(run.class_names)
  correct = np.bincount(labels, is_correct, minlength=num_classes)
  count = np.bincount(labels, minlength=num_classes)
  return {
    "accuracy": float(is_correct.mean()),
    "loss": float(nats.mean(dtype=np.float64)),
    "num_examples": len(split),
    "class_accuracy": evaluate.class_accuracy(correct, count),
    "class_count": count,
  }


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
  """Runs the tool; returns its exit status: 0, or 2 after bad input.

  Args:
    argv: the arguments; None for those of the process.
    prog: the command that was typed; see `tools.argument_parser`.
  """
  parser = tools.argument_parser(__doc__, "evaluate", prog)
  parser.add_argument("--run", required=True, help=tools.RUN_HELP)
  parser.add_argument("--backbone", help=tools.BACKBONE_HELP)
  parser.add_argument("--splits", nargs="+", help="train, val, test (the default), ...")
  parser.add_argument(
    "--root", default="", help="another folder or .zip of images of the run's classes"
  )
  args = parser.parse_args(argv)

  def work() -> None:
    from insvp_jax.run import load_run
    from insvp_jax.train import evaluate, report

    run = load_run(args.run, backbone=args.backbone)
    data = run_data.read(run, args.root)
    splits = data.data.splits
    # A folder of classes alone is all there is to score.
    default = "test" if "test" in splits or not args.root else "train"
    names = args.splits or [default]
    for name in names:
      if name not in splits:
        raise ValueError(
          f"--splits has {name!r}, but the task {data.data.name!r} has only "
          f"{', '.join(splits)}."
        )
    for name in names:
      metrics = evaluate_split(run, data, name)
      # Runs of before do not know it.
      train_count = run.meta.get("train_count")
      by_class = evaluate.balanced(metrics, run.class_names, train_count)
      print(
        f"{'all' if args.root and not args.splits and name == 'train' else name}: "
        f"accuracy {100 * metrics['accuracy']:.2f}%"
        f"{report.by_class_text(by_class)}, loss {metrics['loss']:.3f} nats, "
        f"{metrics['num_examples']} images",
        flush=True,
      )

  return tools.run_tool(work)


if __name__ == "__main__":
  sys.exit(main())

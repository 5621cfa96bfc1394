"""Prints a run's accuracy and loss on the splits of its task.

insvp evaluate --run=runs/folder/insvp/seed0 --splits train_val test

Without the command `insvp` it is python -m insvp_jax.tools.evaluate.
Not to select by: a result on the test split that selected something is no test result.
"""

from collections.abc import Sequence
import sys
from typing import Any

import numpy as np

from insvp_jax import tools

CHUNK_SIZE = 256  # images in memory at a time


def evaluate_split(run: Any, split: Any) -> dict[str, float | int]:
  """Returns accuracy in [0, 1], mean loss in nats and the number of examples.

  Args:
    run: from `load_run`.
    split: of images at the stored size of the run's preset; read chunk by chunk.
  """
  indices = np.arange(len(split))
  chunks = [indices[i : i + CHUNK_SIZE] for i in range(0, len(split), CHUNK_SIZE)]
  num_correct, total_loss = 0, 0.0
  for chunk, images in zip(chunks, split.read(chunks), strict=True):
    # They have the stored size already, so `Run.predict` does not resize them.
    probabilities = run.predict(images)
    labels = split.labels[chunk]
    num_correct += int(np.sum(probabilities.argmax(axis=1) == labels))
    of_label = probabilities[np.arange(len(chunk)), labels]
    # float32 underflows to 0 beyond 100 nats.
    of_label = np.maximum(of_label, np.finfo(np.float32).tiny)
    total_loss += float(np.sum(-np.log(of_label)))
  return {
    "accuracy": num_correct / len(split),
    "loss": total_loss / len(split),
    "num_examples": len(split),
  }


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
  """Runs the tool; returns its exit status: 0, or 2 after bad input.

  Args:
    argv: the arguments; None for those of the process.
    prog: the command that was typed; see `tools.argument_parser`.
  """
  parser = tools.argument_parser(__doc__, "evaluate", prog)
  parser.add_argument("--run", required=True, help=tools.RUN_HELP)
  parser.add_argument("--backbone", help="the backbone's file, if it has moved")
  parser.add_argument("--splits", nargs="+", default=["test"], help="train, val, ...")
  args = parser.parse_args(argv)

  def work() -> None:
    from insvp_jax.run import load_run

    run = load_run(args.run, backbone=args.backbone)
    data = tools.task_data(run)
    for name in args.splits:
      if name not in data.splits:
        raise ValueError(
          f"--splits has {name!r}, but the task {data.name!r} has only "
          f"{', '.join(data.splits)}."
        )
    for name in args.splits:
      metrics = evaluate_split(run, data.splits[name])
      print(
        f"{name}: accuracy {100 * metrics['accuracy']:.2f}%, loss "
        f"{metrics['loss']:.3f} nats, {metrics['num_examples']} images",
        flush=True,
      )

  return tools.run_tool(work)


if __name__ == "__main__":
  sys.exit(main())

"""Prints a run's accuracy and loss on the splits of its own task.

python -m insvp_jax.tools.evaluate --run=runs/folder/insvp/seed0 --splits train_val test

To look at, not to choose by: what is chosen by the test split is no test result.
"""

import argparse
from collections.abc import Sequence
import sys
from typing import Any

import numpy as np

from insvp_jax import tools

CHUNK = 256  # images in memory at a time


def evaluate_split(run: Any, split: Any) -> dict[str, float | int]:
  """Returns accuracy in [0, 1], mean loss in nats and the number of examples.

  Args:
    run: from `load_run`.
    split: of images at the stored size of the run's preset; a large one is read
      piece by piece.
  """
  positions = np.arange(len(split))
  chunks = [positions[i : i + CHUNK] for i in range(0, len(split), CHUNK)]
  correct, nats = 0, 0.0
  for chunk, images in zip(chunks, split.read(chunks), strict=True):
    # The stored size already: what `Run.predict` resizes stays as it is.
    probabilities = run.predict(images)
    labels = split.labels[chunk]
    own = probabilities[np.arange(len(chunk)), labels]
    correct += int(np.sum(probabilities.argmax(axis=1) == labels))
    # float32 underflows to 0 beyond 100 nats.
    nats += float(np.sum(-np.log(np.maximum(own, np.finfo(np.float32).tiny))))
  return {
    "accuracy": correct / len(split),
    "loss": nats / len(split),
    "num_examples": len(split),
  }


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the tool; returns its exit status: 0, or 2 after bad input."""
  parser = argparse.ArgumentParser(
    prog="python -m insvp_jax.tools.evaluate", description=__doc__.splitlines()[0]
  )
  parser.add_argument("--run", required=True, help="the run's directory")
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
      found = evaluate_split(run, data.splits[name])
      print(
        f"{name}: accuracy {100 * found['accuracy']:.2f}%, loss {found['loss']:.3f} "
        f"nats, {found['num_examples']} images",
        flush=True,
      )

  return tools.run_tool(work)


if __name__ == "__main__":
  sys.exit(main())

"""By how much the type of the computation changes the scores that E2VPT prunes by.

  python -m benchmarks.mask_scores [--epochs=2] [--images=400]

Trains E2VPT with 20 prompts on digits, scores its tokens and pieces in float64, float32
and bfloat16, and prints, against float64: the largest error over the largest score, and
the share of entries that have another place in the order of their row.
"""

import argparse
from pathlib import Path
import tempfile

import jax
import numpy as np

from insvp_jax.config import defaults
from insvp_jax.data import load_data, pipeline, preprocess
from insvp_jax.run import load_run
from insvp_jax.search import pruning, tables
from insvp_jax.train import trainer

NAMES = ("token_mask", "piece_mask")
TYPES = ("float64", "float32", "bfloat16")


def trained(epochs: float, workdir: Path):
  """Returns a run of E2VPT on digits."""
  config = defaults()
  config.method, config.e2vpt.prompt_length = "e2vpt", 20
  config.total_epochs, config.batch_size, config.optim.lr = epochs, 32, 0.01
  config.tensorboard = False
  trainer.train(config, workdir, test=False)
  return load_run(workdir)


def scores_by_type(run, num_images: int) -> dict[str, dict[str, np.ndarray]]:
  """Returns {type: {mask: scores}} over the first training images."""
  config, size = defaults(), run.model.input_size
  split = load_data("digits", config.data, size).splits["train"]
  split = split.take(np.arange(num_images))
  normalise = jax.jit(lambda x: preprocess.eval_preprocess(run.preset, x, size))
  batches = [
    {**batch, "images": normalise(batch["images"])}
    for batch in pipeline.eval_batches(split, batch_size=50)
  ]
  return {
    dtype: pruning.mask_gradients(run.model, run.params, batches, NAMES, dtype)
    for dtype in TYPES
  }


def rows(scores: dict[str, dict[str, np.ndarray]]) -> list[list[str]]:
  """Returns a row for each mask."""
  exact, table = scores["float64"], []
  for name in NAMES:
    largest, order = np.abs(exact[name]).max(), np.argsort(exact[name], axis=-1)
    row = [name, f"{largest:.1e}"]
    for dtype in TYPES[1:]:
      found = scores[dtype][name]
      moved = np.mean(np.argsort(found, axis=-1) != order)
      error = np.abs(found - exact[name]).max() / largest
      row += [f"{100 * error:.1g}%", f"{100 * moved:.0f}%"]
    table.append(row)
  return table


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--epochs", type=float, default=2.0)
  parser.add_argument("--images", type=int, default=400)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as place:
    scores = scores_by_type(trained(args.epochs, Path(place)), args.images)
  titles = ["score of", "largest"]
  titles += [f"{dtype}, {what}" for dtype in TYPES[1:] for what in ("error", "moved")]
  print(tables.markdown(rows(scores), titles), end="")


if __name__ == "__main__":
  main()

"""A checkpoint: bytes of each item, and the time that it takes from training.

  python -m benchmarks.checkpoint [--backbone=B/16] [--method=insvp] [--rounds=5]

Trains for a few steps and saves after each, as a run does. `blocking` is how long the
loop stands still in `save`, `complete` how long it is until the checkpoint has its name
on disk, while the steps go on. A step beside a save is compared with one without.
"""

import argparse
import json
from pathlib import Path
import statistics
import tempfile
import time
from typing import Any

from benchmarks import turns
from benchmarks.contestant import Contestant, create_config
from insvp_jax.checkpoints.checkpointer import Checkpointer
from insvp_jax.methods import METHODS


def item_bytes(checkpoint: Path) -> dict[str, int]:
  """Returns the bytes on disk of each item of a checkpoint, and of its other files."""
  found = {"other": 0}
  for path in checkpoint.iterdir():
    if path.is_dir():
      found[path.name] = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    else:
      found["other"] += path.stat().st_size
  return found


def measure(contestant: Contestant, rounds: int, steps: int = 3) -> dict[str, Any]:
  """Saves once to warm up and then `rounds` times.

  Args:
    contestant: what trains.
    rounds: checkpoints that are timed.
    steps: trained beside each of them.

  Returns:
    `bytes` by item; medians of seconds: `blocking` (in `save`), `complete` (from its
    start until all is on disk, nothing else going on), `step` and `step_beside_save`.
  """
  seconds: dict[str, list[float]] = {
    name: [] for name in ("blocking", "complete", "step", "step_beside_save")
  }
  # What a run says of itself is about this long.
  meta = {"class_names": [f"class {i}" for i in range(100)], "config": {}}
  with tempfile.TemporaryDirectory() as folder:
    with Checkpointer(folder, mask=contestant.program.mask, meta=meta) as checkpointer:
      for i in range(2 * rounds + 1):
        alone = _steps(contestant, steps)
        start = time.perf_counter()
        checkpointer.save(contestant.state, progress={})
        blocked = time.perf_counter() - start
        beside = _steps(contestant, steps) if i % 2 else None
        checkpointer.wait()
        if i == 0:  # the first one starts Orbax
          continue
        seconds["blocking"].append(blocked)
        seconds["step"].append(alone)
        if beside is None:
          seconds["complete"].append(time.perf_counter() - start)
        else:
          seconds["step_beside_save"].append(beside)
      step = checkpointer.latest_step()
      sizes = item_bytes(checkpointer.directory / str(step))
  return {"bytes": sizes, **{k: statistics.median(v) for k, v in seconds.items()}}


def _steps(contestant: Contestant, number: int) -> float:
  """Returns the seconds of a step, after training for some."""
  return turns.timed(contestant.train)(number) / number


def main(argv: list[str] | None = None) -> None:
  """Measures, prints a line per figure and writes JSON if asked to."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--backbone", default="B/16")
  parser.add_argument("--method", default="insvp", choices=METHODS)
  parser.add_argument("--batch_size", type=int, default=1)
  parser.add_argument("--num_classes", type=int, default=100)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--json", help="write the result there")
  args = parser.parse_args(argv)
  config = create_config(
    args.method, backbone=args.backbone, batch_size=args.batch_size, dtype="float32"
  )
  contestant = Contestant(config, args.num_classes)
  found = {"trainable": contestant.trainable, **measure(contestant, args.rounds)}
  print(f"{args.method}, {args.backbone}, {args.num_classes} classes")
  print(f"trainable parameters: {found['trainable']:,}")
  for item, size in sorted(found["bytes"].items()):
    print(f"{item}: {size:,} bytes")
  for name in ("blocking", "complete", "step", "step_beside_save"):
    print(f"{name.replace('_', ' ')}: {found[name]:.3f} s")
  if args.json:
    Path(args.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
  main()

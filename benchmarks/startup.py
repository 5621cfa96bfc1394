"""Start-up: seconds to import the package, and from `main` to the first train step.

  python -m benchmarks.startup [--rounds=3] [--json=startup.json]

The first step is that of the quickstart's InsVP run: with an empty cache of compiled
programs; with the cache that such a run left behind; and on a task of twice as many
classes with that cache. Each is a process of its own; medians over rounds.
"""

import argparse
import json
import os
from pathlib import Path
import re
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks.epoch import write_images
from insvp_jax.search import tables

ROOT = Path(__file__).resolve().parents[1]
# The second task's; the quickstart's digits have 10.
NUM_CLASSES = 20
# As many images as the digits have, so that nothing but the head differs.
NUM_IMAGES = {"train": 800, "val": 200, "test": 20}
SIZE = 32


def import_seconds() -> float:
  """Returns the seconds of `import insvp_jax` inside a fresh interpreter."""
  code = (
    "import time; t = time.perf_counter(); import insvp_jax; "
    "print(time.perf_counter() - t)"
  )
  run = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
  )
  return float(run.stdout)


def first_step_seconds(workdir: Path, cache: Path, *flags: str) -> float:
  """Returns the seconds from the start of the process to the first train step.

  Args:
    workdir: of the run, which is ended then.
    cache: folder of compiled programs.
    *flags: more of the command line.
  """
  start = time.perf_counter()
  lines = []
  with subprocess.Popen(
    [
      *(sys.executable, "-m", "insvp_jax.main", "--config=configs/quickstart.py"),
      *("--config.tune.methods=('insvp',)", f"--workdir={workdir}", *flags),
    ],
    cwd=ROOT,
    env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    for line in process.stderr:
      lines.append(line)
      if re.search(r"step 1/", line):
        seconds = time.perf_counter() - start
        process.kill()
        return seconds
  raise RuntimeError(f"no first step:\n{''.join(lines)}")


def one_round(folder: Path, images: Path) -> dict[str, float]:
  """Returns the seconds of everything once, by name.

  Args:
    folder: an empty one.
    images: of the second task.
  """
  other = "--config.task=folder", f"--config.data.root={images}"
  other += (f"--config.data.cache_dir={folder / 'decoded'}",)
  runs = {
    "first train step, empty cache": (),
    "the same again": (),
    "another task": other,
  }
  seconds = {"import insvp_jax": import_seconds()}
  for i, (name, flags) in enumerate(runs.items()):
    seconds[name] = first_step_seconds(folder / f"run{i}", folder / "cache", *flags)
  return seconds


def measure(rounds: int) -> dict[str, list[float]]:
  """Returns the seconds of each round, by name."""
  seconds: dict[str, list[float]] = {}
  with tempfile.TemporaryDirectory() as folder:
    images = Path(folder) / "images"
    for split, number in NUM_IMAGES.items():
      write_images(images / split, number, SIZE, NUM_CLASSES)
    for i in range(rounds):
      for name, value in one_round(Path(folder) / f"round{i}", images).items():
        seconds.setdefault(name, []).append(value)
  return seconds


def main() -> None:
  """Prints a table of the medians."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--json", help="write every round there")
  args = parser.parse_args()
  seconds = measure(args.rounds)
  rows = [(name, f"{statistics.median(spent):.3g}") for name, spent in seconds.items()]
  titles = [f"start-up, medians of {args.rounds} rounds", "seconds"]
  print(tables.markdown(rows, titles), end="")
  if args.json:
    Path(args.json).write_text(json.dumps(seconds, indent=2) + "\n")


if __name__ == "__main__":
  main()

"""Start-up: seconds to import the package, and from `main` to the first train step.

  python -m benchmarks.startup [--rounds=3] [--against=CHECKOUT] [--json=startup.json]

The first step is that of the quickstart's InsVP run: with an empty cache of compiled
programs; with the cache that such a run left behind; and on a task of twice as many
classes with that cache. Each is a process of its own; medians over rounds, of the
seconds that pass and of those that processors are busy, which other programs hardly
change. With --against another checkout takes turns with this one, there and back.
"""

import argparse
import json
import os
from pathlib import Path
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from benchmarks.epoch import write_images
from insvp_jax.search import tables

ROOT = Path(__file__).resolve().parents[1]
# The second task's; the quickstart's digits have 10.
NUM_CLASSES = 20
# As many images as the digits have, so that nothing but the head differs.
NUM_IMAGES = {"train": 800, "val": 200, "test": 20}
SIZE = 32


_STATUS = 11
# `insvp train`, which ends itself where it tells of the first step: whoever reads its
# lines may come too late, and would count the steps until then.
_TO_THE_FIRST_STEP = f"""
import os, sys

class UntilTheFirstStep:
  def write(self, text):
    sys.__stderr__.write(text)
    if "step 1/" in text:
      sys.__stderr__.flush()
      os._exit({_STATUS})

  def __getattr__(self, name):
    return getattr(sys.__stderr__, name)

sys.stderr = UntilTheFirstStep()
from insvp_jax import main
main.run(["insvp", *sys.argv[1:]])
"""


class Spent(NamedTuple):
  """Seconds that passed, and those that processors were busy, of a process."""

  wall: float
  processor: float


def _processor_seconds() -> float:
  """Returns those of all processes of this one that have ended."""
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


def import_spent(root: Path) -> Spent:
  """Returns what `import insvp_jax` takes inside a fresh interpreter.

  Args:
    root: of the checkout.
  """
  code = (
    "import time; t, p = time.perf_counter(), time.process_time(); import insvp_jax; "
    "print(time.perf_counter() - t, time.process_time() - p)"
  )
  run = subprocess.run(
    [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
  )
  return Spent(*map(float, run.stdout.split()))


def first_step_spent(root: Path, workdir: Path, cache: Path, *flags: str) -> Spent:
  """Returns what a process takes from its start to the first train step.

  Args:
    root: of the checkout.
    workdir: of the run, which ends then.
    cache: folder of compiled programs.
    *flags: more of the command line.
  """
  start, processor = time.perf_counter(), _processor_seconds()
  run = subprocess.run(
    [
      *(sys.executable, "-c", _TO_THE_FIRST_STEP, "--config=configs/quickstart.py"),
      *("--config.tune.methods=('insvp',)", f"--workdir={workdir}", *flags),
    ],
    cwd=root,
    env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  if run.returncode != _STATUS:
    raise RuntimeError(f"no first step:\n{run.stderr}")
  return Spent(time.perf_counter() - start, _processor_seconds() - processor)


def one_round(root: Path, folder: Path, images: Path) -> dict[str, Spent]:
  """Returns what everything takes once, by name.

  Args:
    root: of the checkout.
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
  spent = {"import insvp_jax": import_spent(root)}
  for i, (name, flags) in enumerate(runs.items()):
    spent[name] = first_step_spent(root, folder / f"run{i}", folder / "cache", *flags)
  return spent


def measure(
  rounds: int, against: Path | None = None
) -> dict[str, dict[str, list[Spent]]]:
  """Returns {"here": {name: what each round took}}, and "there" of another checkout."""
  roots = {"here": ROOT, **({"there": against} if against else {})}
  spent: dict[str, dict[str, list[Spent]]] = {where: {} for where in roots}
  with tempfile.TemporaryDirectory() as folder:
    images = Path(folder) / "images"
    for split, number in NUM_IMAGES.items():
      write_images(images / split, number, SIZE, NUM_CLASSES)
    for i in range(rounds):
      for where in list(roots)[:: 1 if i % 2 == 0 else -1]:
        fresh = Path(folder) / f"round{i}" / where
        for name, each in one_round(roots[where], fresh, images).items():
          spent[where].setdefault(name, []).append(each)
  return spent


def table(spent: dict[str, dict[str, list[Spent]]]) -> str:
  """Returns the medians as a table."""
  rounds = len(next(iter(spent["here"].values())))
  titles = [f"start-up, medians of {rounds} rounds", "seconds", "of the processor"]
  if "there" in spent:
    titles += ["the other's seconds", "of the processor", "over ours"]
  rows = []
  for name in spent["here"]:
    medians = [
      Spent(*map(statistics.median, zip(*by_name[name], strict=True)))
      for by_name in spent.values()
    ]
    row = [name, *(f"{value:.3g}" for each in medians for value in each)]
    if "there" in spent:
      row.append(f"{medians[1].processor / max(medians[0].processor, 1e-9):.2f}")
    rows.append(row)
  return tables.markdown(rows, titles)


def main() -> None:
  """Prints a table of the medians."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--against", type=Path, help="another checkout of the project")
  parser.add_argument("--json", help="write every round there")
  args = parser.parse_args()
  if args.against and not (args.against / "insvp_jax" / "main.py").is_file():
    parser.error(f"--against is {args.against}, expected a checkout of this project.")
  spent = measure(args.rounds, args.against and args.against.resolve())
  print(table(spent), end="")
  if args.json:
    Path(args.json).write_text(json.dumps(spent, indent=2) + "\n")


if __name__ == "__main__":
  main()

"""A whole task of VTAB-1k's size, from the start of the process to its result.

  python -m benchmarks.epoch [--backbone=B/16] [--epochs=100] [--json=epoch.json]
  python -m benchmarks.epoch --backbone=boxed --epochs=5        a shorter one, for a CPU

Runs `python -m insvp_jax.main` on 1,000 made-up training images and 1,000 test images
in 100 classes, as a user would, and reads the clock at the first step and at the end.
The second run finds the compiled programs of the first one, so that what compilation
costs is the difference. Random weights train as fast as real ones.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
import json
import os
from pathlib import Path
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from PIL import Image

from insvp_jax.methods import METHODS
from insvp_jax.methods.insvp import PRESETS
from insvp_jax.models.classifier import create_backbone
from insvp_jax.search import tables

ROOT = Path(__file__).resolve().parents[1]


def write_images(folder: Path, number: int, size: int, num_classes: int) -> None:
  """Writes <class>/<i>.jpg: smooth noise, which compresses about as photographs do.

  Args:
    folder: of the split; made if need be.
    number: of images, spread evenly over the classes.
    size: pixels per side.
    num_classes: k.
  """
  rng = np.random.default_rng(number)
  for i in range(number):
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
    path = folder / f"class{i % num_classes:03d}" / f"{i:05d}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse.resize((size, size), Image.Resampling.BICUBIC).save(path, quality=90)


def command(args: argparse.Namespace, images: Path, workdir: Path) -> list[str]:
  """Returns the command line of the run."""
  values = {
    "data.root": images,
    "data.cache_dir": workdir.parent / "decoded",
    "data.train_split": "train_val",
    "tune.methods": "()",
    "tune.lr": "()",
    "tune.seeds": "()",
    "method": args.method,
    "backbone.name": args.backbone,
    "backbone.weights": "random",
    "backbone.dtype": args.dtype,
    "backbone.frozen_dtype": args.dtype,
    "batch_size": args.batch_size,
    "total_epochs": float(args.epochs),
    "optim.warmup_epochs": 0.0,
    "optim.lr": 1e-3,
    "prompt_images": 0,
  }
  if args.method == "insvp":
    values["insvp.preset"] = args.preset
  flags = [f"--config.{name}={value}" for name, value in values.items()]
  config = f"--config={ROOT / 'configs' / 'folder.py'}"
  return [
    *(sys.executable, "-m", "insvp_jax.main", config, f"--workdir={workdir}"),
    *(*flags, *args.flags),
  ]


def run(line: Sequence[str], workdir: Path, cache: Path) -> dict[str, Any]:
  """Runs the command line and returns where its time went.

  Args:
    line: from `command`.
    workdir: that it names.
    cache: folder of compiled programs.

  Returns:
    Seconds `to_first_step` (of the process), `to_result` (from the first step on),
    `total`, and `compile`, `step` and `images_per_second` from result.json.

  Raises:
    RuntimeError: it failed; the message holds what it said.
  """
  environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
  start = time.perf_counter()
  lines, first = [], None
  with subprocess.Popen(
    line, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
  ) as process:
    for said in process.stderr:
      lines.append(said)
      if first is None and re.search(r"step 1/", said):
        first = time.perf_counter() - start
  total = time.perf_counter() - start
  if process.returncode or first is None:
    raise RuntimeError(f"the run failed:\n{''.join(lines)}")
  result = json.loads((workdir / "result.json").read_text())
  return {
    "to_first_step": first,
    "to_result": total - first,
    "total": total,
    "compile": result["compile_seconds"],
    "step": result["step_seconds"],
    "images_per_second": result["images_per_second"],
    "steps": result["steps"],
    "test_images": result["num_test_examples"],
    "versions": result["versions"],
  }


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
  """Yields where the time of each run went; all but the first find a warm cache."""
  size = args.image_size or create_backbone(args.backbone).image_size
  args.flags = [*args.flags, f"--config.image_size={size}"]
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    write_images(folder / "images/train", args.train_images, size, args.num_classes)
    write_images(folder / "images/test", args.test_images, size, args.num_classes)
    for i in range(args.runs):
      workdir = folder / f"run{i}"
      line = command(args, folder / "images", workdir)
      yield run(line, workdir, folder / "compiled")


def table(runs: Sequence[Mapping[str, Any]]) -> str:
  """Returns the runs of `measure` as a table."""
  titles = ["compiled programs", "to the first step, s", "to the result, s", "total, s"]
  rows = []
  for i, run in enumerate(runs):
    spent = [f"{run[name]:.1f}" for name in ("to_first_step", "to_result", "total")]
    # None where one step was all, and where the steps saw features, not images.
    step, rate = run["step"], run["images_per_second"]
    speed = [f"{1e3 * step:.1f}" if step else "", f"{rate:,.1f}" if rate else ""]
    rows.append(["warm" if i else "cold", *spent, *speed])
  return tables.markdown(rows, [*titles, "ms a step", "images/s"])


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
  """Runs, prints a table and writes JSON if asked to; returns the runs."""
  on_cpu = jax.default_backend() == "cpu"
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--backbone", default="B/16")
  parser.add_argument("--method", default="insvp", choices=METHODS)
  parser.add_argument("--preset", default="paper", choices=PRESETS, help="InsVP's")
  parser.add_argument("--epochs", type=float, default=100)
  parser.add_argument("--batch_size", type=int, default=64)
  parser.add_argument("--dtype", default="float32" if on_cpu else "bfloat16")
  parser.add_argument("--image_size", type=int, default=0, help="0: the backbone's")
  parser.add_argument("--train_images", type=int, default=1000)
  parser.add_argument("--test_images", type=int, default=1000)
  parser.add_argument("--num_classes", type=int, default=100)
  parser.add_argument("--runs", type=int, default=2)
  parser.add_argument("--json", help="write the result there")
  parser.add_argument("flags", nargs="*", help="after --: more flags of the run")
  args = parser.parse_args(argv)
  print(f"{args.backbone}, {args.method}, {args.train_images} images x {args.epochs:g}")
  found = []
  for row in measure(args):
    found.append(row)
    said = f"run {len(found)} of {args.runs}: {row['total']:.1f} s"
    print(said, file=sys.stderr, flush=True)
  print(table(found), end="")
  if args.json:
    Path(args.json).write_text(json.dumps(found, indent=2) + "\n")
  return found


if __name__ == "__main__":
  main()

"""A search of trials that train together against the same trials one by one.

  python -m benchmarks.tune [--methods=linear,vpt_deep,insvp] [--trials=4] [--json=FILE]

Both train the same learning rates on the digits for a few steps and evaluate them on a
part of them; compilation is timed apart. The two take turns, and the medians of the
rounds are compared, so that a machine that is busy at times does not decide.

What trials that train together gain depends on the device: a GPU that one trial does
not fill computes several in little more time. A CPU is filled by one; there only what
is shared is gained: with a linear head the whole backbone.
"""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import json
from pathlib import Path
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from insvp_jax.config import defaults
from insvp_jax.data import ArraySplit, TaskData
from insvp_jax.search import population, tables, trials, tune
from insvp_jax.train import state as state_lib
from insvp_jax.train import trainer


def create_config(method: str, backbone: str, steps: int) -> ConfigDict:
  """Returns the config of the trials."""
  config = defaults()
  config.task, config.method = "digits", method
  config.backbone.name = backbone
  config.batch_size = 32
  config.total_steps = steps
  config.log_every_steps = steps
  config.vpt_deep.prompt_length = config.vpt_shallow.prompt_length = 9
  return config


def with_val(prepared: trainer.Prepared) -> trainer.Prepared:
  """Returns the digits with a val split, of train's first 200."""
  train = prepared.data.splits["train"]
  val = ArraySplit(train.images[:200], train.labels[:200])
  data = TaskData("digits", prepared.data.class_names, {"train": train, "val": val})
  return trainer.Prepared(data, prepared.weights, prepared.backbone, prepared.program)


def seconds(
  configs: Sequence[ConfigDict],
  size: int,
  prepared: trainer.Prepared,
  params: Mapping[str, Any],
) -> float:
  """Returns the seconds of training and evaluating some trials, `size` at a time."""
  with tempfile.TemporaryDirectory() as folder:
    start = time.perf_counter()
    for i in range(0, len(configs), size):
      members = configs[i : i + size]
      tune.train_trials(members, prepared, params, Path(folder), "trials")
    return time.perf_counter() - start


def compare(
  method: str, backbone: str, number: int, steps: int, rounds: int
) -> dict[str, Any]:
  """Returns the seconds of both ways of training `number` trials.

  Args:
    method: a key of `methods.METHODS`.
    backbone: a release's name or a variant.
    number: of trials.
    steps: of each trial.
    rounds: how often both are timed, after once for compilation.
  """
  config = create_config(method, backbone, steps)
  lrs = np.geomspace(1e-4, 1e-2, number).tolist()
  prepared = with_val(trainer.prepare(config))
  configs = [trials.at(config, lr=lr) for lr in lrs]
  stacked = population.stack_program(prepared.program)
  ways = {
    "one by one": (1, prepared),
    "together": (number, dataclasses.replace(prepared, program=stacked)),
  }
  params = state_lib.init_params(prepared.program.model, 0, prepared.weights)
  first = {w: seconds(configs, *way, params) for w, way in ways.items()}
  times: dict[str, list[float]] = {name: [] for name in ways}
  for _ in range(rounds):
    for name, way in ways.items():
      times[name].append(seconds(configs, *way, params))
  medians = {way: statistics.median(values) for way, values in times.items()}
  split = prepared.data.splits["train"]
  return {
    "method": method,
    "backbone": backbone,
    "trials": number,
    "steps": steps,
    "device": jax.devices()[0].device_kind,
    "rounds": times,
    "seconds": medians,
    "speed_up": medians["one by one"] / medians["together"],
    "compile_seconds": {way: max(first[way] - medians[way], 0.0) for way in ways},
    "automatic_chunk": population.population_size(configs, prepared.program, split),
    "mib_of_a_member": population.member_bytes(config, prepared.program)[1] / 2**20,
  }


def table(found: Sequence[Mapping[str, Any]], title: str) -> str:
  """Returns what `compare` found of each method as a table."""
  rows = []
  for row in found:
    times = [f"{row['seconds'][way]:.2f}" for way in ("one by one", "together")]
    speed_up, chunk = f"{row['speed_up']:.2f}", str(row["automatic_chunk"])
    rows.append([row["method"], *times, speed_up, chunk])
  titles = [title, "one by one, s", "together, s", "speed-up", "automatic"]
  return tables.markdown(rows, titles)


def main() -> None:
  """Prints one row per method."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--methods", default="linear,vpt_deep,insvp")
  parser.add_argument("--backbone", default="boxed")
  parser.add_argument("--trials", type=int, default=4)
  parser.add_argument("--steps", type=int, default=10)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--json", default="")
  args = parser.parse_args()
  found = []
  for method in args.methods.split(","):
    row = compare(method, args.backbone, args.trials, args.steps, args.rounds)
    found.append(row)
    print(f"{method}: speed-up {row['speed_up']:.2f}", file=sys.stderr, flush=True)
  title = f"{args.trials} trials of {args.steps} steps, {args.backbone}"
  print(table(found, title), end="")
  if args.json:
    Path(args.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
  main()

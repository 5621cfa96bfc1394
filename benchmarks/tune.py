"""A search of trials that train together against the same trials one by one.

  python -m benchmarks.tune [--methods=linear,vpt_deep,insvp] [--trials=4] [--json=FILE]

All train the same learning rates on the digits for a few steps and evaluate them on a
part of them; compilation is timed apart. The ways take turns, there and back, and the
medians of the rounds are compared, so that a machine that is busy at times does not
decide.

What trials that train together gain depends on the device: a GPU that one trial does
not fill computes several *at once* in little more time. A CPU is filled by one; there
only what is shared is gained at once: with a linear head the whole backbone. Trials
that train *in turn*, within one call, share the memory of their activations, which a
CPU's operating system has to clear for every call: the table has the page faults of a
trial's step.

`taskset -c 0 python -m benchmarks.tune --clock=cpu` counts the processor's seconds on
one core, which other programs hardly change.
"""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import json
from pathlib import Path
import resource
import sys
import tempfile
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from benchmarks import turns
from insvp_jax.config import defaults
from insvp_jax.data import ArraySplit, TaskData
from insvp_jax.models import architectures
from insvp_jax.search import population, tables, trials, tune
from insvp_jax.train import state as state_lib
from insvp_jax.train import trainer

# How trials train: the name of each way, and whether trials take turns in a step.
ONE_BY_ONE = "one by one"
WAYS = {ONE_BY_ONE: None, "at once": False, "in turn": True}


def create_config(
  method: str, backbone: str, steps: int, batch_size: int = 32
) -> ConfigDict:
  """Returns the config of the trials; an architecture has random weights."""
  config = defaults()
  config.task, config.method = "digits", method
  config.backbone.name = backbone
  config.backbone.weights = "random" if architectures.is_variant(backbone) else ""
  config.batch_size = config.eval_batch_size = batch_size
  config.total_steps = steps
  config.log_every_steps = steps
  config.vpt_deep.prompt_length = config.vpt_shallow.prompt_length = 9
  return config


def with_val(prepared: trainer.Prepared, number: int) -> trainer.Prepared:
  """Returns the digits with a val split, of so many of train."""
  train = prepared.data.splits["train"]
  val = ArraySplit(train.images[:number], train.labels[:number])
  data = TaskData("digits", prepared.data.class_names, {"train": train, "val": val})
  return dataclasses.replace(prepared, data=data)


def seconds(
  configs: Sequence[ConfigDict],
  size: int,
  prepared: trainer.Prepared,
  params: Mapping[str, Any],
  clock: str = "wall",
) -> float:
  """Returns the seconds of training and evaluating some trials, `size` at a time."""
  now = turns.CLOCKS[clock]
  with tempfile.TemporaryDirectory() as folder:
    start = now()
    for i in range(0, len(configs), size):
      members = configs[i : i + size]
      tune.train_trials(members, prepared, params, Path(folder), "trials")
    return now() - start


def compare(
  method: str,
  backbone: str,
  number: int,
  steps: int,
  rounds: int,
  *,
  batch_size: int = 32,
  num_val: int = 200,
  clock: str = "wall",
) -> dict[str, Any]:
  """Returns the seconds of each way of training `number` trials.

  Args:
    method: a key of `methods.METHODS`.
    backbone: a release's name or a variant.
    number: of trials.
    steps: of each trial.
    rounds: how often each is timed, after once for compilation.
    batch_size: of training and evaluation.
    num_val: images of val.
    clock: a key of `turns.CLOCKS`.
  """
  config = create_config(method, backbone, steps, batch_size)
  lrs = np.geomspace(1e-4, 1e-2, number).tolist()
  prepared = with_val(trainer.prepare(config), num_val)
  configs = [trials.at(config, lr=lr) for lr in lrs]
  ways = {ONE_BY_ONE: (1, prepared)}
  for name, in_turn in WAYS.items():
    if in_turn is not None:
      program = population.stack_program(prepared.program, in_turn=in_turn)
      ways[name] = (number, dataclasses.replace(prepared, program=program))
  params = state_lib.init_params(prepared.program.model, 0, prepared.weights)
  first = {w: seconds(configs, *way, params, clock) for w, way in ways.items()}
  times: dict[str, list[float]] = {name: [] for name in ways}
  faults: dict[str, list[float]] = {name: [] for name in ways}
  for i in range(rounds):
    for name in list(ways)[:: (-1) ** i]:
      before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
      times[name].append(seconds(configs, *ways[name], params, clock))
      after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
      faults[name].append((after - before) / (number * steps))
  medians = turns.medians(times)
  split = prepared.data.splits["train"]
  return {
    "method": method,
    "backbone": backbone,
    "trials": number,
    "steps": steps,
    "batch_size": batch_size,
    "clock": clock,
    "device": jax.devices()[0].device_kind,
    "rounds": times,
    "seconds": medians,
    "speed_up": {
      name: turns.ratio(times, ONE_BY_ONE, name) for name in ways if name != ONE_BY_ONE
    },
    "page_faults": turns.medians(faults),
    "compile_seconds": {way: max(first[way] - medians[way], 0.0) for way in ways},
    "automatic_chunk": population.population_size(configs, prepared.program, split),
    "mib_of_a_member": population.member_bytes(config, prepared.program)[1] / 2**20,
  }


def table(found: Sequence[Mapping[str, Any]], title: str) -> str:
  """Returns what `compare` found of each method as a table."""
  rows = []
  for row in found:
    times = [f"{row['seconds'][way]:.2f}" for way in WAYS]
    gains = [f"{gain:.2f}" for gain in row["speed_up"].values()]
    faults = " / ".join(f"{row['page_faults'][way]:,.0f}" for way in WAYS)
    rows.append([row["method"], *times, *gains, faults, str(row["automatic_chunk"])])
  titles = [title, *(f"{way}, s" for way in WAYS)]
  titles += [f"{way}, speed-up" for way in list(WAYS)[1:]]
  return tables.markdown(rows, [*titles, "page faults", "automatic"])


def main() -> None:
  """Prints one row per method."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--methods", default="linear,vpt_deep,insvp")
  parser.add_argument("--backbone", default="boxed")
  parser.add_argument("--trials", type=int, default=4)
  parser.add_argument("--steps", type=int, default=10)
  parser.add_argument("--batch_size", type=int, default=32)
  parser.add_argument("--val", type=int, default=200, help="images of val")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--clock", choices=tuple(turns.CLOCKS), default="wall")
  parser.add_argument("--json", default="")
  args = parser.parse_args()
  found = []
  for method in args.methods.split(","):
    row = compare(
      *(method, args.backbone, args.trials, args.steps, args.rounds),
      batch_size=args.batch_size,
      num_val=args.val,
      clock=args.clock,
    )
    found.append(row)
    gains = ", ".join(f"{way} {gain:.2f}" for way, gain in row["speed_up"].items())
    print(f"{method}: speed-up {gains}", file=sys.stderr, flush=True)
  title = f"{args.trials} trials of {args.steps} steps, {args.backbone}"
  print(table(found, title), end="")
  if args.json:
    Path(args.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
  main()

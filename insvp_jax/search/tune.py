"""The VTAB protocol: choose on val, retrain on train + val, report test over seeds.

A search leaves one line per trial in `<method>/trials.jsonl`; the final runs lie in
`<method>/seed<n>`; the choice and the accuracies in `summary.json`, `table.md` and
`table.csv`. Trials train together where the device gains by it (see `sizing`), and so
do the final runs. Interrupted, the same command goes on: finished trials and runs are
kept, trials under way start again, final runs go on from their checkpoints.

Source: Zhai et al. 2019, "A Large-scale Study of Representation Learning with the
Visual Task Adaptation Benchmark", section 3; the choice by the last epoch, ties to
the smaller lr, and the retraining on all 1,000 images as in VPT (Jia et al. 2022).
"""

from collections.abc import Iterator, Mapping
import dataclasses
import json
from pathlib import Path
import statistics
from typing import Any

import jax
from ml_collections import ConfigDict

from insvp_jax import config as config_lib
from insvp_jax import config_checks, trees
from insvp_jax.logs.writers import write_json
from insvp_jax.methods import METHODS, create_method
from insvp_jax.search import sizing, tables, together, trials
from insvp_jax.search.population import Population, can_train_together
from insvp_jax.search.tables import describe, say
from insvp_jax.train import features, report, trainer
from insvp_jax.train.preparation import Prepared, prepare

MODES = ("auto", "train", "tune")


def run(config: ConfigDict, workdir: str | Path, mode: str = "auto") -> dict[str, Any]:
  """Does what a config asks for: one run, or search, retraining and a table.

  With `config.tune` empty this is `trainer.train` alone. Otherwise each method of
  `tune.methods` tries every point of `tune.lr` x `tune.wd` x `tune.grid` on the train
  split, is chosen by its last accuracy on val, and is trained again, on what the task's
  protocol says (`TaskData.final_split`), for each of `tune.seeds`; only these runs
  ever see the test split. Finished trials and runs are not repeated when the same
  command is started again.

  Args:
    config: the whole configuration.
    workdir: of a single run; with a search, the parent of `<method>/`, and the place
      of summary.json, table.md and table.csv.
    mode: "auto" as above; "train" is one run with `config.optim`, whatever
      `config.tune` says; "tune" is a search, for which an empty `tune.lr` stands for
      the method's own grid (see `grids`).

  Returns:
    The result of the single run, or the summary by method.

  Raises:
    ValueError: bad input, a grid that is empty, or a search on a task that has no
      val split.
  """
  workdir = Path(workdir)
  config_checks.validate(config)
  if mode not in MODES:
    raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}.")
  for method in config.tune.methods or (config.method,):
    trees.lookup(METHODS, method, "method")
  if not _is_search(config, mode):
    result = trainer.train(config, workdir)
    say(describe(result))
    return result
  trials.check_keys(config)
  # All at once: a wrong field of the last method shows before the first one trains.
  searches, prepared = {}, None
  for method in config.tune.methods or (config.method,):
    searches[method] = Search(trials.at(config, method=method), mode, prepared)
    prepared = searches[method].prepared
  summary = {}
  for method, search in searches.items():
    summary[method] = search.run(workdir / method)
    task = search.prepared.data.name
    table = tables.format_table(task, summary)
    write_json(workdir / "summary.json", summary)
    if jax.process_index() == 0:
      (workdir / "table.md").write_text(table)
      (workdir / "table.csv").write_text(tables.format_csv(task, summary))
  say(f"\n{table}")
  return summary


def first_run(
  config: ConfigDict, workdir: str | Path, method: str, mode: str = "auto"
) -> Path | None:
  """Returns where `run` put a method's (first) final run; None if it had none."""
  workdir = Path(workdir)
  if not _is_search(config, mode):
    return workdir if method == config.method else None
  if method not in (config.tune.methods or (config.method,)):
    return None
  seeds = config.tune.seeds or (config.seed,)
  return workdir / method / f"seed{seeds[0]}"


def _is_search(config: ConfigDict, mode: str) -> bool:
  tune = config.tune
  lists = (tune.methods, tune.lr, tune.wd, tune.seeds, *tune.grid.values())
  return mode == "tune" or (mode == "auto" and any(lists))


class Search:
  """The choice of one method's numbers, and the runs with what was chosen.

  Attributes:
    config: of the method; its points replace some numbers of it.
    points: of the grid.
    names: of the points' numbers.
    prepared: data, weights and the trials' program.
  """

  def __init__(self, config: ConfigDict, mode: str, like: Prepared | None):
    """Checks all that can be checked before anything trains.

    Raises:
      ValueError, FileNotFoundError: bad input; see the message.
    """
    grid = trials.grid_of(config, mode == "tune")
    self.points = trials.points(grid)
    self.names = tuple(self.points[0])
    config = trials.scaled(config, mode == "tune")
    if self.is_search:
      config = trials.at(config, train_split="train")
    self.config = config
    more = tuple(name for name in self.names if name not in ("lr", "wd"))
    configs = [trials.at(config, **point) for point in self.points]
    # With any point's numbers: they are data.
    self.prepared = prepare(configs[0], like=like, numbers=more)
    spec = self.prepared.program.model.backbone.spec
    for each in configs:
      create_method(each.method, spec, **config_lib.method_kwargs(each))
    splits = self.prepared.data.splits
    if self.is_search and not {"train", "val"} <= set(splits):
      raise ValueError(
        f"the task {self.prepared.data.name!r} has no val split to choose "
        f"{' and '.join(self.names)} on; set config.tune.lr and config.tune.wd to one "
        "value each, or add a val split. The test split never selects."
      )

  @property
  def is_search(self) -> bool:
    """Whether there is anything to choose."""
    return len(self.points) > 1

  def run(self, workdir: Path) -> dict[str, Any]:
    """Returns the summary of the method: the choice, and its test accuracies."""
    found = self.search(workdir) if self.is_search else []
    chosen = trials.choose(found, self.names) if self.is_search else self.points[0]
    results = self.retrain(chosen, workdir)
    # A task without a test split has no accuracies: its models are all there is.
    accuracies = [r["test_accuracy"] for r in results if r["test_accuracy"] is not None]
    best = trials.find(found, chosen) or {}
    return {
      "mean": statistics.mean(accuracies) if accuracies else None,
      "std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
      "test_accuracies": accuracies,
      "seeds": [result["seed"] for result in results],
      **chosen,
      "val_accuracy": best.get("val_accuracy"),
      "searched": list(self.names) if self.is_search else [],
      "trials": [
        {name: trial[name] for name in (*self.names, "val_accuracy")} for trial in found
      ],
      "trainable_params": results[0]["trainable_params"],
      "prompter_params": results[0]["prompter_params"],
      "train_seconds": statistics.mean(result["train_seconds"] for result in results),
      "images_per_second": statistics.mean(r["images_per_second"] for r in results),
    }

  def search(self, workdir: Path) -> list[Mapping[str, Any]]:
    """Returns the finished trials of all points, in their order."""
    path, prepared = workdir / trials.FILE, self.prepared
    digest = trials.settings(
      self.config,
      self.names,
      prepared.backbone,
      report.data_digest(self.config, prepared.data, False),
    )
    done = trials.read(path, digest)
    missing = [point for point in self.points if trials.find(done, point) is None]
    if missing:
      with trainer.own(workdir / "search"):
        for trial in self._try(missing, workdir):
          # As it will be read: pairs become lists.
          trial = json.loads(json.dumps({**trial, "settings": digest}))
          trials.append(path, trial)
          done.append(trial)
    return [trials.find(done, point) for point in self.points]

  def _try(self, points: list[trials.Point], workdir: Path) -> Iterator[dict[str, Any]]:
    """Yields the trials of some points, chunk by chunk."""
    prepared, number, start = self.prepared, len(points), 0
    configs = [trials.at(self.config, **point) for point in points]
    population = Population.of(configs, prepared.program, prepared.weights)
    limit = sizing.chunk_size(configs, population, prepared.data.splits["train"])
    size = sizing.balanced(number, limit)
    population = dataclasses.replace(population, alone=size == 1)
    drawn = population.draw(configs, prepared.weights)
    name = f"{prepared.data.name} {self.config.method}, {number} trials"
    while start < number:
      said = f"{name}, {size} at a time" if size > 1 else name
      chosen = points[start : start + size]
      # One compiled step for all chunks: the last one is filled up.
      chunk = (configs[start : start + size] + configs[-1:] * size)[:size]
      try:
        found = together.search(
          chunk, prepared, population, drawn, workdir / "search", said
        )
      except jax.errors.JaxRuntimeError as error:
        if size == 1 or "RESOURCE_EXHAUSTED" not in str(error):
          raise
        size //= 2
        population = dataclasses.replace(population, alone=size == 1)
        say(f"{said}: too many for the device's memory; now {size} at a time")
        continue
      for point, trial in zip(chosen, found, strict=False):
        accuracy = trial["val_accuracy"]
        outcome = trial["diverged"] or f"val {100 * accuracy:.2f}%"
        say(f"{trials.describe(point)}: {outcome}")
        yield {**point, "seed": self.config.seed, **trial, "together": size}
      start += size

  def retrain(self, chosen: trials.Point, workdir: Path) -> list[dict[str, Any]]:
    """Returns the results of the final runs, one per seed."""
    data = self.prepared.data
    split = data.final_split if data.final_split in data.splits else "train"
    final = trials.at(self.config, **chosen, train_split=split)
    retrained = prepare(final, like=self.prepared)
    configs = {
      workdir / f"seed{seed}": trials.at(final, seed=seed)
      for seed in self.config.tune.seeds or (self.config.seed,)
    }
    results = {where: _finished(c, where, retrained) for where, c in configs.items()}
    missing = {w: c for w, c in configs.items() if results[w] is None}
    results |= _train(missing, retrained)
    for result in results.values():
      say(f"seed {result['seed']}: {describe(result)}")
    return list(results.values())


def _train(
  configs: Mapping[Path, ConfigDict], prepared: Prepared
) -> dict[Path, dict[str, Any]]:
  """Returns the results of runs that differ in their seeds, by workdir."""
  workdirs, members = list(configs), list(configs.values())
  if not members:
    return {}
  size, results = _final_size(members, prepared), []
  for start in range(0, len(members), size):
    some, where = members[start : start + size], workdirs[start : start + size]
    if len(some) == 1:
      results.append(trainer.train(some[0], where[0], prepared=prepared))
    else:
      population = Population.of(some, prepared.program, prepared.weights)
      results += together.train(some, where, prepared, population)
  return dict(zip(workdirs, results, strict=True))


def _final_size(configs: list[ConfigDict], prepared: Prepared) -> int:
  """Returns how many of the final runs train together."""
  split = prepared.data.splits[configs[0].data.train_split]
  population = Population.of(configs, prepared.program, prepared.weights)
  limit = sizing.chunk_size(configs, population, split)
  seeds = [config.seed for config in configs]
  cached = population.one_backbone and features.are_cached(
    configs[0], prepared.program, len(split)
  )
  if limit > 1 and not (cached or can_train_together(seeds, split)):
    say("The training images are streamed: the seeds train one by one.")
    return 1
  return sizing.balanced(len(configs), limit)


def _finished(
  config: ConfigDict, workdir: Path, prepared: Prepared
) -> dict[str, Any] | None:
  """Returns the result if the same run has already finished in `workdir`."""
  result, stored = workdir / "result.json", workdir / "config.json"
  if not (result.exists() and stored.exists()):
    return None
  found, before = json.loads(result.read_text()), json.loads(stored.read_text())
  # Random weights have a seed beside what is prepared; the config compares it.
  same = prepared.backbone.items() <= found["backbone"].items()
  digest = report.data_digest(config, prepared.data, True)
  same &= found.get("data_sha256") == digest
  return found if same and not config_lib.difference(config, before) else None

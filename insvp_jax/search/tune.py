"""The VTAB protocol: choose on val, retrain on train + val, report test over seeds.

A search has rows: the methods of `config.tune.methods`, or the variants of some in
`config.tune.variants` (see `config_variants`). A row leaves one line per trial in
`<row>/trials.jsonl`; its final runs lie in `<row>/seed<n>`; the choice and the
accuracies in `summary.json`, `table.md` and `table.csv`. Trials train together where
the device gains by it (see `population`). Interrupted, the same command goes on:
finished trials and runs are kept, trials under way start again, the final run under way
goes on from its checkpoint.

Source: Zhai et al. 2019, "A Large-scale Study of Representation Learning with the
Visual Task Adaptation Benchmark", section 3; the choice by the last epoch, ties to
the smaller lr, and the retraining on all 1,000 images as in VPT (Jia et al. 2022).
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import itertools
import json
from pathlib import Path
import statistics
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from insvp_jax import config as config_lib
from insvp_jax import config_checks
from insvp_jax.checkpoints.files import Damaged, find_steps, load_json, read_meta
from insvp_jax.config_variants import variants_of
from insvp_jax.distributed.processes import print_once
from insvp_jax.distributed.stopping import StopSignal
from insvp_jax.logs.progress import Whole
from insvp_jax.logs.writers import Writers, write_json, write_text
from insvp_jax.methods import parts_of
from insvp_jax.models.classifier import create_model
from insvp_jax.search import population, pruning, tables, trials
from insvp_jax.search.outlook import (
  Outlook,
  Pace,
  Row,
  Sizes,
  Work,
  flops_of,
  forecast,
  time_steps,
  work_of,
)
from insvp_jax.train import evaluate, objectives, report, trainer
from insvp_jax.train import program as program_lib
from insvp_jax.train.program import create_state, fill_preset
from insvp_jax.train.timing import Timer
from insvp_jax.train.trainer import Prepared, ReadData, prepare

MODES = ("auto", "train", "tune")


def run(
  config: ConfigDict,
  workdir: str | Path,
  mode: str = "auto",
  read: ReadData | None = None,
  later: Sequence[Sizes] = (),
) -> dict[str, Any]:
  """Does what a config asks for: one run, or search, retraining and a table.

  With `config.tune` empty this is `trainer.train` alone. Otherwise each row of
  `tune.methods` or `tune.variants` tries every point of `tune.lr` x `tune.wd` x
  `tune.grid`, crossed with its fields in `tune.fields`, on the train split; the point
  of the best last accuracy on val is trained again, on what the task's protocol says
  (`TaskData.final_split`), for each of `tune.seeds`; only these runs ever see the test
  split. Variants are compared on val: one with a single point tries that, too. Finished
  trials and runs are not repeated when the same command is started again.

  Args:
    config: the whole configuration.
    workdir: of a single run; with a search, the parent of `<row>/`, and the place of
      summary.json, table.md and table.csv.
    mode: "auto" as above; "train" is one run with `config.optim`, whatever
      `config.tune` says; "tune" is a search, for which an empty `tune.lr` stands for
      the method's own grid (see `grids`).
    read: as for `trainer.prepare`.
    later: the tasks that the same is going to be done for, so that the time of all can
      be said.

  Returns:
    The result of the single run, or the summary by the rows' labels.

  Raises:
    ValueError: bad input, a grid that is empty, or a search on a task that has no
      val split.
  """
  workdir = Path(workdir)
  config_checks.validate(config)
  fill_preset(config)
  if mode not in MODES:
    raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}.")
  variants = variants_of(config)
  for variant in variants:
    parts_of(variant.method)
  if not _is_search(config, mode):
    result = trainer.train(config, workdir, read=read)
    print_once(report.result_line(result))
    return result
  trials.check_keys(config)
  pruning.check_keys(config)
  # All at once: a wrong field of the last row shows before the first one trains.
  searches, prepared, are_compared = {}, None, bool(config.tune.variants)
  for variant in variants:
    row = variant.config(config, mode == "tune")
    search = Search(row, mode, prepared, are_compared=are_compared, read=read)
    searches[variant.label], prepared = search, search.prepared
    if "batch_size" not in variant.changes:
      # What 0 stood for holds for all rows.
      config = trials.at(config, batch_size=prepared.program.batch_size)
  trainer.print_shared(config, prepared)
  outlook = Outlook({label: search.work() for label, search in searches.items()})
  print_once(outlook.summary())
  folders = {variant.label: workdir / variant.folder for variant in variants}
  _forecast(outlook, searches, folders, later)
  summary = {}
  for variant, (label, search) in zip(variants, searches.items(), strict=True):
    if label != variant.method:
      print_once(f"\n{label} ({len(summary) + 1} of {len(variants)})")
    if any(key.startswith("data.") for key in variant.changes):
      # The first line of the summary: how many images there are to train on.
      print_once(search.prepared.data.summary().partition("\n")[0])
    trainer.print_params(search.config, search.prepared)
    changes = config_lib.to_dict(variant.changes)
    results = search.run(folders[label], outlook.row(label))
    summary[label] = {"method": variant.method, "changes": changes, **results}
    task = search.prepared.data.name
    table = tables.format_table(task, summary)
    write_json(workdir / "summary.json", summary)
    write_text(workdir / "table.md", table)
    write_text(workdir / "table.csv", tables.format_csv(task, summary))
  return summary


def first_runs(
  config: ConfigDict, workdir: str | Path, mode: str = "auto"
) -> dict[str, Path]:
  """Returns where `run` puts the (first) final run of each row, by label."""
  workdir = Path(workdir)
  if not _is_search(config, mode):
    return {config.method: workdir}
  seed = (config.tune.seeds or (config.seed,))[0]
  return {
    variant.label: workdir / variant.folder / f"seed{seed}"
    for variant in variants_of(config)
  }


def _is_search(config: ConfigDict, mode: str) -> bool:
  tune = config.tune
  lists = (tune.methods, tune.variants, tune.lr, tune.wd, tune.seeds)
  lists += tuple(tune.grid.values())
  lists += (tune.fields, *tune.prune.values())
  return mode == "tune" or (mode == "auto" and any(lists))


def _forecast(
  outlook: Outlook,
  searches: Mapping[str, "Search"],
  folders: Mapping[str, Path],
  later: Sequence[Sizes],
) -> None:
  """Measures and says how long the runs that are missing take, before the first."""
  left = {label: search.left(folders[label]) for label, search in searches.items()}
  measured = outlook.to_measure(left)
  pace = measured and searches[measured[0]].measure(*measured, folders[measured[0]])
  if not pace:
    return
  seconds = outlook.seconds(pace, left)
  rest = [
    outlook.seconds(
      pace, works={n: search.work(sizes) for n, search in searches.items()}
    )
    for sizes in later
  ]
  outlook.whole.expect(seconds)
  print_once(forecast(seconds, rest))


class _Start:
  """What trials of equal fields of methods start from.

  Attributes:
    fields: of their points.
    prepared: data, weights and the program of one trial.
  """

  def __init__(self, fields: trials.Point, prepared: Prepared):
    """Computes nothing yet."""
    self.fields, self.prepared = fields, prepared
    self._params: Mapping[str, Any] | None = None

  def size(self, configs: Sequence[ConfigDict]) -> int:
    """Returns how many of the trials train together."""
    split = self.prepared.data.splits["train"]
    limit = population.population_size(configs, self.prepared.program, split)
    return population.balanced_size(len(configs), limit)

  def prepared_for(self, size: int) -> Prepared:
    """Returns data, weights and the program of so many trials at once."""
    return self._stacked if size > 1 else self.prepared

  @functools.cached_property
  def _stacked(self) -> Prepared:
    one = self.prepared.program
    program = population.stack_program(one, in_turn=population.takes_turns(one))
    return dataclasses.replace(self.prepared, program=program)

  def params(self, config: ConfigDict) -> Mapping[str, Any]:
    """Returns the first parameters, which have one seed in all trials; see `free`."""
    if self._params is None:
      params = self.prepared.first_params(config)
      self._params = self.prepared.prepare_params(config, params)
    return self._params

  def free(self) -> None:
    """Drops the parameters."""
    self._params = None


class Search:
  """The choice of one row's hparams, and the runs with what was chosen.

  Attributes:
    config: of the row; a point of the grid replaces some hparams of it.
    points: of the grid.
    names: of the points' hparams.
    has_trials: whether the points are tried: where there is a choice, or where rows
      are compared on val.
    prepared: data, weights and the program of the first trials; see `prepared_for`.
    percents: to be pruned of each mask; see `pruning`.
  """

  def __init__(
    self,
    config: ConfigDict,
    mode: str,
    like: Prepared | None,
    points: list[trials.Point] | None = None,
    are_compared: bool = False,
    read: ReadData | None = None,
  ):
    """Checks all that can be checked before anything trains.

    Args:
      config: the whole configuration, of one row.
      mode: as for `run`.
      like: of another row on the same task and backbone; see `prepare`.
      points: to be tried in place of the grid.
      are_compared: whether rows are compared on val, so that a single point is tried.
      read: as for `trainer.prepare`.

    Raises:
      ValueError, FileNotFoundError: bad input; see the message.
    """
    self.points = points or trials.points(trials.grid_of(config, mode == "tune"))
    self.names = tuple(self.points[0])
    config = trials.scaled(config, mode == "tune")
    self.percents = pruning.percents_of(config, mode == "tune")
    if self.has_choice or self.percents or are_compared:
      config = trials.at(config, train_split="train")
    configs = [trials.at(config, **point) for point in self.points]
    for each in configs:
      # A value that a field cannot have shows before data are read.
      program_lib.input_size(each)
    hparams = trials.hparams_of_point(self.points[0])
    # The program is the same for all points of equal fields: what differs is data.
    self.prepared = prepare(configs[0], like=like, hparams=hparams, read=read)
    self._start = _Start(trials.fields_of(self.points[0]), self.prepared)
    # (what is compiled of a choice, its preparation), the latest.
    self._final: tuple[trials.Point, Prepared] | None = None
    # Automatic until now. The final runs keep what the trials had.
    self.config = trials.at(config, batch_size=configs[0].batch_size)
    for each in configs:
      kwargs = program_lib.model_kwargs(each, self.prepared.data.num_classes)
      create_model(**kwargs)
    if self.percents and not self.prepared.program.objective.ONE_FEATURE:
      raise ValueError(
        f"config.tune.prune.{next(iter(self.percents))} is of a method whose masks are "
        "scored by images with one label each; set it to () for segmentation."
      )
    has_val = {"train", "val"} <= set(self.prepared.data.splits)
    # Without val, rows with nothing to choose have the test split alone.
    self.has_trials = self.has_choice or (are_compared and has_val)
    chosen = (*(self.names if self.has_choice else ()), *self.percents)
    if chosen and not has_val:
      empty = "".join(f", config.tune.prune.{name} to ()" for name in self.percents)
      raise ValueError(
        f"the task {self.prepared.data.name!r} has no val split to choose "
        f"{' and '.join(chosen)} on; set config.tune.lr and config.tune.wd to one "
        f"value each, e.g. by --config.optim.lr=0.003{empty}, or add a val split. The "
        "test split never selects."
      )

  @property
  def has_choice(self) -> bool:
    """Whether there is more than one point."""
    return len(self.points) > 1

  @property
  def seeds(self) -> tuple[int, ...]:
    """The seeds of the final runs."""
    return tuple(self.config.tune.seeds) or (self.config.seed,)

  @property
  def final_split(self) -> str:
    """The split that the final runs train on."""
    data = self.prepared.data
    return data.final_split if data.final_split in data.splits else "train"

  def prepared_for(self, point: trials.Point) -> Prepared:
    """Returns data, weights and program of a point's trial."""
    return self._start_of(point).prepared

  def _start_of(self, point: trials.Point) -> _Start:
    """Returns what a point's trial starts from.

    Kept is the latest: points of equal fields follow each other.
    """
    fields = trials.fields_of(point)
    if self._start.fields != fields:
      config = trials.at(self.config, **point)
      hparams = trials.hparams_of_point(point)
      prepared = prepare(config, like=self._start.prepared, hparams=hparams)
      self._start = _Start(fields, prepared)
    return self._start

  def prepared_final(self, chosen: trials.Point) -> Prepared:
    """Returns data, weights and program of the final runs; the latest is kept."""
    compiled = {n: value for n, value in chosen.items() if n not in ("lr", "wd")}
    if self._final is None or self._final[0] != compiled:
      config = self._final_config(chosen)
      self._final = compiled, prepare(config, like=self.prepared)
    return self._final[1]

  def _final_config(self, chosen: trials.Point, **changes: Any) -> ConfigDict:
    return trials.at(self.config, **chosen, train_split=self.final_split, **changes)

  @functools.cached_property
  def _flops(self) -> tuple[int, int]:
    """FLOPs by image; see `flops_of`."""
    point = self.points[0]
    # Of the program that runs first, which is traced for it.
    if self.has_trials or self.percents:
      config, prepared = trials.at(self.config, **point), self.prepared
    else:
      config, prepared = self._final_config(point), self.prepared_final(point)
    num_train = len(prepared.data.splits[config.data.train_split])
    return flops_of(config, prepared.program, num_train)

  def work(self, sizes: Sizes | None = None) -> Work:
    """Returns what there is to do.

    Args:
      sizes: of the splits of another task; None for those of this one.
    """
    data = self.prepared.data
    grid = {n: len({repr(p[n]) for p in self.points}) for n in self.names}
    return work_of(
      trials.at(self.config, **self.points[0]),
      sizes or Sizes.of(data, self.config.data.train_split),
      self._flops,
      num_trials=self.has_trials * len(self.points) + pruning.num_trials(self),
      num_finals=len(self.seeds),
      num_programs=len({repr(trials.fields_of(point)) for point in self.points}),
      grid=" x ".join(
        f"{number} {name}" for name, number in grid.items() if number > 1
      ),
    )

  def left(self, workdir: Path) -> tuple[int, int]:
    """Returns how many (trials, final runs) a row's workdir does not have yet."""
    finished = self._stored(workdir) if self.has_trials else []
    num_trials = len(self._missing(finished)) if self.has_trials else 0
    num_finals = len(self.seeds)
    if num_trials:
      return num_trials + pruning.num_trials(self), num_finals
    chosen = trials.choose(finished, self.names) if finished else self.points[0]
    if self.percents:
      num_trials, masks = pruning.left(self, chosen, workdir)
      if num_trials:
        return num_trials, num_finals
      chosen = {**chosen, **masks}
    prepared = self.prepared_final(chosen)
    for seed in self.seeds:
      config = self._final_config(chosen, seed=seed)
      is_there = _finished_result(config, workdir / f"seed{seed}", prepared)
      num_finals -= is_there is not None
    return 0, num_finals

  def missing(self, workdir: Path) -> list[trials.Point]:
    """Returns the points whose trials a row's workdir does not have yet."""
    return self._missing(self._stored(workdir))

  def finished(self, workdir: Path) -> list[Mapping[str, Any]]:
    """Returns the trials of all points, in their order, where none is missing."""
    stored = self._stored(workdir)
    return [trials.find(stored, point) for point in self.points]

  def measure(self, label: str, num_steps: int, workdir: Path) -> Pace | None:
    """Returns how long the first steps take; see `outlook.time_steps`.

    Args:
      label: of the row.
      num_steps: that are measured.
      workdir: of the row.

    Returns:
      None where the device's memory does not hold so many trials.
    """
    missing = self.missing(workdir) if self.has_trials else []
    times, cached, size = [], {}, 1

    def time(configs: Sequence[ConfigDict], prepared: Prepared, params: Any) -> None:
      split = configs[0].data.train_split
      times.append(time_steps(configs, prepared, params, num_steps))
      if times[-1].feature:
        cached[split] = len(prepared.data.splits[split])

    try:
      if missing:
        _, group = next(itertools.groupby(missing, trials.fields_of))
        configs = [trials.at(self.config, **point) for point in group]
        origin = self._start_of(missing[0])
        size, params = origin.size(configs), origin.params(configs[0])
        time(configs[:size], origin.prepared_for(size), params)
      if size > 1 or not missing:
        # A final run is alone.
        point = self.points[0]
        config = self._final_config(point, seed=self.seeds[0])
        prepared = self.prepared_final(point)
        params = prepared.prepare_params(config, prepared.first_params(config))
        time([config], prepared, params)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      return None
    num_cached = sum(cached.values())
    return Pace(label, times[0], times[-1], size, len(times), num_cached)

  def run(self, workdir: Path, row: Row) -> dict[str, Any]:
    """Returns the summary of the row: the choice, and its test accuracies.

    Args:
      workdir: of the row.
      row: is told how far the runs are.
    """
    self._check_same_images(workdir)
    finished = self.search(workdir, row) if self.has_trials else []
    chosen = self.points[0]
    if self.has_trials:
      chosen = trials.choose(finished, self.names)
    best = trials.find(finished, chosen) or {}
    if self.percents:
      masks, pruned = pruning.prune(self, chosen, workdir, row)
      chosen, best = {**chosen, **masks}, pruned
    results = self.retrain(chosen, workdir, row)
    metric = self.prepared.program.objective.METRIC
    columns = (*self.names, f"val_{metric}")
    return {
      **_of_runs(results),
      **chosen,
      "metric": metric,
      f"val_{metric}": best.get(f"val_{metric}"),
      "searched": list(self.names) if self.has_choice else [],
      "trials": [{name: trial[name] for name in columns} for trial in finished],
      **({"pruning": best["pruning"]} if self.percents else {}),
    }

  def _check_same_images(self, workdir: Path) -> None:
    """Refuses the workdir of other images before trials take their time."""
    final = trials.at(self.config, train_split=self.final_split)
    for seed in self.seeds:
      where = workdir / f"seed{seed}"
      stored = stored_digest(where)
      # Only then the test split is looked at, and no more than its digest.
      if stored and stored != report.data_digest(final, self.prepared.data):
        raise ValueError(
          f"{where} holds a run of other images: they or their labels have changed. "
          "Use another workdir, or delete this one to start over."
        )

  def search(self, workdir: Path, row: Row) -> list[Mapping[str, Any]]:
    """Returns the finished trials of all points, in their order."""
    path, finished = workdir / trials.FILE, self._stored(workdir)
    for trial in finished:
      self._show(trial, workdir)
    missing = self._missing(finished)
    row.keep(trials=len(self.points) - len(missing))
    if missing:
      with trainer.hold_workdir(workdir / "search"):
        for _, group in itertools.groupby(missing, trials.fields_of):
          for trial in self._run_trials(list(group), workdir / "search", row):
            # As it will be read: pairs become lists.
            trial = json.loads(json.dumps({**trial, "settings": self._settings}))
            trials.append(path, trial)
            finished.append(trial)
            self._show(trial, workdir)
    return [trials.find(finished, point) for point in self.points]

  @functools.cached_property
  def _settings(self) -> str:
    """The digest that the row's trials have in common."""
    data_sha256 = report.data_digest(self.config, self.prepared.data, test=False)
    return trials.settings(self.config, self.names, self.prepared.backbone, data_sha256)

  def _stored(self, workdir: Path) -> list[dict[str, Any]]:
    """Returns the trials that the row's workdir has."""
    return trials.read(workdir / trials.FILE, self._settings)

  def _missing(self, finished: Sequence[Mapping[str, Any]]) -> list[trials.Point]:
    """Returns the points that have not been tried."""
    return [point for point in self.points if trials.find(finished, point) is None]

  def _show(self, trial: Mapping[str, Any], workdir: Path) -> None:
    """Shows a finished trial in TensorBoard, if there are files for it."""
    if self.config.tensorboard and all(name in trial for name in self.names):
      point = {name: trial[name] for name in self.names}
      trials.show(workdir / "search" / "hparams", self.config.method, point, trial)

  def _run_trials(
    self, points: list[trials.Point], workdir: Path, row: Row
  ) -> Iterator[dict[str, Any]]:
    """Yields the trials of points of equal fields, population by population."""
    origin, start = self._start_of(points[0]), 0
    prepared = origin.prepared
    configs = [trials.at(self.config, **point) for point in points]
    size, config = origin.size(configs), configs[0]
    params = origin.params(config)
    plural = "" if len(points) == 1 else "s"
    name = f"{prepared.data.name} {config.method}, {len(points)} trial{plural}"
    while start < len(points):
      title = f"{name}, {size} at a time" if size > 1 else name
      # One compiled step for all populations: the last one is filled up.
      members = (configs[start : start + size] + configs[-1:] * size)[:size]
      chunk = points[start : start + size]
      try:
        with row.trials(len(chunk)) as whole:
          outcomes = train_trials(
            members, origin.prepared_for(size), params, workdir, title, whole
          )
      except jax.errors.JaxRuntimeError as error:
        if size == 1 or "RESOURCE_EXHAUSTED" not in str(error):
          raise
        size //= 2
        print_once(f"{title}: too many for the device's memory; now {size} at a time")
        continue
      for point, outcome in zip(chunk, outcomes, strict=False):
        value = outcome[trials.val_key(outcome)]
        text = outcome["diverged"] or f"val {100 * value:.2f}%"
        print_once(f"{trials.point_text(point)}: {text}")
        yield {**point, "seed": config.seed, **outcome, "together": size}
      start += size
    origin.free()

  def retrain(
    self, chosen: trials.Point, workdir: Path, row: Row
  ) -> list[dict[str, Any]]:
    """Returns the results of the final runs, one per seed."""
    prepared, results = self.prepared_final(chosen), []
    # Its program is not needed when the other rows train.
    self._final = None
    for seed in self.seeds:
      config, where = self._final_config(chosen, seed=seed), workdir / f"seed{seed}"
      result = _finished_result(config, where, prepared)
      if result is None:
        with row.final() as whole:
          result = trainer.train(config, where, prepared=prepared, whole=whole)
      else:
        row.keep(finals=1)
      print_once(f"seed {seed}: {report.result_line(result)}")
      results.append(result)
    return results


def _of_runs(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns what a method's summary says of its final runs.

  Args:
    results: of the runs, one per seed.
  """
  # A task without a test split has no numbers: its models are all there is.
  key = report.metric_keys(results[0])[1]
  values = [r[key] for r in results if r[key] is not None]
  rates = [r["images_per_second"] for r in results if r["images_per_second"]]
  return {
    "mean": statistics.mean(values) if values else None,
    "std": statistics.stdev(values) if len(values) > 1 else None,
    **_means_by_class(results),
    "group_means": _group_means(results),
    tables.values_key(objectives.metric_of(results[0])): values,
    "seeds": [result["seed"] for result in results],
    "trainable_params": results[0]["trainable_params"],
    "prompter_params": results[0]["prompter_params"],
    "train_seconds": statistics.mean(r["train_seconds"] for r in results),
    "images_per_second": statistics.mean(rates) if rates else None,
  }


def _means_by_class(results: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
  """Returns the mean balanced accuracy, macro-F1 and quadratic kappa of the runs.

  The first two are None where the test classes are of one size, the third where they
  are no grades. Runs of before have the first alone.
  """
  by_class = [result.get("test_by_class") or {} for result in results]
  unequal = all(each.get("imbalance", 0) > evaluate.UNBALANCED for each in by_class)

  def mean(name: str, is_told: bool = True) -> float | None:
    values = [each.get(name) for each in by_class]
    return None if None in values or not is_told else statistics.mean(values)

  return {
    "balanced_mean": mean("balanced_accuracy", unequal),
    "macro_f1_mean": mean("macro_f1", unequal),
    "kappa_mean": mean("quadratic_kappa"),
  }


def _group_means(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Returns the mean accuracy of classes with many, medium and few training images."""
  # All runs are trained on the same images. Those of before have no groups.
  groups = [(result.get("test_by_class") or {}).get("groups", {}) for result in results]
  return {
    name: statistics.mean(each[name]["accuracy"] for each in groups)
    for name in groups[0]
    if all(name in each for each in groups)
  }


def train_trials(
  configs: Sequence[ConfigDict],
  prepared: Prepared,
  params: Mapping[str, Any],
  workdir: Path,
  name: str,
  whole: Whole | None = None,
) -> list[dict[str, Any]]:
  """Trains trials on train and evaluates them on val; never looks at test.

  They leave nothing but what is returned: interrupted, they start again.

  Args:
    configs: of the trials; alike but for lr, wd and the program's hparams. A single
      one is trained by itself, several as a population.
    prepared: for any of them; with a stacked program for several.
    params: that all start from.
    workdir: gets metrics.jsonl, the progress of these trials.
    name: for the progress line.
    whole: how far the search is.

  Returns:
    For each, the `metric`, its value on val in [0, 1] (`val_accuracy`), and `val_loss`
    in nats, None where that is not computed, of the last epoch; `diverged`: None, or
    what went wrong in place of these; and its share of the time.
  """
  config = configs[0].copy_and_resolve_references()
  # The choice is the last epoch's; nothing before it counts.
  config.eval_every_epochs = config.checkpoint_every_epochs = 0.0
  config.profile = ""
  program, num_members = prepared.program, len(configs)
  metric = program.objective.METRIC
  if num_members == 1:
    state = create_state(config, program, params)
  else:
    state = population.stack_state(configs, program, params)
  timer = Timer()
  with Writers(
    workdir,
    total_steps=program.total_steps,
    tensorboard=False,
    name=name,
    whole=whole,
  ) as writers:
    diverged: dict[int, str] = {}
    val: dict[str, Any] = {}
    try:
      state = trainer.train_loop(
        config,
        prepared,
        state,
        workdir=workdir,
        writers=writers,
        stop=StopSignal(),
        timer=timer,
        diverged=diverged,
      )
      val = prepared.evaluate(config, "val", state)
    except trainer.Diverged:
      pass

  def outcome(member: int) -> dict[str, Any]:
    is_finite = member not in diverged
    return {
      "metric": metric,
      f"val_{metric}": _of_member(val[metric], member) if is_finite else None,
      "val_loss": _of_member(val["loss"], member)
      if is_finite and "loss" in val
      else None,
      "diverged": diverged.get(member),
      "train_seconds": timer.seconds / num_members,
      "images_per_second": timer.images_per_second,
    }

  return [outcome(member) for member in range(num_members)]


def stored_digest(workdir: Path) -> str | None:
  """Returns the digest of the data of a workdir's run; None where there is none."""
  try:
    return read_meta(find_steps(workdir)[0]).get("data_sha256")
  except (FileNotFoundError, Damaged):
    return None  # Resuming says what is damaged.


def _of_member(values: Any, member: int) -> float:
  return float(np.atleast_1d(values)[member])


def _finished_result(
  config: ConfigDict, workdir: Path, prepared: Prepared
) -> dict[str, Any] | None:
  """Returns the result if the same run has already finished in `workdir`."""
  result_file, config_file = workdir / "result.json", workdir / "config.json"
  if not (result_file.exists() and config_file.exists()):
    return None
  try:
    result, stored = map(load_json, (result_file, config_file))
    backbone = result["backbone"].items()
    # All that will be read of it.
    report.result_line(result)
    _of_runs([result])
  except (Damaged, LookupError, AttributeError, TypeError, ValueError):
    return None  # The checkpoints are what counts: the run is finished again.
  # Random weights have a seed beside what is prepared; the config compares it.
  is_same = prepared.backbone.items() <= backbone
  digest = report.data_digest(config, prepared.data)
  is_same &= result.get("data_sha256") == digest
  # A run that is being prolonged has the new config already, and the old result.
  total_steps = prepared.program.total_steps
  is_same &= result.get("steps", total_steps) == total_steps
  return result if is_same and not config_lib.difference(config, stored) else None

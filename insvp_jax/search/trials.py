"""The trials of a search: which there are, where they are kept, which is chosen.

A trial is a point of a grid: {"lr": ..., "wd": ..., further hparams of the method}, and
fields of methods by "<method>.<field>", which make another program of it.
Each finished one is a line of `trials.jsonl`, on disk before the next begins, and a row
of TensorBoard's tab HPARAMS.
"""

from collections.abc import Mapping, Sequence
import contextlib
import hashlib
import itertools
import json
import os
from pathlib import Path
import re
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from insvp_jax import config as config_lib
from insvp_jax import files, trees
from insvp_jax.config_variants import variants_of
from insvp_jax.distributed import processes
from insvp_jax.logs.tensorboard import EventFile
from insvp_jax.methods import hparams_of, parts_of
from insvp_jax.search.grids import GRIDS, Grid
from insvp_jax.train import objectives

FILE = "trials.jsonl"
# None where the loss diverged.
_NUMBER = float | int | None
Point = dict[str, Any]


def check_keys(config: ConfigDict) -> None:
  """Checks that each further hparam or field belongs to one of the methods.

  Raises:
    ValueError: it does not; the message has the nearest that does.
  """
  # A dict keeps the order, and each name once.
  methods = dict.fromkeys(variant.method for variant in variants_of(config))
  known = {name: None for method in methods for name in hparams_of(method)}
  for key, values in config.tune.grid.items():
    if values and key not in known:
      names = f"Known: {', '.join(known)}." if known else "There are none."
      raise ValueError(
        f"config.tune.grid.{key} is no hparam of {', '.join(methods)}."
        f"{trees.did_you_mean(key, known)} {names}"
      )
  searched = {part for method in methods for part in parts_of(method)}
  for name, _ in config.tune.fields:
    if name.partition(".")[0] not in searched:
      raise ValueError(
        f"config.tune.fields has {name}, but the search is over {', '.join(methods)}; "
        "add a row of the method, e.g. to config.tune.methods, or leave its field out."
      )


def fields_of(point: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what of a point is a field of a method: {"<method>.<field>": value}."""
  return {name: value for name, value in point.items() if "." in name}


def hparams_of_point(point: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns the names of a point's hparams beside lr and wd, which are data."""
  return tuple(n for n in point if n not in ("lr", "wd") and "." not in n)


def grid_of(config: ConfigDict, default: bool) -> dict[str, tuple]:
  """Returns the values of each hparam in the search of `config.method`.

  Args:
    config: the whole configuration.
    default: whether an empty `tune.lr` stands for the method's own grid.

  Raises:
    ValueError: `default`, but the grid is empty and the method has none.
  """
  tune, method = config.tune, config.method
  names = hparams_of(method)
  hparams = {k: v for k, v in tune.grid.items() if v and k in names}
  fields = {
    name: tuple(values)
    for name, values in tune.fields
    if name.partition(".")[0] in parts_of(method)
  }
  grid = published_grid(config) if default and not tune.lr else None
  if default and not (tune.lr or tune.wd or hparams or fields or grid):
    raise ValueError(
      f"the grid is empty: config.tune.lr is (), and the method {method!r} has no grid "
      f"of its own for the optimizer {config.optim.name!r}. Give one, e.g. "
      '--config.tune.lr="(0.001, 0.01)".'
    )
  lr, wd = (grid.lr, grid.wd) if grid else ((config.optim.lr,), (config.optim.wd,))
  return {
    **fields,
    "wd": tuple(map(float, tune.wd or wd)),
    "lr": tuple(map(float, tune.lr or lr)),
    **hparams,
  }


def published_grid(config: ConfigDict) -> Grid | None:
  """Returns the method's own grid for the optimizer; of several, the first's."""
  return GRIDS.get((parts_of(config.method)[0], config.optim.name))


def scaled(config: ConfigDict, default: bool) -> ConfigDict:
  """Returns the config with what the method's own grid says of its lr, if used."""
  grid = published_grid(config)
  if default and not config.tune.lr and grid:
    config = config.copy_and_resolve_references()
    config.optim.lr_scale_by_batch = grid.lr_scale_by_batch
    config.optim.head_lr = config.optim.head_lr or grid.head_lr
  return config


def points(grid: Mapping[str, tuple]) -> list[Point]:
  """Returns all points of a grid; the lr varies before the wd, fields last."""
  hparams = [name for name in grid if name not in ("lr", "wd")]
  # The last factor of a product varies first.
  names = (*hparams, *(name for name in grid if name in ("lr", "wd")))
  product = itertools.product(*(grid[name] for name in names))
  combinations = (dict(zip(names, values, strict=True)) for values in product)
  order = ("lr", "wd", *hparams)
  return [{name: point[name] for name in order} for point in combinations]


def at(config: ConfigDict, **changes: Any) -> ConfigDict:
  """Returns a copy: other method, seed, batch_size, train_split, a point's hparams."""
  copy = config.copy_and_resolve_references()
  copy.method = changes.pop("method", copy.method)
  sections = {
    "lr": copy.optim,
    "wd": copy.optim,
    "train_split": copy.data,
    "seed": copy,
    "batch_size": copy,
  }
  for key, value in changes.items():
    value = tuple(value) if isinstance(value, list) else value
    if "." in key:
      method, _, field = key.partition(".")
      copy[method][field] = value
      continue
    methods = [part for part in parts_of(copy.method) if key in copy.get(part, {})]
    # Of several methods a field of that name is set for each.
    for section in [sections[key]] if key in sections else [copy[m] for m in methods]:
      section[key] = value
  return copy


def point_text(point: Mapping[str, Any]) -> str:
  """Returns "lr 0.01, wd 0.0001, dropout 0.1"."""

  def text(value: Any) -> str:
    is_number = isinstance(value, float | int) and not isinstance(value, bool)
    return f"{value:g}" if is_number else str(_plain(value))

  return ", ".join(f"{name} {text(value)}" for name, value in point.items())


def _plain(value: Any) -> Any:
  """Returns a number or a text as it is, of other values a text."""
  if isinstance(value, tuple | list) and np.size(value) > 2:  # a mask
    return f"{np.sum(value)} of {np.size(value)}"
  return value if isinstance(value, float | int | str) else str(value)


def show(folder: Path, method: str, point: Point, trial: Mapping[str, Any]) -> None:
  """Shows a finished trial in TensorBoard's tab HPARAMS; the first process writes.

  Args:
    folder: of the trials, which each get a folder there.
    method: of the row.
    point: of the trial.
    trial: what `read` returned.
  """
  if not processes.is_main_process():
    return
  # Texts alone may be alike: of masks they say how much is left.
  identity = json.dumps([point, trial["settings"]], sort_keys=True)
  suffix = hashlib.sha256(identity.encode()).hexdigest()[:8]
  # Values may be texts, such as paths.
  text = re.sub(r"[^\w.,+-]", " ", point_text(point))[:80]
  where = folder / f"{text} {suffix}"
  if where.exists():
    return
  names = ("val_accuracy", "val_loss")
  metrics = {name: trial[name] for name in names if trial.get(name) is not None}
  hparams = {"method": method} | {name: _plain(x) for name, x in point.items()}
  where.mkdir(parents=True)
  with contextlib.closing(EventFile(where)) as events:
    events.trial(hparams, metrics, failed=not metrics)


def settings(
  config: ConfigDict,
  names: Sequence[str],
  backbone: Mapping[str, Any],
  data_sha256: str,
) -> str:
  """Returns a digest of all that shapes the trials but for their points.

  Args:
    config: of any of the trials.
    names: of the points' hparams.
    backbone: its identity.
    data_sha256: of the splits that trials read.
  """
  varied = {"lr": "optim/lr", "wd": "optim/wd"}
  parts = parts_of(config.method)
  skipped = {varied.get(name, f"{part}/{name}") for name in names for part in parts}
  skipped |= {name.replace(".", "/") for name in names if "." in name}
  others = set(config_lib.method_sections()) - set(parts)
  shaping = {
    name: value
    for name, value in trees.flatten(config_lib.to_dict(config)).items()
    if name not in skipped
    and name.split("/")[0] not in others
    and not re.fullmatch(config_lib.MAY_CHANGE, name)
  }
  text = json.dumps([shaping, dict(backbone), data_sha256], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def read(path: Path, digest: str) -> list[dict[str, Any]]:
  """Returns the trials of a file that were made with the same `settings`.

  Raises:
    OSError: the file cannot be read.
    ValueError: it is no regular file.
  """
  trials = []
  for line in files.read_bytes(path).split(b"\n") if path.exists() else ():
    # A killed process may have left half a line.
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
      trial = files.parse_json(line)
      key = val_key(trial)
      is_whole = key in trial or "scores" in trial
      is_number = isinstance(trial.get(key), _NUMBER)
      if trial["settings"] == digest and is_whole and is_number:
        trials.append(trial)
  return trials


def val_key(trial: Mapping[str, Any]) -> str:
  """Returns under which key a trial, or a row, has the metric on val that chooses."""
  return f"val_{objectives.metric_of(trial)}"


def find(trials: Sequence[Mapping[str, Any]], point: Point) -> Mapping[str, Any] | None:
  """Returns the finished trial of a point, or None."""
  # As it was written: pairs are lists in JSON.
  point = json.loads(json.dumps(point))
  for trial in trials:
    if all(name in trial and trial[name] == value for name, value in point.items()):
      return trial
  return None


def append(path: Path, trial: Mapping[str, Any]) -> None:
  """Adds a line to a file, on disk when this returns; the first process writes.

  Raises:
    OSError: the disk is full or read-only.
    ValueError: the file is a link to elsewhere.
  """
  if not processes.is_main_process():
    return
  line = json.dumps(trial, allow_nan=False).encode() + b"\n"
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.check_writable_in_place(path)
    with path.open("ab+", buffering=0) as file:
      file.seek(0)
      # Half a line of a killed process would spoil this one.
      complete_size = file.read().rfind(b"\n") + 1
      file.truncate(complete_size)
      file.write(line)
      os.fsync(file.fileno())
  except OSError as error:
    raise OSError(f"{path} could not be written: {error.strerror}.") from error


def choose(
  trials: Sequence[Mapping[str, Any]], names: Sequence[str] = ("lr", "wd")
) -> Point:
  """Returns the point that is best on val; ties go to the smaller lr, then wd.

  Args:
    trials: points with their `val_key`, which is None where the loss diverged.
    names: of the points' hparams, in the order in which ties are broken.

  Raises:
    ValueError: all of them diverged.
  """
  finished = [trial for trial in trials if trial[val_key(trial)] is not None]
  if not finished:
    raise ValueError("every run of the search diverged; lower config.tune.lr.")
  best = min(finished, key=lambda t: (-t[val_key(t)], *(t[name] for name in names)))
  return {name: best[name] for name in names}

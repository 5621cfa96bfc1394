"""The finished runs below some folders, and which of them are one thing with seeds.

A run is a folder with a `result.json`. One below a search (`summary.json` beside the
row's folder) has the row's label, and the search says what was chosen on val. What a
summary says of accuracies is not read: the runs say it themselves.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
import dataclasses
import functools
import itertools
import json
import os
from pathlib import Path
import re
from typing import Any

from insvp_jax import config as config_lib
from insvp_jax import trees
from insvp_jax.checkpoints import files as checkpoint_files
from insvp_jax.checkpoints.files import Damaged, load_json
from insvp_jax.config_variants import Variant
from insvp_jax.errors import printable
from insvp_jax.methods import METHODS, fields
from insvp_jax.tools.run_files import RESULT_FILE, SUMMARY_FILE
from insvp_jax.train import objectives

# What of a config is no setting of a run: its seed, what names it elsewhere, and what
# changes how fast it is or the last bits at most.
_NO_SETTING = (
  r"task|method|seed|backbone/(name|scan|fused_attention|skip_unread)|cache_features|"
  rf"steps_per_call|data/(resident_mb|skip_corrupt|duplicates)|{config_lib.MAY_CHANGE}"
)
_NUMBER = (int, float)
# What a result.json has to have, and of which types.
_FORM: dict[str, Any] = {
  "task": str,
  "method": str,
  "seed": int,
  "num_test_examples": int,
  "trainable_params": int,
  "total_params": int,
  "backbone": dict,
}


class _Unfit(ValueError):
  """A run that cannot stand in a table."""


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished run.

  Attributes:
    path: its folder.
    task: its name.
    method: its name; several are joined by +.
    label: of its row in a search; else the method.
    seed: of the run.
    metric: what it is judged by, as keys name it: "accuracy", "miou".
    accuracy: on test, in [0, 1]; of another metric that.
    num_train: training images; None where the run is too old to say.
    num_test: test images.
    trainable_params: with the head.
    backbone_params: None where the run is too old to say.
    backbone: id of the weights.
    selection: how lr and the like came about.
    own: what of `settings` is the method's own and was not chosen on val; the share of
      the training images; the backbone.
    settings: all that shapes the result, but for task and seed.
  """

  path: Path
  task: str
  method: str
  label: str
  seed: int
  metric: str
  accuracy: float
  num_train: int | None
  num_test: int
  trainable_params: int
  backbone_params: int | None
  backbone: str
  selection: str
  own: Mapping[str, Any]
  settings: Mapping[str, Any]

  def value_of(self, field: str) -> Any:
    """Returns the value of a field of its method; the default where it is not set."""
    return self.settings.get(f"{self.method}.{field}", self.default_of(field))

  def default_of(self, field: str) -> Any:
    """Returns the default of a field of its method; None where it depends."""
    declared = fields.declared(METHODS[self.method]) if self.method in METHODS else {}
    return declared[field].default if field in declared else None


@dataclasses.dataclass(frozen=True)
class LeftOut:
  """What is in no table, and why."""

  path: Path
  reason: str


@dataclasses.dataclass(frozen=True)
class Row:
  """Runs of one method and setting: a row of tables.

  Attributes:
    label: its name.
    method: of all its runs.
    runs: by task; those of a task differ in the seed alone.
  """

  label: str
  method: str
  runs: Mapping[str, tuple[Run, ...]]


def find(paths: Iterable[str | os.PathLike]) -> tuple[list[Run], list[LeftOut]]:
  """Returns the finished runs below folders, and what else looks like runs there.

  Args:
    paths: of runs, searches, groups of tasks, or folders of these at any depth.

  Raises:
    FileNotFoundError: a path does not exist.
    ValueError: there is no run below a path.
  """
  runs, left_out = {}, {}
  # A search is read once, and not for each of its runs.
  rows_of_search = functools.cache(_rows_of_search)
  for path in map(Path, paths):
    if not path.exists():
      raise FileNotFoundError(f"there is no run or folder of runs {path}.")
    folders, searches = _folders(path)
    if not folders and not searches:
      raise ValueError(
        f"there is no {RESULT_FILE} in {path} or below it, expected the workdir of a "
        "run, of a search or of a group of tasks, or a folder of these."
      )
    for folder in folders:
      real = folder.resolve()
      if real in runs or real in left_out:  # a path within another one
        continue
      try:
        runs[real] = _read(folder, rows_of_search)
      except (_Unfit, Damaged) as error:
        left_out[real] = LeftOut(folder, str(error).replace(f"{folder}{os.sep}", ""))
    for search in searches:
      for name, _, _ in rows_of_search(search.absolute()):
        if not any((search / name).glob(f"*/{RESULT_FILE}")):
          reason = f"{SUMMARY_FILE} has a result of it, but its runs are not there"
          left_out[(search / name).resolve()] = LeftOut(search / name, reason)
  return list(runs.values()), list(left_out.values())


def _folders(path: Path) -> tuple[list[Path], list[Path]]:
  """Returns the folders of runs, finished or begun, and those of searches."""
  if path.is_file():
    return [path.parent] if path.name == RESULT_FILE else [], []
  runs, searches = [], []
  for name, folders, names in os.walk(path):
    is_begun = "config.json" in names and checkpoint_files.FOLDER in folders
    if RESULT_FILE in names or is_begun:
      runs.append(Path(name))
    if SUMMARY_FILE in names:
      searches.append(Path(name))
    folders[:] = sorted(
      f for f in folders if f != checkpoint_files.FOLDER and not f.startswith(".")
    )
  return runs, searches


# (folder's name, label, what the summary says) of a search's row.
_SearchRow = tuple[str, str, Mapping[str, Any]]


def _rows_of_search(search: Path) -> list[_SearchRow]:
  """Returns the rows of a search by its folder; none where it is no search."""
  rows: Mapping[str, Any] = {}
  # A search that was killed in the midst of its first row has no summary yet.
  with contextlib.suppress(Damaged):
    rows = load_json(search / SUMMARY_FILE) if (search / SUMMARY_FILE).exists() else {}
  return [
    (Variant(label, str(row.get("method", label))).folder, label, row)
    for label, row in rows.items()
    if isinstance(row, dict)
  ]


def _read(folder: Path, rows_of_search: Callable[[Path], Sequence[_SearchRow]]) -> Run:
  """Returns the run of a folder.

  Args:
    folder: its workdir.
    rows_of_search: `_rows_of_search`.

  Raises:
    _Unfit, Damaged: it cannot stand in a table; the message says why.
  """
  if not (folder / RESULT_FILE).exists():
    raise _Unfit("it has not ended: no result.json yet")
  result = load_json(folder / RESULT_FILE)
  for key, kind in _FORM.items():
    if not _is(result.get(key), kind):
      value = checkpoint_files.short(result.get(key))
      raise _Unfit(f"its {RESULT_FILE} has {key} = {value}, expected {kind.__name__}")
  metric = printable(str(objectives.metric_of(result)))
  accuracy = result.get(f"test_{metric}")
  if accuracy is None:
    raise _Unfit("it was not evaluated on a test split")
  if not _is(accuracy, _NUMBER) or not 0 <= accuracy <= 1:
    value = checkpoint_files.short(accuracy)
    raise _Unfit(f"its test_{metric} is {value}, expected a number in [0, 1]")
  backbone = {k: str(v) for k, v in result["backbone"].items()}
  folder_of_search = folder.absolute().parent.parent
  label, searched, selection = _search_of(
    folder, result["method"], rows_of_search(folder_of_search)
  )
  settings = _settings(folder, result)
  own = {
    name: value
    for name, value in settings.items()
    if _is_own(name, result["method"], searched)
  }
  identity = backbone.get("id", "unknown")
  own["backbone"] = identity
  num_train = _num_train(folder, result)
  settings |= {
    "selection": selection,
    "training images": num_train,
    "test images": result["num_test_examples"],
    "backbone": identity,
    # Random ones differ from seed to seed.
    "weights": "" if identity == "random" else backbone.get("sha256", ""),
    "data": str(result.get("data_sha256", "")),
  }
  backbone_params = result.get("backbone_params")
  return Run(
    path=folder,
    task=printable(result["task"]),
    method=printable(result["method"]),
    label=printable(label),
    seed=result["seed"],
    metric=metric,
    accuracy=float(accuracy),
    num_train=num_train,
    num_test=result["num_test_examples"],
    trainable_params=result["trainable_params"],
    backbone_params=backbone_params if _is(backbone_params, int) else None,
    backbone=printable(identity),
    selection=selection,
    own=own,
    settings=settings,
  )


def _is(value: Any, kind: Any) -> bool:
  """Returns whether a value of JSON has a type; true and false are no numbers."""
  return isinstance(value, kind) and not isinstance(value, bool)


def _search_of(
  folder: Path, method: str, rows: Sequence[_SearchRow]
) -> tuple[str, tuple[str, ...], str]:
  """Returns (label, names of what was chosen on val, how) of a run's search.

  Args:
    folder: of the run.
    method: of the run.
    rows: of the search that may be two folders above it.
  """
  alone = "hyper-parameters as given"
  for name, label, row in rows:
    if name != folder.absolute().parent.name:
      continue
    searched, trials = row.get("searched"), row.get("trials")
    if not (searched and _is(searched, list) and _is(trials, list)):
      return label, (), alone
    names = tuple(map(str, searched))
    how = f"{', '.join(names)} chosen on val among {len(trials)} trials"
    return label, names, how
  return method, (), alone


def _settings(folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what shapes a run but its data and backbone: {"optim.lr": 0.1}."""
  parts = result["method"].split("+")
  flat = dict[str, Any]()
  with contextlib.suppress(Damaged):
    flat = trees.flatten(load_json(folder / "config.json"))
  if not flat:
    # Somebody kept the result alone. It says the most of it.
    names = {"lr": "optim/lr", "wd": "optim/wd", "preset": "data/preset"}
    names |= {"steps": "total_steps", "train_split": "data/train_split"}
    flat = {new: result[name] for name, new in names.items() if name in result}
    kwargs = result.get("method_kwargs")
    sections = kwargs if len(parts) > 1 else {parts[0]: kwargs}
    for part, values in sections.items() if _is(sections, dict) else ():
      if _is(values, dict):
        flat |= {f"{part}/{name}": value for name, value in values.items()}
  others = set(config_lib.method_sections()) - set(parts)
  return {
    name.replace("/", "."): value
    for name, value in flat.items()
    if value is not None
    and name.split("/")[0] not in others
    and not re.fullmatch(_NO_SETTING, name)
  }


def _is_own(name: str, method: str, searched: Sequence[str]) -> bool:
  """Returns whether a setting makes a row, and does not vary from task to task."""
  section, _, field = name.partition(".")
  if section not in method.split("+"):
    return name in ("data.shots", "data.fraction")
  masks = METHODS[section].MASKS if section in METHODS else ()
  return not {name, field} & set(searched) and field not in masks


def _num_train(folder: Path, result: Mapping[str, Any]) -> int | None:
  """Returns the number of training images; of older runs from their checkpoint."""
  if _is(number := result.get("num_train_examples"), int):
    return number
  with contextlib.suppress(FileNotFoundError, Damaged):
    meta = checkpoint_files.read_meta(checkpoint_files.find_steps(folder)[0])
    return sum(meta["train_count"]) if "train_count" in meta else None
  return None


# --- Rows.


def rows_of(runs: Sequence[Run]) -> tuple[list[Row], list[LeftOut]]:
  """Returns the runs as rows, and those that are there twice.

  Runs of one task become one cell only if nothing but the seed tells them apart. Where
  it does, or where a method's own fields differ, there are several rows, and their
  labels say in what they differ.

  Args:
    runs: of any tasks.
  """
  groups: dict[tuple[str, str], list[Run]] = {}
  for run in runs:
    groups.setdefault((run.label, run.method), []).append(run)
  labels = [label for label, _ in groups]
  rows, left_out = [], []
  for (label, method), group in groups.items():
    if labels.count(label) > 1:
      label = f"{label} ({method})"
    named: dict[str, list[Run]] = {}
    keys = _differing(group)
    for run in group:
      texts = [_text(key, run.settings.get(key)) for key in keys]
      name = f"{label}: {', '.join(texts)}" if texts else label
      named.setdefault(name, []).append(run)
    for name, members in named.items():
      cells: dict[str, dict[int, Run]] = {}
      for run in members:
        cell = cells.setdefault(run.task, {})
        first = cell.setdefault(run.seed, run)
        if first is not run:
          reason = f"it is the same run as {first.path}"
          if first.accuracy != run.accuracy:
            reason = f"it has settings and seed of {first.path}, but another result"
          left_out.append(LeftOut(run.path, reason))
      by_task = {
        task: tuple(cell[seed] for seed in sorted(cell)) for task, cell in cells.items()
      }
      rows.append(Row(name, method, by_task))
  return rows, left_out


# What follows from other settings, and says less to a reader.
_LAST = ("training images", "test images", "weights", "data")


def _differing(runs: Sequence[Run]) -> list[str]:
  """Returns keys of settings that tell all apart that must not be one row."""
  # One of each: seeds are many, and differ in nothing.
  unique = list({_comparable([r.task, r.own, r.settings]): r for r in runs}.values())
  apart = []
  for a, b in itertools.combinations(unique, 2):
    sides = (a.settings, b.settings) if a.task == b.task else (a.own, b.own)
    if keys := _differing_keys(*sides):
      apart.append(keys)
  needed: list[str] = []
  # As few as can be found simply: one that tells most apart, and so on.
  while apart:
    counts = Counter(key for keys in apart for key in keys)
    key = max(counts, key=lambda key: (key not in _LAST, counts[key]))
    needed.append(key)
    apart = [keys for keys in apart if key not in keys]
  return needed


def _differing_keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
  """Returns the keys under which two mappings have not the same."""
  keys = dict.fromkeys((*a, *b))
  return [key for key in keys if _comparable(a.get(key)) != _comparable(b.get(key))]


def _comparable(value: Any) -> str:
  # Whoever wrote it, 1 and 1.0 are one value.
  if _is(value, _NUMBER):
    value = float(value)
  return json.dumps(value, sort_keys=True)


def _text(key: str, value: Any) -> str:
  """Returns a setting as a reader wants it."""
  section, _, field = key.rpartition(".")
  # The row's label has the method already.
  name = field if section in METHODS or section == "optim" else key
  if value is None:
    return f"{name} as usual"
  if key in ("weights", "data"):
    return f"{key} {str(value)[:8]}"
  if key == "selection":
    return str(value)
  if (key, value) in (("data.shots", 0), ("data.fraction", 1)):
    return "all training images"
  return printable(f"{name} {value:g}" if _is(value, _NUMBER) else f"{name} {value}")

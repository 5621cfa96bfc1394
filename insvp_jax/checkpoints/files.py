"""The files of one checkpoint: found, checked and read without its model.

Everything here takes the directory of one step, `<workdir>/checkpoints/<step>/`;
see `checkpoints.py` for what lies in it. Reading writes nothing, so a run on a
read-only disk can be loaded.

Why the checksums are no library's: Orbax (0.12.8) does not check the values of arrays,
and restores a flipped bit as another number.
"""

from collections.abc import Callable, Iterable, Mapping
import hashlib
import json
import logging
import math
import os
from pathlib import Path
import re
import types
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from insvp_jax import config_checks, files
from insvp_jax.errors import printable

T = TypeVar("T")
FOLDER = "checkpoints"
CHECKSUMS = "checksums.json"
JSON_FILE = "metadata"  # Orbax's name of the one file of a JSON item.
# What older checkpoints hold and nothing needs: the optimizer counted updates for the
# lr schedule, which is a function of the step.
OBSOLETE = r"opt_state/.*/count"
# The most runs that the error about a folder of runs lists.
_MOST_LISTED = 20


class Damaged(ValueError):
  """A checkpoint that cannot be read, or is not as it was written.

  Its message may hold names of the checkpoint's own, and is made printable.
  """

  def __init__(self, message: str):
    super().__init__(printable(message))


def find_steps(path: str | os.PathLike) -> list[Path]:
  """Returns the directories of the checkpoints that `path` means, newest first.

  Args:
    path: a run's workdir, its checkpoints directory or the directory of one step.

  Raises:
    FileNotFoundError: there is none; the message says what was looked for, and the
      error's notes list the runs below `path` where there are some.
  """
  given, path = Path(path), Path(path).absolute()
  if not path.exists():
    raise FileNotFoundError(f"there is no run at {path}: no such directory.")
  if (path / "meta").is_dir() or (path / "adapter").is_dir():
    return [path]
  for folder in (path / FOLDER, path):
    if steps := _steps_in(folder):
      return steps
  raise _not_a_run(given)


def _steps_in(folder: Path) -> list[Path]:
  """Returns the directories of the steps in a folder, newest first."""
  steps = [p for p in folder.glob("*") if is_step(p.name) and p.is_dir()]
  return sorted(steps, key=lambda p: int(p.name), reverse=True)


def is_step(name: str) -> bool:
  """Returns whether a file's name is a number, and so that of a checkpoint."""
  # Not str.isdigit, which takes "²" for a digit, too.
  return re.fullmatch("[0-9]+", name) is not None


def _not_a_run(path: Path) -> FileNotFoundError:
  """Returns the error about a folder that is no run: which runs it holds."""
  runs = runs_below(path)
  if not runs:
    return FileNotFoundError(
      f"{path} is no run and holds none: expected a run's workdir, such as "
      f"runs/folder/insvp/seed0, with {FOLDER}/<step>/meta in it."
    )
  count = (
    "1 run: give" if len(runs) == 1 else f"{len(runs)} runs: give one of them, e.g."
  )
  error = FileNotFoundError(f"{path} is no run, but holds {count} {runs[0]}")
  for run in runs[:_MOST_LISTED]:
    error.add_note(f"  {run}{_facts(run)}")
  if len(runs) > _MOST_LISTED:
    error.add_note(f"  and {len(runs) - _MOST_LISTED} more")
  return error


def runs_below(path: str | os.PathLike) -> list[Path]:
  """Returns the workdirs of runs below a folder, at any depth, sorted.

  The folder itself is one of them if it is a workdir. Links are not followed.
  """
  runs = []
  for folder, inner, _ in os.walk(path):
    # Changed in place: os.walk descends into what stays.
    inner[:] = sorted(name for name in inner if not name.startswith("."))
    if FOLDER in inner:
      inner.remove(FOLDER)
      runs += [Path(folder)] * bool(_steps_in(Path(folder) / FOLDER))
  return runs


def _facts(run: Path) -> str:
  """Returns a run's task, method and accuracies, as far as its files tell."""
  try:
    meta = read_meta(_steps_in(run / FOLDER)[0])
    facts = [str(meta[key]) for key in ("task", "method") if key in meta]
    if (run / "result.json").is_file():
      result = load_json(run / "result.json")
      metric = result.get("metric", "accuracy")
      for split in ("val", "test"):
        value = result.get(f"{split}_{metric}")
        if isinstance(value, float | int):
          facts.append(f"{split} {metric} {100 * value:.2f}%")
  except Damaged:
    return ": damaged"
  return f": {', '.join(facts)}"


def newest_good(
  steps: Iterable[Path], read: Callable[[Path], T], report: Callable[[str], Any]
) -> tuple[Path, T]:
  """Returns (directory, `read(directory)`) of the first checkpoint that is whole.

  Args:
    steps: directories, the preferred one first; at least one.
    read: raises `Damaged` where it finds damage.
    report: is told of each damaged checkpoint that is passed over.

  Raises:
    Damaged: all of them are damaged.
  """
  errors: list[Damaged] = []
  for where in steps:
    try:
      result = read(where)
    except Damaged as error:
      errors.append(error)
      continue
    for error in errors:
      report(f"{error} The checkpoint of step {where.name} is used instead.")
    return where, result
  folder = where.parent
  others = f" So are the {len(errors) - 1} older ones." if errors[1:] else ""
  raise Damaged(f"{errors[0]}{others} To start over, delete {folder}.") from errors[0]


def verify(where: Path, report: Callable[[str], Any] = lambda text: None) -> None:
  """Checks that a checkpoint is complete and as it was written.

  Args:
    where: the directory of one step.
    report: is told where there are no checksums to tell the latter by.

  Raises:
    Damaged: an item is missing, or a file is missing, truncated or altered.
  """
  for item in ("adapter", "progress", "meta"):
    if not (where / item).is_dir():
      raise Damaged(f"{where} is no checkpoint of this package: it has no {item!r}.")
  _check_kinds(where)
  # Those of other versions have none; reading still checks the form then.
  if not (where / CHECKSUMS).exists():
    report(
      f"the checkpoint {where} has no {CHECKSUMS}: nothing tells whether its numbers "
      "are those that were written."
    )
    return
  for name, entry in load_json(where / CHECKSUMS).items():
    if not isinstance(entry, list) or len(entry) != 2:
      raise Damaged(
        f"{where / CHECKSUMS} is damaged: of {name} it holds {short(entry)}, expected "
        "size and sha256."
      )
    (size, sha256), file = entry, where / name
    # Files of the checkpoint, whatever the list says.
    outside = Path(name).is_absolute() or ".." in Path(name).parts
    if outside or not files.is_regular(file):
      raise Damaged(f"the checkpoint {where} is damaged: {name} is missing.")
    if file.stat().st_size != size:
      raise Damaged(
        f"the checkpoint {where} is damaged: {name} has {file.stat().st_size} "
        f"bytes, expected {size}."
      )
    if _sha256(file) != sha256:
      raise Damaged(
        f"the checkpoint {where} is damaged: the content of {name} has changed "
        "since it was written."
      )


def _check_kinds(where: Path) -> None:
  """Checks that a checkpoint is made of folders and regular files.

  Links to files are followed, as repositories of files are full of them. A pipe or a
  device would be waited for without end, and a linked folder may lead anywhere.

  Raises:
    Damaged: it holds something else.
  """
  for folder, inner, names in os.walk(where):
    for path in (Path(folder, name) for name in (*inner, *names)):
      if not path.is_file() and (path.is_symlink() or not path.is_dir()):
        raise Damaged(
          f"the checkpoint {where} is damaged: {path.relative_to(where)} is a link "
          "to a folder, or no regular file."
        )


def read_json(where: Path, item: str) -> dict[str, Any]:
  """Returns a JSON item ("meta" or "progress") of the checkpoint at `where`.

  Raises:
    Damaged: it is missing or unreadable.
  """
  return load_json(where / item / JSON_FILE)


# What a run's description holds, as far as it is read by anyone: the type of each
# value or, in a dict, of those below it; in a list that of all its items. Other keys
# may hold anything.
_NUMBER = float | int
_META: dict[str, Any] = {
  "format": int,
  "model": {
    "backbone": str,
    "method": str,
    "num_classes": int,
    "image_size": int,
    "backbone_kwargs": dict,
    "method_kwargs": dict,
    "head_init": str,
    "head": str,
    "head_kwargs": dict,
    "mean": [_NUMBER],
    "std": [_NUMBER],
  },
  "backbone": {"id": str, "sha256": str, "seed": int, "init": str, "source": str},
  "class_names": [str],
  "train_count": [int],
  "masks": {"values": [int], "colors": [str]},
  "num_train_examples": int,
  "preset": str,
  "image_size": int,
  "method": str,
  "task": str,
  "data_sha256": str,
  "trainable": [str],
  "config": {"task": str, "backbone": dict, "data": dict, "segment": dict},
  "versions": dict,
}
# Likewise of how far it was; all else there are numbers.
_PROGRESS = {"step": int, "rng": {"impl": str, "data": list}, "metrics_lines": int}


def read_meta(where: Path) -> dict[str, Any]:
  """Returns a run's description in the checkpoint at `where`; see `report.run_meta`.

  Raises:
    Damaged: it is missing or unreadable, or a value is none that it can have.
  """
  return check_meta(read_json(where, "meta"), f"the description of the run at {where}")


def check_meta(meta: dict[str, Any], name: str) -> dict[str, Any]:
  """Returns a run's description after checking the types of its values.

  Args:
    meta: what a JSON file held.
    name: of it, for the message.

  Raises:
    Damaged: a value is none that it can have.
  """
  check_types(meta, _META, name)
  try:
    for section in ("data", "backbone", "segment"):
      stored = (meta.get("config") or {}).get(section)
      config_checks.check_types(section, stored or {})
  except ValueError as error:
    raise Damaged(f"{name}: {error}") from error
  return meta


def read_progress(where: Path) -> dict[str, Any]:
  """Returns how far a run was, in the checkpoint at `where`.

  Raises:
    Damaged: as `read_meta`.
  """
  progress = read_json(where, "progress")
  form = dict.fromkeys(progress, _NUMBER) | _PROGRESS
  check_types(progress, form, f"the progress in {where}")
  return progress


def check_types(value: Any, form: Any, name: str, key: str = "") -> None:
  """Checks the types of what a JSON file held.

  Args:
    value: of it, or a part of it.
    form: a type, a list of the type of its items, or a dict of forms by key. A value
      of a dict may be None, and a key may be missing.
    name: of the whole, for the message.
    key: of the part.

  Raises:
    Damaged: a value has another type.
  """
  kind = form if isinstance(form, type | types.UnionType) else type(form)
  if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
    raise Damaged(f"{name}: {key} is {short(value)}, expected {_KINDS[kind]}.")
  if isinstance(form, dict):
    for inner, part in form.items():
      if value.get(inner) is not None:
        check_types(value[inner], part, name, f"{key}.{inner}".lstrip("."))
  elif isinstance(form, list):
    for item in value:
      check_types(item, form[0], name, f"an item of {key}")


_KINDS = {
  **{bool: "true or false", int: "a whole number", _NUMBER: "a number"},
  **{str: "a text", list: "a list", dict: "an object"},
}


def read_arrays(
  where: Path,
  item: str,
  expected: Mapping[str, Any] | None = None,
  sharding: jax.sharding.Sharding | None = None,
) -> dict[str, jax.Array]:
  """Returns an item of arrays ("adapter" or "optimizer"), by name.

  Args:
    where: the directory of one step.
    item: the item's name.
    expected: leaves of the shapes and types that must be there, whose shardings
      place the values; None takes what there is. Values of a narrower float type are
      cast, which loses nothing.
    sharding: where the values go if `expected` is None; None is the first device.

  Raises:
    Damaged: the item is unreadable.
    ValueError: its names, shapes or types are others.
  """
  if expected is not None and not expected:
    return {}
  stored = stored_arrays(where, item)
  target = {
    name: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding or sharding_of(None)
    )
    for name, leaf in stored.items()
  }
  if expected is None:
    return _read_item(where, item, target)
  needed = {
    name: leaf
    for name, leaf in stored.items()
    if name in expected or not re.fullmatch(OBSOLETE, name)
  }
  check_leaves(needed, expected, f"{item!r} of the checkpoint {where}")
  target |= {
    name: target[name].update(sharding=sharding_of(leaf))
    for name, leaf in expected.items()
  }
  arrays = _read_item(where, item, target)
  return {name: arrays[name].astype(leaf.dtype) for name, leaf in expected.items()}


def stored_arrays(where: Path, item: str) -> dict[str, Any]:
  """Returns shape and type of each array of an item, which is not read further.

  Raises:
    Damaged: the item is unreadable.
  """
  stored = _read_item(where, item, None)
  _check_claims(where / item, stored)
  return stored


def _read_item(where: Path, item: str, target: Mapping[str, Any] | None) -> Any:
  """Returns the arrays of the form of `target`, or for None what is stored."""
  quieten_orbax()
  try:
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
      if target is not None:
        return reader.restore(where / item, args=ocp.args.StandardRestore(target))
      metadata = reader.metadata(where / item).item_metadata
      if metadata is None:
        raise ValueError(f"no readable item {item!r}")
      return dict(metadata.tree)
  except Exception as error:
    raise Damaged(
      f"{item!r} of the checkpoint {where} cannot be read: {reason_of(error)}."
    ) from error


def _check_claims(folder: Path, stored: Mapping[str, Any]) -> None:
  """Checks that arrays are not far larger than the files that hold them.

  Raises:
    Damaged: they are, or are no arrays.
  """
  try:
    claimed = sum(math.prod(x.shape) * x.dtype.itemsize for x in stored.values())
  except (AttributeError, TypeError) as error:
    raise Damaged(f"{folder} cannot be read: it holds more than arrays.") from error
  on_disk = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
  try:
    files.check_claim(claimed, on_disk)
  except ValueError as error:
    raise Damaged(f"{folder} cannot be read: {error}.") from error


def check_leaves(
  got: Mapping[str, Any],
  expected: Mapping[str, Any],
  what: str,
  *,
  dtypes: bool = True,
) -> None:
  """Checks that two flat dicts of leaves have the same names, shapes and types.

  Args:
    got: leaves with `shape` and `dtype`.
    expected: the same.
    what: what `got` is, for the message.
    dtypes: whether the types count.

  Raises:
    ValueError: they differ; the message names the leaves, got and expected.
  """
  missing = [name for name in expected if name not in got]
  surplus = [name for name in got if name not in expected]
  if missing or surplus:
    parts = [f"lacks {short(missing)}"] if missing else []
    parts += [f"has {short(surplus)}, which this model has not"] if surplus else []
    raise ValueError(f"{what} is of another model or method: it {' and '.join(parts)}.")

  def form(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}" if dtypes else str(list(leaf.shape))

  def fits(leaf: Any, like: Any) -> bool:
    if leaf.shape != like.shape:
      return False
    return not dtypes or leaf.dtype == like.dtype or _is_narrower(leaf, like)

  wrong = [
    f"{name}: got {form(got[name])}, expected {form(leaf)}"
    for name, leaf in expected.items()
    if not fits(got[name], leaf)
  ]
  if wrong:
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    raise ValueError(f"{what} has other shapes: {'; '.join(wrong[:3])}{more}.")


def _is_narrower(leaf: Any, like: Any) -> bool:
  """Returns whether each float of a leaf is one of the other leaf's type, too."""
  if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (leaf, like)):
    return False
  return jnp.promote_types(leaf.dtype, like.dtype) == like.dtype


def sharding_of(leaf: Any) -> jax.sharding.Sharding:
  """Returns where a leaf lies or, of a leaf that lies nowhere, the first device."""
  sharding = getattr(leaf, "sharding", None)
  return sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def write_checksums(where: Path) -> None:
  """Writes size and sha256 of every file of a checkpoint's items beside them."""
  # The files beside the items are Orbax's, written last, and read by nobody here.
  written = sorted(p for p in where.glob("*/**/*") if p.is_file())
  sums = {str(p.relative_to(where)): [p.stat().st_size, _sha256(p)] for p in written}
  (where / CHECKSUMS).write_text(json.dumps(sums, indent=1))


def load_json(path: Path) -> dict[str, Any]:
  """Returns the object in a JSON file of a run, such as result.json.

  Raises:
    Damaged: it is missing, unreadable, or no JSON object.
  """
  try:
    value = files.parse_json(files.read_bytes(path))
  except (OSError, ValueError) as error:
    raise Damaged(f"{path} cannot be read: {reason_of(error)}.") from error
  if not isinstance(value, dict):
    raise Damaged(f"{path} holds a {type(value).__name__}, expected a JSON object.")
  return value


def _sha256(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def reason_of(error: Exception | str) -> str:
  """Returns the cause in a few words; TensorStore's messages run over pages."""
  code = re.search(r"os_error_code='(\d+)'", str(error))
  if code:
    return os.strerror(int(code[1]))
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  line = (str(error).strip() or type(error).__name__).splitlines()[0]
  return line[:200].rstrip(".")


def short(value: Any) -> str:
  """Returns a value for a message; of a list the first three items."""
  if isinstance(value, list):
    more = f" and {len(value) - 3} more" if len(value) > 3 else ""
    return ", ".join(str(item) for item in value[:3]) + more
  return repr(value)


class _NotOrbax(logging.Filter):
  """Drops Orbax's own log: what fails is raised here, in one line."""

  def filter(self, record: logging.LogRecord) -> bool:
    """Returns whether the record stays."""
    return "orbax" not in record.pathname


_NOT_ORBAX = _NotOrbax()


def quieten_orbax() -> None:
  """Keeps Orbax's tracebacks and warnings out of the log, once and for all."""
  # Adding the same filter again changes nothing.
  logging.getLogger("absl").addFilter(_NOT_ORBAX)

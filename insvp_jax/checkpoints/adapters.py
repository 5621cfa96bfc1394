"""A run's adapter as a folder that can be passed on.

  <folder>/adapter.safetensors   what was trained, by the names of the parameters' tree
           config.json           what the run is, without the paths of its machine
           README.md             a model card for people, which nobody reads back

The backbone is named by its digest, and stays where it is. Reading takes the first two
files, unpickles nothing, and believes no size or shape before it is compared with the
model's.
"""

from collections.abc import Callable, Mapping
import json
import os
from pathlib import Path, PurePath
import re
import types
from typing import Any, NamedTuple
import warnings

import jax
import numpy as np

from insvp_jax import array_files
from insvp_jax.checkpoints.files import (
  Damaged,
  check_leaves,
  check_meta,
  check_types,
  load_json,
  reason_of,
)
from insvp_jax.logs.writers import write_json
from insvp_jax.models import weights

FILES = ARRAYS, CONFIG, CARD = "adapter.safetensors", "config.json", "README.md"
# What a description holds besides that of a checkpoint.
_RESULT, _DIGEST = "result", "adapter_sha256"
_RESULT_FORM = {
  f"{split}_{metric}": float | int
  for split in ("val", "test")
  for metric in ("accuracy", "miou")
}
# Where a machine has its data; only that machine needs it.
_DATA_PATHS = ("root", "cache_dir", "data_dir", "lists", "splits_json")
# Names of classes and parameters may begin with a slash.
_NO_PATHS = ("class_names", "trainable", "worst_class")


class Adapter(NamedTuple):
  """An adapter whose arrays are not read yet.

  Attributes:
    meta: the description of the run; see `report.run_meta`.
    result: what result.json held, or None.
    shapes: of the arrays, by name.
    read: `expected -> arrays`, once the shapes are known to be right; see `_read`.
  """

  meta: dict[str, Any]
  result: dict[str, Any] | None
  shapes: Mapping[str, Any]
  read: Callable[[Mapping[str, Any]], dict[str, np.ndarray]]


def is_adapter(path: str | os.PathLike) -> bool:
  """Returns whether a folder holds an adapter, by the names of its files."""
  return (Path(path) / ARRAYS).exists()


def open_adapter(folder: str | os.PathLike) -> Adapter:
  """Returns the adapter in a folder, whose arrays are read later.

  Raises:
    Damaged: a file is missing, unreadable, or not the one that the description is of.
  """
  folder = Path(folder)
  config, arrays = load_json(folder / CONFIG), folder / ARRAYS
  name = f"the description in {folder / CONFIG}"
  check_types(config, {_RESULT: dict, _DIGEST: str}, name)
  result = config.pop(_RESULT, None)
  check_types(result or {}, _RESULT_FORM, f"the result in {folder / CONFIG}")
  digest = config.pop(_DIGEST, None)
  meta = check_meta(config, name)
  try:
    if (kind := array_files.kind_of(arrays)) != "safetensors":
      raise ValueError(f"it is {kind or 'something else'}, expected .safetensors")
    actual = weights.file_digest(arrays)
    opened = array_files.open_arrays(arrays, kind)
  except (OSError, ValueError) as error:
    raise Damaged(f"{arrays} cannot be read: {reason_of(error)}.") from error
  if digest is None:
    warnings.warn(
      f"{folder / CONFIG} names no sha256 of {ARRAYS}: nothing tells whether its "
      "numbers are those that were written.",
      stacklevel=3,
    )
  elif actual != digest:
    raise Damaged(
      f"{arrays} is not the one that {CONFIG} beside it describes: it has sha256 "
      f"{actual}, expected {digest}. Get both again, of one revision."
    )
  shapes = {n: types.SimpleNamespace(shape=s) for n, s in opened.shapes.items()}
  return Adapter(meta, result, shapes, lambda expected: _read(arrays, opened, expected))


def _read(
  path: Path, opened: array_files.ArrayFile, expected: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Returns the arrays of the expected names, shapes and types.

  Raises:
    Damaged: they are not readable.
    ValueError: names, shapes or types are others.
  """
  try:
    arrays = opened.read(list(expected))
  except ValueError as error:
    raise Damaged(str(error)) from error
  check_leaves(arrays, expected, str(path))
  return {n: array.astype(expected[n].dtype) for n, array in arrays.items()}


def write_adapter(
  folder: Path,
  arrays: Mapping[str, Any],
  meta: Mapping[str, Any],
  result: Mapping[str, Any] | None,
) -> dict[str, Any]:
  """Writes the arrays and the description; returns the description.

  Args:
    folder: is made if need be; see `check_writable`.
    arrays: what was trained, by name.
    meta: the description of the run.
    result: what result.json holds, or None.

  Raises:
    ValueError: something else lies in the folder.
    OSError: the files cannot be written.
  """
  import safetensors.numpy

  check_writable(folder)
  folder.mkdir(parents=True, exist_ok=True)
  stored = {
    name: np.ascontiguousarray(jax.device_get(leaf)) for name, leaf in arrays.items()
  }
  with weights.atomic_file(folder / ARRAYS) as temporary:
    # Not save_file, which lets nobody else read the file.
    temporary.write_bytes(safetensors.numpy.save(stored, metadata={"format": "np"}))
    digest = weights.file_digest(temporary)
  description = {**public(meta), _DIGEST: digest}
  if result is not None:
    description[_RESULT] = public(result)
  write_json(folder / CONFIG, description)
  return description


def check_writable(folder: Path) -> None:
  """Checks that a folder is new, empty or an adapter's, so that nothing is lost.

  Raises:
    ValueError: it is not.
  """
  if not folder.exists() or (is_adapter(folder) and (folder / CONFIG).exists()):
    return
  if not folder.is_dir() or any(folder.iterdir()):
    raise ValueError(
      f"{folder} is there already, and is no exported adapter, whose place it could "
      "take. Move it away, or choose another --output."
    )


def public(description: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a description or a result without the paths of this machine.

  Of a file, such as a backbone's, the name stays. Of data nothing does.
  """
  kept = _without_paths(json.loads(json.dumps(description)))
  data = (kept.get("config") or {}).get("data")
  for key in _DATA_PATHS if isinstance(data, dict) else ():
    if data.get(key):
      data[key] = ""
  for identity in [kept.get("backbone")]:
    if isinstance(identity, dict):
      identity.pop("source", None)
  return kept


def _without_paths(value: Any) -> Any:
  if isinstance(value, dict):
    return {
      key: item if key in _NO_PATHS else _without_paths(item)
      for key, item in value.items()
    }
  if isinstance(value, list):
    return [_without_paths(item) for item in value]
  return _file_name(value) if isinstance(value, str) and _is_path(value) else value


def _is_path(text: str) -> bool:
  """Returns whether a text is the path of a file, here or on another machine."""
  if weights.is_remote(text):
    return False
  return weights.is_file_name(text) or re.match(r"[A-Za-z]:[\\/]", text) is not None


def _file_name(path: str) -> str:
  return PurePath(path.replace("\\", "/")).name

"""Decoded image sets on disk, so that the second run starts at once.

A cache file is named by a digest of its key, which holds everything that shaped its
content: the source files, the preset, the sizes, the split rule and the decoder's
version. It is written beside its final name and renamed when it is complete, so a
reader sees all of it or nothing, whoever else writes and whoever is killed.

Why this is no library's: joblib.Memory unpickles what it finds, which may run anything,
and takes a flipped bit for data, where an `.npz` has checksums.
"""

from collections.abc import Callable, Mapping
import contextlib
import hashlib
import json
import os
from pathlib import Path
import secrets
import time
from typing import Any
import zipfile

from absl import logging
import numpy as np

from insvp_jax import files, paths
from insvp_jax.data import decode
from insvp_jax.data.splits import ArraySplit, TaskData

# Raise it when decoding or splitting changes: old files are then ignored.
_FORMAT = 2
# Larger sets are not cached.
_MAX_BYTES = 2**30
# Names of classes and the like, in bytes.
_MAX_META = 2**26
# The array that names all others.
_NAMES = "_names"
# Sets that are read faster are not cached, unless the user names a folder.
_MIN_SECONDS = 2.0
# No writer takes that long: an older unfinished file is a killed writer's.
_STALE_SECONDS = 24 * 3600


def cached_task(
  key: Mapping[str, Any], read: Callable[[], TaskData], cache_dir: str = ""
) -> TaskData:
  """Returns `read()`, from the cache where an equal key was read before.

  A cache that cannot be read or written costs time, never the run: the error is logged
  and the data are read from their source. Nothing is cached when `read` raises, nor for
  sets above 1 GiB, nor, unless a folder is named, for sets that are read within two
  seconds.

  Args:
    key: everything that shapes the result; JSON-serialisable.
    read: reads and decodes the source; all splits are in memory.
    cache_dir: folder of the cache; "" for `paths.cache_dir("data")`, "off" for no
      cache.
  """
  return _load_or_make(key, read, _pack_task, _unpack_task, cache_dir)


def cached_split(
  key: Mapping[str, Any], read: Callable[[], ArraySplit], cache_dir: str = ""
) -> ArraySplit:
  """Returns `read()` for one split; otherwise as `cached_task`."""

  def pack(split: ArraySplit) -> dict[str, np.ndarray]:
    return {"images": split.images, "labels": split.labels}

  def unpack(stored: Mapping[str, np.ndarray]) -> ArraySplit:
    return _split(stored["images"], stored["labels"])

  return _load_or_make(key, read, pack, unpack, cache_dir)


def cached_arrays(
  key: Mapping[str, Any],
  make: Callable[[], dict[str, np.ndarray]],
  cache_dir: str = "",
) -> dict[str, np.ndarray]:
  """Returns `make()` for a dict of arrays by name; otherwise as `cached_task`."""
  return _load_or_make(key, make, lambda arrays: arrays, dict, cache_dir)


def _load_or_make(key, make, pack, unpack, cache_dir: str):
  """Returns what the cache has for a key, or else `make()`, which is then cached.

  Args:
    key: everything that shapes the result; JSON-serialisable.
    make: makes the result.
    pack: maps the result to the dict of arrays that is stored.
    unpack: the inverse of `pack`.
    cache_dir: as for `cached_task`.
  """
  if cache_dir == "off":
    return make()
  text = json.dumps({**key, "format": _FORMAT, **decode.decoder_versions()})
  digest = hashlib.sha256(text.encode()).hexdigest()[:24]
  try:
    folder = Path(cache_dir).expanduser() if cache_dir else paths.cache_dir("data")
  except OSError as error:
    logging.warning("decoded data are not cached: %s", error)
    return make()
  path = folder / f"{digest}.npz"
  # Also where the folder cannot be looked into.
  if os.path.exists(path):
    try:
      arrays = dict(files.read_npz(path, max_bytes=_MAX_BYTES + _MAX_META))
      # The archive's directory has no checksum: a member may be lost.
      if sorted(arrays) != sorted([*arrays.pop(_NAMES, ()), _NAMES]):
        raise ValueError(f"it holds {', '.join(arrays)} alone")
      return unpack(arrays)
    except Exception as error:
      # Whatever is wrong with it: the source has the data.
      logging.warning("the cached data %s are damaged, read anew: %s", path, error)
  start = time.monotonic()
  made = make()
  worthwhile = bool(cache_dir) or time.monotonic() - start > _MIN_SECONDS
  arrays = pack(made) if worthwhile else {}
  if arrays and sum(array.nbytes for array in arrays.values()) <= _MAX_BYTES:
    try:
      _save(path, arrays)
    except OSError as error:
      logging.warning("decoded data are not cached in %s: %s", folder, error)
  return made


def file_fingerprint(path: Path) -> list[Any]:
  """Returns a JSON-serialisable value that changes when a file's content does.

  For zip archives (`.zip`, `.npz`) it holds the checksums of the members, so that a
  copy or a touch changes nothing; for other files the size and the time of change.
  """
  # What only looks like an archive is a file like others; zipfile stumbles over damaged
  # ones in many ways.
  with contextlib.suppress(Exception):
    if zipfile.is_zipfile(path):
      with zipfile.ZipFile(path) as archive:
        return [[i.filename, i.CRC, i.file_size] for i in archive.infolist()]
  status = path.stat()
  return [path.name, status.st_size, status.st_mtime_ns]


def _pack_task(data: TaskData) -> dict[str, np.ndarray]:
  """Returns the arrays that a task is stored as; text is one JSON string, "meta"."""
  meta = {
    "name": data.name,
    "class_names": data.class_names,
    "skipped": data.skipped,
    "source": data.source,
    "split_names": list(data.splits),
  }
  arrays = {"meta": np.array(json.dumps(meta))}
  for name, split in data.splits.items():
    arrays[f"{name}_images"] = split.images
    arrays[f"{name}_labels"] = split.labels
  return arrays


def _unpack_task(stored: Mapping[str, np.ndarray]) -> TaskData:
  """Returns the task that `_pack_task` stored."""
  meta = json.loads(str(stored["meta"]))
  splits = {
    name: _split(stored[f"{name}_images"], stored[f"{name}_labels"])
    for name in meta.pop("split_names")
  }
  class_names = tuple(meta.pop("class_names"))
  return TaskData(class_names=class_names, splits=splits, **meta)


def _split(images: np.ndarray, labels: np.ndarray) -> ArraySplit:
  """Returns a split of stored arrays after checking their form."""
  forms = (images.dtype, images.ndim, labels.dtype, labels.shape)
  if forms != (np.uint8, 4, np.int32, images.shape[:1]):
    raise ValueError(f"images are {images.shape}, labels {labels.shape}")
  return ArraySplit(images, labels)


def _save(path: Path, arrays: Mapping[str, np.ndarray]):
  """Writes a cache file, complete or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  _remove_stale(path.parent)
  # Not by tempfile, whose files nobody else can read: the folder may be shared.
  partial = path.with_name(f"{path.stem}{secrets.token_hex(6)}.tmp")
  try:
    with partial.open("xb") as file:
      np.savez(file, **arrays, **{_NAMES: np.array(sorted(arrays))})
      # On disk before the rename: a power cut must not leave a good name on no data.
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise


def _remove_stale(folder: Path):
  """Deletes the unfinished files that killed writers left behind."""
  for partial in folder.glob("*.tmp"):
    try:
      if time.time() - partial.stat().st_mtime > _STALE_SECONDS:
        partial.unlink()
    except OSError:
      continue  # another process was faster

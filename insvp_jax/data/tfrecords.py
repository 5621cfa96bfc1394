"""Random access to the examples of prepared TFDS data sets.

TFRecord files can only be read from their start. One pass over the files that a split
touches notes where each record lies, checks its checksums, and takes its label and
name; after that any record is one read away, so that an epoch can be shuffled as a
whole and go on in its middle. The notes are kept in the cache.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
from pathlib import Path
import re
from typing import Any

from jaxtyping import Int, Int32, UInt64
import numpy as np

from insvp_jax.data import cache
from insvp_jax.data.labels import LabelRule

# Raise it when what is noted changes.
_FORMAT = 1
_BATCH = 512
# Around a record's data: its length (8 bytes) and two checksums (4 bytes each).
_HEADER, _FOOTER = 12, 4


@dataclasses.dataclass(frozen=True)
class Records:
  """Where the examples of a split lie.

  Attributes:
    files: the TFRecord files.
    file: of each example, the index of its file.
    row: its number in the file.
    offset: of its data in the file, in bytes.
    length: of its data in bytes.
    fingerprint: of its data.
    labels: its class index.
    names: its name, where the task's rule needs one.
  """

  files: tuple[str, ...]
  file: Int32[np.ndarray, "n"]
  row: Int[np.ndarray, "n"]
  offset: Int[np.ndarray, "n"]
  length: Int[np.ndarray, "n"]
  fingerprint: UInt64[np.ndarray, "n"]
  labels: Int32[np.ndarray, "n"]
  names: tuple[str, ...] | None

  def __len__(self) -> int:
    """Returns the number of examples."""
    return len(self.labels)

  def take(self, positions: Int[np.ndarray, "m"]) -> "Records":
    """Returns the examples at some positions, in that order."""
    arrays = {name: getattr(self, name)[positions] for name in _ARRAYS}
    names = self.names
    if names is not None:
      names = tuple(names[i] for i in positions)
    return Records(self.files, names=names, **arrays)

  def describe(self, position: int) -> str:
    """Returns how messages name an example."""
    return f"record {self.row[position]} of {self.files[self.file[position]]}"

  def identity(self) -> str:
    """Returns a sha256 (hex) of the examples' contents and labels."""
    sha = hashlib.sha256(np.ascontiguousarray(self.fingerprint))
    sha.update(np.ascontiguousarray(self.labels))
    return sha.hexdigest()


_ARRAYS = ("file", "row", "offset", "length", "fingerprint", "labels")


def concatenate(parts: Sequence[Records]) -> Records:
  """Returns the examples of all parts, one part after the other."""
  files = tuple(dict.fromkeys(name for part in parts for name in part.files))
  place = {name: i for i, name in enumerate(files)}
  arrays: dict[str, Any] = {
    name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS
  }
  arrays["file"] = np.concatenate(
    [np.array([place[f] for f in part.files], np.int32)[part.file] for part in parts]
  )
  named = [part.names for part in parts if part.names is not None]
  names = tuple(n for part in named for n in part) if len(named) == len(parts) else None
  return Records(files, names=names, **arrays)


def find(
  builder: Any,
  expression: str,
  rule: LabelRule,
  id_feature: str,
  cache_dir: str,
) -> Records:
  """Returns the examples of a split expression, in TFDS's order.

  Args:
    builder: of a prepared data set.
    expression: as TFDS reads it: "train[:800]", "test[50%:]", sums of such.
    rule: computes the labels.
    id_feature: the feature that names an example; "" for none.
    cache_dir: as `config.data.cache_dir`.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: a file is damaged or ends early, or the split is smaller than that.
  """
  try:
    instructions = builder.info.splits[expression].file_instructions
  except (ValueError, KeyError) as error:
    raise ValueError(
      f"{expression} of {builder.data_dir}: {first_line(error)}; prepare the data set "
      f"anew."
    ) from error
  parts = []
  for part in instructions:
    path = Path(part.filename)
    notes = _notes(
      builder,
      path,
      part.skip + part.take,
      part.examples_in_shard,
      rule,
      id_feature,
      cache_dir,
    )
    here = slice(part.skip, part.skip + part.take)
    number = part.take
    names = notes.get("names")
    parts.append(
      Records(
        files=(str(path),),
        file=np.zeros(number, np.int32),
        row=np.arange(part.skip, part.skip + number),
        offset=notes["offset"][here],
        length=notes["length"][here],
        fingerprint=notes["fingerprint"][here],
        labels=notes["labels"][here],
        names=None if names is None else tuple(names[here].tolist()),
      )
    )
  return concatenate(parts)


def _notes(builder, path: Path, number, total, rule, id_feature, cache_dir):
  """Returns what is known of the first `number` records of a file."""
  if not path.is_file():
    raise FileNotFoundError(
      f"the file {path} is missing; prepare {builder.info.full_name} anew."
    )
  key = {
    "index": _FORMAT,
    "file": [str(path.resolve()), cache.fingerprint(path)],
    "number": number,
    "label": [sorted(rule.features), rule.compute.__name__],
    "names": id_feature,
  }
  return cache.cached_arrays(
    key, lambda: _scan(builder, path, number, total, rule, id_feature), cache_dir
  )


def _scan(builder, path: Path, number, total, rule, id_feature):
  """Reads the first `number` of the `total` records that a file should have."""
  import tensorflow as tf

  features = {**rule.features, **({id_feature: True} if id_feature else {})}
  parse = parser(builder, features)

  def note(data):
    example = parse(data)
    name = example[id_feature] if id_feature else tf.constant(b"")
    leaves = tf.nest.flatten({key: example[key] for key in rule.features})
    label = tf.numpy_function(compute, leaves, tf.int64, stateful=False)
    fingerprint = tf.fingerprint(data[None])[0]
    return tf.strings.length(data), label, name, fingerprint

  structure = {key: features[key] for key in rule.features}

  def compute(*leaves):
    # tf.nest flattens dicts in the order of their keys.
    return np.int64(rule.compute(_unflatten(structure, iter(leaves))))

  pieces = []
  try:
    data = tf.data.TFRecordDataset(str(path)).take(number)
    data = data.map(note, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    for piece in data.batch(_BATCH).as_numpy_iterator():
      pieces.append(piece)
  except tf.errors.OpError as error:
    done = sum(len(piece[0]) for piece in pieces)
    raise ValueError(
      f"the file {path} is damaged near record {done}: {first_line(error)}; prepare "
      f"{builder.info.full_name} anew."
    ) from error
  found = sum(len(piece[0]) for piece in pieces)
  if found < number:
    raise ValueError(
      f"the file {path} has {found} records, but dataset_info.json says {total}; "
      f"prepare {builder.info.full_name} anew."
    )
  lengths, labels, names, prints = map(np.concatenate, zip(*pieces, strict=True))
  lengths = lengths.astype(np.int64)
  ends = np.cumsum(lengths + _HEADER + _FOOTER)
  notes = {
    "offset": ends - lengths - _FOOTER,
    "length": lengths,
    "fingerprint": prints.view(np.uint64).reshape(-1),
    "labels": labels.astype(np.int32),
  }
  if id_feature:
    notes["names"] = np.array([name.decode() for name in names])
  return notes


def parser(builder: Any, features: Mapping[str, Any]) -> Any:
  """Returns the graph function from a record's data to some decoded features.

  Raises:
    ValueError: the data set has no such feature.
  """
  import tensorflow_datasets as tfds

  known = builder.info.features
  if missing := [name for name in features if name not in known]:
    raise ValueError(
      f"{builder.info.full_name} has no feature {missing[0]!r}, only "
      f"{', '.join(known)}; prepare another version of it."
    )
  partial = tfds.decode.PartialDecoding(features)
  return partial.extract_features(known).deserialize_example


def _unflatten(structure: Mapping[str, Any], leaves: Any) -> dict[str, Any]:
  """Gives leaves, in the order of sorted keys, the shape of nested dicts."""
  return {
    key: _unflatten(inner, leaves) if isinstance(inner, Mapping) else next(leaves)
    for key, inner in sorted(structure.items())
  }


def first_line(error: BaseException) -> str:
  """Returns the part of a TensorFlow error that says something."""
  line = (str(error).strip().splitlines() or [type(error).__name__])[0]
  # Where in its graph TensorFlow noticed it tells a user nothing.
  return re.sub(r"\{\{.*?\}\} ?|\s*\[Op:\w+\].*$", "", line).rstrip(".")

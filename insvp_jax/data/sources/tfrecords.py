"""Random access to the examples of data sets that TFDS prepared.

TFRecord files can only be read from their start. One pass over the files that a split
touches checks all checksums and makes an index: where each record lies, its label and
its name. After that any record is one read away, so that an epoch can be shuffled as a
whole and resumed in its middle. The index of each file is kept in the cache.

Why this is no library's: TFDS has random access only to array_record and Parquet files,
and what it prepares, unless told otherwise, are TFRecords.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import hashlib
import math
import mmap
from pathlib import Path
import re
import struct
from typing import Any

from jaxtyping import Int, Int32, UInt64
import numpy as np

from insvp_jax.data import cache
from insvp_jax.data.labels import LabelRule

# Raise it when the content of an index changes: old ones are then ignored.
_FORMAT = 2
# Records that are parsed together.
_BATCH = 64
# Bytes around a record's data: before it its length (8) and the length's checksum (4),
# after it its own checksum (4).
_HEADER, _FOOTER = 12, 4
_LENGTH = struct.Struct("<Q")


@dataclasses.dataclass(frozen=True)
class Records:
  """Where the examples of a split lie, and their labels.

  Attributes:
    files: paths of the TFRecord files.
    file: index in `files` of each example's file.
    row: number of each example's record in its file, from 0.
    offset: where each record's data begin in the file, in bytes.
    length: length of each record's data in bytes.
    fingerprint: 64-bit hash of each record's data.
    labels: class index of each example; not yet checked to be in [0, k).
    names: name of each example; None where the task's rule needs none.
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
    arrays = {name: getattr(self, name)[positions] for name in _ARRAY_FIELDS}
    names = self.names
    if names is not None:
      names = tuple(names[i] for i in positions)
    return Records(self.files, names=names, **arrays)

  def location(self, position: int) -> str:
    """Returns how messages name an example: "record 3 of <path>"."""
    return f"record {self.row[position]} of {self.files[self.file[position]]}"

  def digest(self) -> str:
    """Returns a sha256 (hex) of the examples' contents and labels."""
    sha = hashlib.sha256(np.ascontiguousarray(self.fingerprint))
    sha.update(np.ascontiguousarray(self.labels))
    return sha.hexdigest()


# The fields of `Records` that are arrays [n].
_ARRAY_FIELDS = ("file", "row", "offset", "length", "fingerprint", "labels")


def concatenate(parts: Sequence[Records]) -> Records:
  """Returns the examples of all parts, one part after the other."""
  files = tuple(dict.fromkeys(name for part in parts for name in part.files))
  index_of = {name: i for i, name in enumerate(files)}
  arrays: dict[str, Any] = {
    name: np.concatenate([getattr(part, name) for part in parts])
    for name in _ARRAY_FIELDS
  }
  # A part's index of a file becomes the index among all files.
  arrays["file"] = np.concatenate(
    [np.array([index_of[f] for f in part.files], np.int32)[part.file] for part in parts]
  )
  named = [part.names for part in parts if part.names is not None]
  names = tuple(n for part in named for n in part) if len(named) == len(parts) else None
  return Records(files, names=names, **arrays)


def find_records(
  builder: Any,
  expression: str,
  rule: LabelRule,
  id_feature: str,
  cache_dir: str,
) -> Records:
  """Finds the examples of a split expression, in TFDS's order.

  Args:
    builder: the builder of a prepared data set.
    expression: what TFDS calls a split, e.g. "train[:800]", "test[50%:]", or a sum of
      such.
    rule: how labels are computed.
    id_feature: the feature that names an example; "" for none.
    cache_dir: folder of the cache, as config.data.cache_dir.

  Raises:
    FileNotFoundError: if a file is missing.
    ValueError: if a file is damaged or ends early, the split has fewer examples than
      the expression asks for, or the data set lacks a feature.
  """
  indexer = _Indexer(builder, rule, id_feature)
  try:
    instructions = builder.info.splits[expression].file_instructions
  except (ValueError, KeyError) as error:
    raise ValueError(
      f"{expression} of {builder.data_dir}: {short_message(error)}; prepare the data "
      f"set anew."
    ) from error
  if not instructions:
    raise ValueError(
      f"{expression} of {builder.data_dir} has no examples; prepare the data set anew."
    )
  parts = [_records_of_file(indexer, part, cache_dir) for part in instructions]
  return concatenate(parts)


def _records_of_file(indexer: "_Indexer", part: Any, cache_dir: str) -> Records:
  """Returns the examples of a split that lie in one file, from the cache if there.

  Args:
    indexer: reads what the index holds.
    part: TFDS's instruction: which rows of which file.
    cache_dir: folder of the cache, as config.data.cache_dir.
  """
  path = Path(part.filename)
  if not path.is_file():
    raise FileNotFoundError(
      f"the file {path} is missing; prepare {indexer.set_name} anew."
    )
  # Tasks on one data set compute other labels, and some need no names.
  key = {
    "index": _FORMAT,
    "file": [str(path.resolve()), cache.file_fingerprint(path)],
    "rows": [part.skip, part.take],
    "label": [sorted(indexer.rule.features), indexer.rule.compute.__name__],
    "names": indexer.id_feature,
  }

  def read_index() -> dict[str, np.ndarray]:
    return indexer.read(path, part.skip, part.take, part.examples_in_shard)

  index = cache.cached_arrays(key, read_index, cache_dir)
  names = index.get("names")
  return Records(
    files=(str(path),),
    file=np.zeros(part.take, np.int32),
    row=np.arange(part.skip, part.skip + part.take),
    names=None if names is None else tuple(names.tolist()),
    **{name: index[name] for name in ("offset", "length", "fingerprint", "labels")},
  )


class _Indexer:
  """Reads what the index holds of a data set's records, many records at a time.

  Attributes:
    set_name: name and version of the data set; named in errors.
    rule: how labels are computed.
    id_feature: the feature that names an example; "" for none.
  """

  def __init__(self, builder: Any, rule: LabelRule, id_feature: str):
    import tensorflow as tf

    self.set_name = builder.info.full_name
    self.rule = rule
    self.id_feature = id_feature
    names = {id_feature: True} if id_feature else {}
    specs = select_features(builder, {**rule.features, **names}).tf_example_spec
    # Features of which a record has several values, such as one for each object, with
    # the shape of one value.
    self._sequences = {
      name: tuple(spec.shape)
      for name, spec in specs.items()
      if isinstance(spec, tf.io.FixedLenSequenceFeature)
    }
    # Many records are parsed at once, and they differ in the number of values.
    ragged = {name: tf.io.RaggedFeature(specs[name].dtype) for name in self._sequences}
    self._specs = {**specs, **ragged}
    # Traced once, not for each file.
    records = tf.TensorSpec([None], tf.string)
    self._parse_traced = tf.function(self._parse, input_signature=[records])

  def read(self, path: Path, skip: int, take: int, total: int) -> dict[str, np.ndarray]:
    """Returns the index of some records of a file.

    Args:
      path: a TFRecord file.
      skip: number of records before the first one.
      take: number of records.
      total: number of records that the file should have; named in errors.

    Returns:
      Arrays [take]: "offset", "length", "fingerprint" and "labels" (see `Records`), and
      "names" where the examples have names.

    Raises:
      ValueError: if a record is damaged or the file ends early.
    """
    import tensorflow as tf

    data = tf.data.TFRecordDataset(str(path)).skip(skip).take(take).batch(_BATCH)
    data = data.map(
      self._parse_traced, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
    )
    try:
      batches = list(data.as_numpy_iterator())
    except tf.errors.OpError as error:
      raise self._damage_error(path, skip, take, error) from error
    num_read = sum(len(batch["length"]) for batch in batches)
    start, num_before = _record_start(path, skip)
    if num_read < take:
      raise ValueError(
        f"the file {path} has {num_before + num_read} records, but dataset_info.json "
        f"says {total}; prepare {self.set_name} anew."
      )
    parsed = {
      name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]
    }
    return self._index(parsed, start)

  def _parse(self, data):
    """Parses a batch of records in TensorFlow.

    Args:
      data: the records' data, a string tensor [batch].

    Returns:
      The features by name, "length" and "print" (fingerprint) of each record. The
      values of a sequence feature are concatenated over the records, and "number of
      <name>" counts those of each record.
    """
    import tensorflow as tf

    parsed = tf.io.parse_example(data, self._specs)
    for name in self._sequences:
      ragged = parsed[name]
      parsed[name], parsed[f"number of {name}"] = ragged.values, ragged.row_lengths()
    return {**parsed, "length": tf.strings.length(data), "print": tf.fingerprint(data)}

  def _index(self, parsed: dict[str, np.ndarray], start: int) -> dict[str, np.ndarray]:
    """Returns the index of parsed records, the first of which begins at `start`."""
    lengths = parsed["length"].astype(np.int64)
    ends = start + np.cumsum(lengths + _HEADER + _FOOTER)
    index = {
      "offset": ends - lengths - _FOOTER,
      "length": lengths,
      # TensorFlow gives 8 bytes for each record.
      "fingerprint": parsed["print"].view(np.uint64).reshape(-1),
      "labels": self._labels(parsed),
    }
    if self.id_feature:
      index["names"] = np.array([name.decode() for name in parsed[self.id_feature]])
    return index

  def _labels(self, parsed: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the labels of parsed records, int32 [number of records]."""
    if not self._sequences:
      # The rule takes arrays of many examples.
      labels = self.rule.compute({name: parsed[name] for name in self.rule.features})
    else:
      labels = np.array([self.rule.compute(one) for one in self._examples(parsed)])
    # A label beyond int32 must not wrap around to a valid one.
    limits = np.iinfo(np.int32)
    return labels.clip(limits.min, limits.max).astype(np.int32)

  def _examples(self, parsed: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """Yields the features that the rule reads, record by record."""

    def values_by_record(name: str) -> Sequence[np.ndarray]:
      # Counted were numbers, of which each value may have several: a position has 3.
      shape = self._sequences[name]
      ends = np.cumsum(parsed[f"number of {name}"]) // math.prod(shape)
      return np.split(parsed[name].reshape(-1, *shape), ends[:-1])

    columns = {
      feature: {part: values_by_record(f"{feature}/{part}") for part in inner}
      for feature, inner in self.rule.features.items()
    }
    for i in range(len(parsed["length"])):
      yield {
        feature: {part: values[i] for part, values in parts.items()}
        for feature, parts in columns.items()
      }

  def _damage_error(self, path: Path, skip: int, take: int, error) -> ValueError:
    """Returns an error that names the record at which reading stopped."""
    import tensorflow as tf

    # Read again record by record: the first that fails is the one.
    row = 0
    try:
      for data in tf.data.TFRecordDataset(str(path)).take(skip + take):
        if row >= skip:
          self._parse(data[None])
        row += 1
    except tf.errors.OpError as record_error:
      error = record_error
    return ValueError(
      f"record {row} of {path} is damaged: {short_message(error)}; prepare "
      f"{self.set_name} anew."
    )


def _record_start(path: Path, number: int) -> tuple[int, int]:
  """Returns where in a file a record begins, and how many records lie before it.

  Args:
    path: a TFRecord file.
    number: number of the record, from 0; the file may end earlier.
  """
  size = path.stat().st_size
  position = 0
  if not number or not size:
    return 0, 0
  with (
    path.open("rb") as file,
    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
  ):
    # Only the lengths are read, and so only their pages of the file.
    for i in range(number):
      # The file may end within a length, too.
      if position + _LENGTH.size > size:
        return position, i
      (length,) = _LENGTH.unpack_from(data, position)
      position += length + _HEADER + _FOOTER
  return position, number


def select_features(builder: Any, wanted: Mapping[str, Any]) -> Any:
  """Returns TFDS's description of some of a data set's features, a FeaturesDict.

  Args:
    builder: the builder of a prepared data set.
    wanted: {name: True}, or for a feature with features of its own {name: {name:
      True}}.

  Raises:
    ValueError: if the data set has no such feature.
  """
  import tensorflow_datasets as tfds

  # Not tfds.decode.PartialDecoding: it logs a warning on each use.
  def select(feature, inner):
    if inner is True:
      return feature
    if isinstance(feature, tfds.features.Sequence):
      return tfds.features.Sequence(select(feature.feature, inner))
    known = list(feature) if isinstance(feature, tfds.features.FeaturesDict) else []
    if missing := [name for name in inner if name not in known]:
      raise ValueError(
        f"{builder.info.full_name} in {builder.data_dir} has no feature "
        f"{missing[0]!r}, only {', '.join(sorted(known)) or 'one'}; prepare another "
        f"version of it with insvp prepare."
      )
    return tfds.features.FeaturesDict(
      {k: select(feature[k], v) for k, v in inner.items()}
    )

  return select(builder.info.features, wanted)


def short_message(error: BaseException) -> str:
  """Returns the part of a TensorFlow error that tells a user something, in one line."""
  line = (str(error).strip().splitlines() or [type(error).__name__])[0]
  # Without the place in TensorFlow's graph: "{{node ...}}" and "[Op:...]".
  return re.sub(r"\{\{.*?\}\} ?|\s*\[Op:\w+\].*$", "", line).rstrip(".")

"""Random access to the examples of prepared TFDS data sets.

TFRecord files can only be read from their start. One pass over the files that a split
touches notes where each record lies, checks its checksums, and takes its label and
name; after that any record is one read away, so that an epoch can be shuffled as a
whole and go on in its middle. The notes are kept in the cache.
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

# Raise it when what is noted changes.
_FORMAT = 2
# Records that are looked at together.
_BATCH = 64
# Around a record's data: its length (8 bytes) and two checksums (4 bytes each).
_HEADER, _FOOTER = 12, 4
_LENGTH = struct.Struct("<Q")


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
    ValueError: a file is damaged or ends early, the split is smaller than that, or
      the data set lacks a feature.
  """
  scan = _Scan(builder, rule, id_feature)
  try:
    instructions = builder.info.splits[expression].file_instructions
  except (ValueError, KeyError) as error:
    raise ValueError(
      f"{expression} of {builder.data_dir}: {first_line(error)}; prepare the data set "
      f"anew."
    ) from error
  if not instructions:
    raise ValueError(
      f"{expression} of {builder.data_dir} has no examples; prepare the data set anew."
    )
  return concatenate([_part(scan, part, cache_dir) for part in instructions])


def _part(scan: "_Scan", part: Any, cache_dir: str) -> Records:
  """Returns the examples of a split that lie in one file, from the cache if there."""
  path = Path(part.filename)
  if not path.is_file():
    raise FileNotFoundError(
      f"the file {path} is missing; prepare {scan.set_name} anew."
    )
  key = {
    "index": _FORMAT,
    "file": [str(path.resolve()), cache.fingerprint(path)],
    "rows": [part.skip, part.take],
    "label": [sorted(scan.rule.features), scan.rule.compute.__name__],
    "names": scan.id_feature,
  }
  notes = cache.cached_arrays(
    key, lambda: scan(path, part.skip, part.take, part.examples_in_shard), cache_dir
  )
  names = notes.get("names")
  return Records(
    files=(str(path),),
    file=np.zeros(part.take, np.int32),
    row=np.arange(part.skip, part.skip + part.take),
    names=None if names is None else tuple(names.tolist()),
    **{name: notes[name] for name in ("offset", "length", "fingerprint", "labels")},
  )


class _Scan:
  """Reads what is noted of a data set's records, many at a time."""

  def __init__(self, builder: Any, rule: LabelRule, id_feature: str):
    import tensorflow as tf

    self.set_name = builder.info.full_name
    self.rule = rule
    self.id_feature = id_feature
    names = {id_feature: True} if id_feature else {}
    specs = pick(builder, {**rule.features, **names}).tf_example_spec
    # What a record has several of, with the shape of one.
    self._several = {
      name: tuple(spec.shape)
      for name, spec in specs.items()
      if isinstance(spec, tf.io.FixedLenSequenceFeature)
    }
    ragged = {name: tf.io.RaggedFeature(specs[name].dtype) for name in self._several}
    self._specs = {**specs, **ragged}
    records = tf.TensorSpec([None], tf.string)
    # Traced once, not for each file.
    self._note = tf.function(self._parse, input_signature=[records])

  def __call__(
    self, path: Path, skip: int, take: int, total: int
  ) -> dict[str, np.ndarray]:
    """Returns the notes on `take` records of a file that should have `total`."""
    import tensorflow as tf

    data = tf.data.TFRecordDataset(str(path)).skip(skip).take(take).batch(_BATCH)
    data = data.map(self._note, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    try:
      pieces = list(data.as_numpy_iterator())
    except tf.errors.OpError as error:
      raise self._explain(path, skip, take, error) from error
    found = sum(len(piece["length"]) for piece in pieces)
    start, before = _start(path, skip)
    if found < take:
      raise ValueError(
        f"the file {path} has {before + found} records, but dataset_info.json says "
        f"{total}; prepare {self.set_name} anew."
      )
    notes = {
      name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]
    }
    return self._finish(notes, start)

  def _parse(self, data):
    """Notes what can be without Python; `data` is a batch of records."""
    import tensorflow as tf

    found = tf.io.parse_example(data, self._specs)
    for name in self._several:
      ragged = found[name]
      found[name], found[f"number of {name}"] = ragged.values, ragged.row_lengths()
    return {**found, "length": tf.strings.length(data), "print": tf.fingerprint(data)}

  def _finish(self, notes: dict[str, np.ndarray], start: int) -> dict[str, np.ndarray]:
    """Returns the notes as they are kept; `start` is where the first record lies."""
    lengths = notes["length"].astype(np.int64)
    ends = start + np.cumsum(lengths + _HEADER + _FOOTER)
    found = {
      "offset": ends - lengths - _FOOTER,
      "length": lengths,
      "fingerprint": notes["print"].view(np.uint64).reshape(-1),
      "labels": self._labels(notes),
    }
    if self.id_feature:
      found["names"] = np.array([name.decode() for name in notes[self.id_feature]])
    return found

  def _labels(self, notes: dict[str, np.ndarray]) -> np.ndarray:
    wanted = self.rule.features
    if not self._several:
      labels = self.rule.compute({name: notes[name] for name in wanted})
    else:
      labels = np.array([self.rule.compute(one) for one in self._examples(notes)])
    # What no label can be stays so.
    limits = np.iinfo(np.int32)
    return labels.clip(limits.min, limits.max).astype(np.int32)

  def _examples(self, notes: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """Yields what the rule reads of each record."""

    def column(name: str) -> Sequence[np.ndarray]:
      # What was counted are numbers, of which each value may have several.
      shape = self._several[name]
      ends = np.cumsum(notes[f"number of {name}"]) // math.prod(shape)
      return np.split(notes[name].reshape(-1, *shape), ends[:-1])

    columns = {
      key: {part: column(f"{key}/{part}") for part in inner}
      for key, inner in self.rule.features.items()
    }
    for i in range(len(notes["length"])):
      yield {
        key: {part: column[i] for part, column in parts.items()}
        for key, parts in columns.items()
      }

  def _explain(self, path: Path, skip: int, take: int, error) -> ValueError:
    """Returns an error that names the record at which reading stopped."""
    import tensorflow as tf

    row = 0
    try:
      for data in tf.data.TFRecordDataset(str(path)).take(skip + take):
        if row >= skip:
          self._parse(data[None])
        row += 1
    except tf.errors.OpError as found:
      error = found
    return ValueError(
      f"record {row} of {path} is damaged: {first_line(error)}; prepare "
      f"{self.set_name} anew."
    )


def _start(path: Path, number: int) -> tuple[int, int]:
  """Returns where in a file a record starts, and how many there are before it.

  Args:
    path: a TFRecord file.
    number: of the record; a file may end earlier.
  """
  size = path.stat().st_size
  position = 0
  if not number or not size:
    return 0, 0
  with (
    path.open("rb") as file,
    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
  ):
    for i in range(number):
      if position >= size:
        return position, i
      (length,) = _LENGTH.unpack_from(data, position)
      position += length + _HEADER + _FOOTER
  return position, number


def pick(builder: Any, wanted: Mapping[str, Any]) -> Any:
  """Returns TFDS's description of some of a data set's features.

  Args:
    builder: of a prepared data set.
    wanted: {name: True}, or for what has features of its own {name: {name: True}}.

  Raises:
    ValueError: the data set has no such feature.
  """
  import tensorflow_datasets as tfds

  # Not tfds.decode.PartialDecoding: it logs a warning on each use.
  def part(feature, inner):
    if inner is True:
      return feature
    if isinstance(feature, tfds.features.Sequence):
      return tfds.features.Sequence(part(feature.feature, inner))
    known = list(feature) if isinstance(feature, tfds.features.FeaturesDict) else []
    if missing := [name for name in inner if name not in known]:
      raise ValueError(
        f"{builder.info.full_name} in {builder.data_dir} has no feature "
        f"{missing[0]!r}, only {', '.join(sorted(known)) or 'one'}; prepare another "
        f"version of it with insvp_jax.tools.prepare_data."
      )
    return tfds.features.FeaturesDict(
      {k: part(feature[k], v) for k, v in inner.items()}
    )

  return part(builder.info.features, wanted)


def first_line(error: BaseException) -> str:
  """Returns the part of a TensorFlow error that says something."""
  line = (str(error).strip().splitlines() or [type(error).__name__])[0]
  # Where in its graph TensorFlow noticed it tells a user nothing.
  return re.sub(r"\{\{.*?\}\} ?|\s*\[Op:\w+\].*$", "", line).rstrip(".")

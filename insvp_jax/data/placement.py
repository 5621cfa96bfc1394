"""Where a split's images stay: decoded in memory, or in their files."""

from collections.abc import Mapping
import types

from absl import logging
import ml_collections

from insvp_jax.data import arrays, cache
from insvp_jax.data.arrays import ArraySplit
from insvp_jax.data.preprocess import Preset
from insvp_jax.data.splits import Split, StreamSplit

_MIB = 2**20
_NOTHING: Mapping[str, ArraySplit] = types.MappingProxyType({})


def fits(stream: StreamSplit, data_config: ml_collections.ConfigDict) -> bool:
  """Returns whether the split's squares take at most `resident_mb` MiB of memory."""
  return stream.nbytes <= data_config.resident_mb * _MIB


def crops_whole(preset: Preset) -> bool:
  """Returns whether training crops from more than the square that memory holds."""
  return preset.augments and preset.keeps_aspect


def stays_in_files(
  stream: StreamSplit,
  data_config: ml_collections.ConfigDict,
  preset: Preset,
  *,
  trains: bool,
) -> bool:
  """Returns whether a split is streamed: a large one, or one of elongated images.

  A training set whose preset crops from the whole of elongated images stays in its
  files whatever its size: memory holds squares.

  Args:
    stream: the split.
    data_config: `resident_mb`, the most MiB that a split may take in memory.
    preset: what the stream's images are resized by.
    trains: whether the model is trained on it.
  """
  elongated = trains and crops_whole(preset) and not stream.square
  return elongated or not fits(stream, data_config)


def place(
  stream: StreamSplit,
  data_config: ml_collections.ConfigDict,
  preset: Preset,
  *,
  trains: bool,
) -> Split:
  """Returns the split in memory, or as it is where it `stays_in_files`.

  Args:
    stream: the split.
    data_config: `resident_mb`; `cache_dir` keeps decoded splits.
    preset: what the stream's images are resized by.
    trains: whether the model is trained on it.

  Raises:
    ValueError: an image does not decode; the message names it.
  """
  if stays_in_files(stream, data_config, preset, trains=trains):
    logging.info("%d images stay in their files", len(stream))
    return stream
  key = {"split": stream.digest, "stamp": stream.stamp}
  return cache.cached_split(key, lambda: arrays.take(stream), data_config.cache_dir)


def place_all(
  streams: Mapping[str, StreamSplit],
  data_config: ml_collections.ConfigDict,
  preset: Preset,
  decoded: Mapping[str, ArraySplit] = _NOTHING,
) -> dict[str, Split]:
  """Returns the splits of a task, each where it stays.

  Args:
    streams: train, train_val, and what there is of val and test; train_val holds
      train and then val.
    data_config: see `place`.
    preset: what the streams' images are resized by.
    decoded: those of train, val and test that are in memory already.
  """
  placed: dict[str, Split] = {}
  for name in ("train", "val", "test"):
    if name in decoded:
      placed[name] = decoded[name]
    elif name in streams:
      trains = name == "train"
      placed[name] = place(streams[name], data_config, preset, trains=trains)
  train, val, both = placed["train"], placed.get("val"), streams["train_val"]
  if val is None:
    both = train
  elif isinstance(train, ArraySplit) and isinstance(val, ArraySplit):
    if not stays_in_files(both, data_config, preset, trains=True):
      # Each image is decoded once.
      both = arrays.concatenate(train, val)
  placed["train_val"] = both
  order = ("train", "val", "train_val", "test")
  return {name: placed[name] for name in order if name in placed}

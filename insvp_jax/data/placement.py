"""Where a split's images stay: decoded in memory, or in their files."""

from collections.abc import Mapping

from absl import logging
import ml_collections

from insvp_jax.data import arrays, cache
from insvp_jax.data.arrays import ArraySplit
from insvp_jax.data.preprocess import Preset
from insvp_jax.data.splits import Split, StreamSplit

_MIB = 2**20


def place(
  stream: StreamSplit,
  data_config: ml_collections.ConfigDict,
  preset: Preset,
  *,
  trains: bool,
) -> Split:
  """Returns the split in memory if it is small, else as it is.

  A training set whose preset crops from the whole of elongated images stays in its
  files whatever its size: memory holds squares.

  Args:
    stream: the split.
    data_config: `resident_mb`, the most MiB that a split may take in memory;
      `cache_dir` keeps decoded splits.
    preset: what the stream's images are resized by.
    trains: whether the model is trained on it.

  Raises:
    ValueError: an image does not decode; the message names it.
  """
  cropped = trains and preset.augments and preset.keeps_aspect and not stream.square
  if cropped or stream.nbytes > data_config.resident_mb * _MIB:
    logging.info("%d images stay in their files", len(stream))
    return stream
  key = {"split": stream.digest, "stamp": stream.stamp}
  return cache.cached_split(key, lambda: arrays.take(stream), data_config.cache_dir)


def place_all(
  streams: Mapping[str, StreamSplit],
  data_config: ml_collections.ConfigDict,
  preset: Preset,
) -> dict[str, Split]:
  """Returns the splits of a task, each where it stays.

  Args:
    streams: train, train_val, and what there is of val and test; train_val holds
      train and then val.
    data_config: see `place`.
    preset: what the streams' images are resized by.
  """
  placed: dict[str, Split] = {}
  for name in ("train", "val", "test"):
    if name in streams:
      trains = name == "train"
      placed[name] = place(streams[name], data_config, preset, trains=trains)
  both = streams["train_val"]
  train, val = placed["train"], placed.get("val")
  if both.nbytes <= data_config.resident_mb * _MIB:
    if isinstance(train, ArraySplit) and isinstance(val, ArraySplit):
      # Each image is decoded once.
      both = arrays.concatenate(train, val)
    elif isinstance(train, ArraySplit) and val is None:
      both = train
  order = ("train", "val", "train_val", "test")
  placed["train_val"] = both
  return {name: placed[name] for name in order if name in placed}

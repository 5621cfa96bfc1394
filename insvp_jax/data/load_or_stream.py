"""Which splits are decoded into memory, and which are streamed from their files.

A split is loaded where its stored squares take at most `data.resident_mb`. The one
exception is a training set of elongated images whose preset crops from the whole image:
memory holds squares only, so such a set is streamed whatever its size.
"""

from collections.abc import Mapping
import types

from absl import logging
import ml_collections

from insvp_jax.data import cache, splits
from insvp_jax.data.preprocess import Preset
from insvp_jax.data.splits import ArraySplit, Split, StreamSplit

_MIB = 2**20
_NONE_DECODED: Mapping[str, ArraySplit] = types.MappingProxyType({})


def fits_in_memory(stream: StreamSplit, data_config: ml_collections.ConfigDict) -> bool:
  """Returns whether the stored squares take at most `resident_mb` MiB of memory."""
  return stream.nbytes <= data_config.resident_mb * _MIB


def stays_streamed(
  stream: StreamSplit,
  data_config: ml_collections.ConfigDict,
  preset: Preset,
  *,
  trains: bool,
) -> bool:
  """Returns whether a split is streamed: a large one, or one of elongated images.

  Args:
    stream: the split.
    data_config: the section config.data; `resident_mb` is read, the most MiB that a
      split may take in memory.
    preset: the preset that the stream's images are resized by.
    trains: whether the model is trained on the split. Evaluation needs the stored
      squares only, so elongated images do not keep its splits out of memory.
  """
  elongated = trains and preset.crops_whole_images and not stream.square
  return elongated or not fits_in_memory(stream, data_config)


def load_or_stream(
  stream: StreamSplit,
  data_config: ml_collections.ConfigDict,
  preset: Preset,
  *,
  trains: bool,
) -> Split:
  """Returns the split in memory, or unchanged where it `stays_streamed`.

  Args:
    stream: the split.
    data_config: the section config.data; `resident_mb` decides, and `cache_dir` keeps
      decoded splits.
    preset: the preset that the stream's images are resized by.
    trains: whether the model is trained on the split.

  Raises:
    ValueError: if an image does not decode; the message names it.
  """
  if stays_streamed(stream, data_config, preset, trains=trains):
    logging.info("%d images stay in their files", len(stream))
    return stream
  key = {"split": stream.digest, "stamp": stream.stamp}
  return cache.cached_split(
    key, lambda: splits.to_memory(stream), data_config.cache_dir
  )


def load_or_stream_all(
  streams: Mapping[str, StreamSplit],
  data_config: ml_collections.ConfigDict,
  preset: Preset,
  decoded: Mapping[str, ArraySplit] = _NONE_DECODED,
) -> dict[str, Split]:
  """Returns the splits of a task, each in memory or streamed.

  Args:
    streams: "train", "train_val", and what there is of "val" and "test"; train_val
      holds the examples of train and then those of val.
    data_config: the section config.data, as for `load_or_stream`.
    preset: the preset that the streams' images are resized by.
    decoded: those of train, val and test that are in memory already.

  Raises:
    ValueError: if an image does not decode; the message names it.
  """
  loaded: dict[str, Split] = {}
  for name in ("train", "val", "test"):
    if name in decoded:
      loaded[name] = decoded[name]
    elif name in streams:
      trains = name == "train"
      loaded[name] = load_or_stream(streams[name], data_config, preset, trains=trains)
  train, val, both = loaded["train"], loaded.get("val"), streams["train_val"]
  if val is None:
    both = train
  elif isinstance(train, ArraySplit) and isinstance(val, ArraySplit):
    # Made of the two parts, so that each image is decoded once. Both together may be
    # too large for memory where each part is not.
    if not stays_streamed(both, data_config, preset, trains=True):
      both = splits.concatenate(train, val)
  loaded["train_val"] = both
  order = ("train", "val", "train_val", "test")
  return {name: loaded[name] for name in order if name in loaded}

"""The images of TFRecords: read by one thread, decoded by TensorFlow's."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
import contextlib
import functools
import hashlib
import itertools
import os
from typing import Any

import numpy as np

from insvp_jax.data import preprocess
from insvp_jax.data import splits as splits_lib
from insvp_jax.data.sources import tfrecords
from insvp_jax.data.sources.tfrecords import Records
from insvp_jax.data.splits import StreamSplit
from insvp_jax.data.tasks import Task

_CHUNK = 32
# Of records that were read and wait to be decoded.
_AHEAD = 2
# Of images that are decoded at a time, so that a large one holds nobody up.
_CALLS_PER_CORE = 4
# Raise it when decoding changes: splits decoded before are then decoded anew.
_DECODER = 1


def stream(
  builder: Any,
  task: Task,
  records: Records,
  preset: preprocess.Preset,
  image_size: int,
) -> StreamSplit:
  """Returns the split of some records, decoded while it is read."""
  size = preset.stored_size(image_size)
  sha = hashlib.sha256(records.identity().encode())
  sha.update(f"{task.label_rule} {preset.resize} {size} {_DECODER}".encode())
  height, width = builder.info.features["image"].shape[:2]
  return StreamSplit(
    labels=records.labels,
    size=size,
    identity=sha.hexdigest(),
    open=functools.partial(_read, builder, task, records, preset, image_size),
    square=height is not None and height == width or not preset.keeps_aspect,
  )


def _read(
  builder: Any,
  task: Task,
  records: Records,
  preset: preprocess.Preset,
  image_size: int,
  requests: Iterable[np.ndarray],
  whole: bool,
) -> Iterator[Any]:
  """Yields the decoded and resized images of each request."""
  decode = decoder(builder, task, preset, image_size, whole)
  read = functools.partial(_decode_all, records, decode)
  # Images of one size come out of TensorFlow a request at a time.
  serve = splits_lib.grouped if whole else splits_lib.joined
  with contextlib.closing(serve(requests, read)) as pieces:
    yield from pieces


def _decode_all(
  records: Records, decode: Callable, positions: Iterator[int], together: int = 0
) -> Iterator[np.ndarray]:
  """Yields decoded images, read by one thread and decoded by TensorFlow's.

  Args:
    records: where they lie.
    decode: from `decoder`.
    positions: of the images.
    together: how many to stack; 0 yields them one by one.
  """
  import tensorflow as tf

  asked: deque[int] = deque()
  failed: list[Exception] = []

  def read() -> Iterator[list[bytes]]:
    try:
      with _Files(records) as files:
        while chunk := list(itertools.islice(positions, _CHUNK)):
          asked.extend(chunk)
          yield [files.read(i) for i in chunk]
    except Exception as error:
      # TensorFlow would hand on its text alone.
      failed.append(error)
      raise

  data = tf.data.Dataset.from_generator(
    read, output_signature=tf.TensorSpec([None], tf.string)
  )
  data = data.prefetch(_AHEAD).unbatch()
  # AUTOTUNE now and then settles on one core.
  calls = _CALLS_PER_CORE * (os.cpu_count() or 1)
  data = data.map(decode, num_parallel_calls=calls, deterministic=True)
  if together:
    data = data.batch(together)
  data = data.prefetch(_AHEAD)
  options = tf.data.Options()
  options.autotune.enabled = False
  data = data.with_options(options)
  try:
    for piece in data.as_numpy_iterator():
      for _ in range(len(piece) if together else 1):
        asked.popleft()
      yield piece
  except tf.errors.OpError as error:
    if failed:
      raise failed[0] from None
    raise _explain(records, decode, list(asked), error) from error


def _explain(records: Records, decode, positions: list[int], error) -> ValueError:
  """Returns an error that names the image at which decoding stopped."""
  import tensorflow as tf

  with _Files(records) as files:
    for position in positions:
      try:
        decode(tf.constant(files.read(position)))
      except tf.errors.OpError as found:
        return ValueError(
          f"the image of {records.describe(position)} does not decode: "
          f"{tfrecords.first_line(found)}; prepare the data set anew."
        )
  return ValueError(f"reading {records.files[0]}: {tfrecords.first_line(error)}.")


class _Files:
  """The open files of some records."""

  def __init__(self, records: Records):
    self._records = records
    self._open: dict[int, int] = {}

  def __enter__(self) -> "_Files":
    return self

  def __exit__(self, *error: object) -> None:
    for handle in self._open.values():
      os.close(handle)

  def read(self, position: int) -> bytes:
    """Returns the data of a record.

    Raises:
      ValueError: it cannot be read.
    """
    records = self._records
    file = int(records.file[position])
    length = int(records.length[position])
    try:
      if file not in self._open:
        self._open[file] = os.open(records.files[file], os.O_RDONLY)
      data = os.pread(self._open[file], length, int(records.offset[position]))
    except OSError as error:
      raise ValueError(
        f"cannot read {records.describe(position)} ({error.strerror})."
      ) from error
    if len(data) < length:
      raise ValueError(
        f"{records.describe(position)} is cut off: the file became shorter after it "
        f"was opened. Start again."
      )
    return data


def decoder(
  builder: Any,
  task: Task,
  preset: preprocess.Preset,
  image_size: int,
  whole: bool = False,
) -> Callable[[Any], Any]:
  """Returns the graph function from a record's data to a resized uint8 image.

  Args:
    builder: of a prepared data set.
    task: says how pixels are scaled.
    preset: says how images are resized.
    image_size: side of the model's input in pixels.
    whole: leave an elongated image whole, where the preset keeps its aspect.
  """
  import tensorflow as tf

  features = tfrecords.pick(builder, {"image": True})
  channels = features["image"].shape[-1]
  size = preset.stored_size(image_size)
  resize = preprocess.resize_whole if whole else preprocess.resize

  def on_host(image: np.ndarray) -> np.ndarray:
    return resize(preset, image, image_size)

  def decode(data):
    # As TFDS decodes an image, without its checks of each shape: those cost a fifth.
    encoded = tf.io.parse_single_example(data, features.tf_example_spec)["image"]
    image = tf.io.decode_image(encoded, channels, expand_animations=False)
    image.set_shape([*features["image"].shape[:2], channels])
    if channels == 1:
      image = tf.tile(image, [1, 1, 3])
    if task.spec.startswith("dsprites"):
      # It stores 0 and 1; in uint8, as the official code does it.
      image = image * tf.constant(255, tf.uint8)
    if preset.resize == "tf1":
      # The C++ twin of preprocess.resize_tf1.
      floats = tf.raw_ops.ResizeBilinear(images=image[None], size=[size, size])[0]
      image = tf.cast(tf.round(floats), tf.uint8)
    else:
      image = tf.numpy_function(on_host, [image], tf.uint8, stateful=False)
    image.set_shape([None, None, 3] if whole else [size, size, 3])
    return image

  return decode

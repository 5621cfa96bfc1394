"""The images of TFRecords as a split: read by one thread, decoded by TensorFlow's."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
import contextlib
import functools
import hashlib
import itertools
import os
from typing import Any

import numpy as np

from insvp_jax.data import prefetch, preprocess
from insvp_jax.data.sources import tfrecords
from insvp_jax.data.sources.tfrecords import Records
from insvp_jax.data.splits import StreamSplit
from insvp_jax.data.tasks import Task

# Records that are read at a time.
_CHUNK = 32
# Chunks of records that wait to be decoded, and batches of images that wait to be used.
_AHEAD = 2
# Images that are decoded at a time, so that a large one holds nobody up.
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
  """Returns the split of some records, which are decoded while it is read.

  Args:
    builder: the builder of the prepared data set.
    task: the task that the records belong to.
    records: where the examples lie, with their labels.
    preset: how images are resized.
    image_size: side of the model's input in pixels.
  """
  size = preset.stored_size(image_size)
  sha = hashlib.sha256(records.digest().encode())
  sha.update(f"{task.label_rule} {preset.resize_key} {size} {_DECODER}".encode())
  # The sides that TFDS declares; None where images differ in size.
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
  """Yields the decoded and resized images of each request, as `Split.read` does."""
  decode = _create_decoder(builder, task, preset, image_size, whole)
  read = functools.partial(_decode_all, records, decode)
  # Images of one size come out of TensorFlow stacked, a request at a time.
  serve = prefetch.by_request if whole else prefetch.stacked_by_request
  with contextlib.closing(serve(requests, read)) as pieces:
    yield from pieces


def _decode_all(
  records: Records, decode: Callable, positions: Iterator[int], batch_size: int = 0
) -> Iterator[np.ndarray]:
  """Yields decoded images, read by one thread and decoded by TensorFlow's.

  Args:
    records: where the examples lie.
    decode: maps a record's data to its image, from `_create_decoder`.
    positions: positions of the images in the records; taken some way ahead.
    batch_size: how many images to stack; 0 yields them one by one.
  """
  import tensorflow as tf

  # Positions whose images have not come out yet, to find the one that is at fault.
  pending: deque[int] = deque()
  raised: list[Exception] = []

  def read() -> Iterator[list[bytes]]:
    try:
      with _RecordReader(records) as reader:
        while chunk := list(itertools.islice(positions, _CHUNK)):
          pending.extend(chunk)
          yield [reader.read(i) for i in chunk]
    except Exception as error:
      # TensorFlow would hand on the error's text alone.
      raised.append(error)
      raise

  data = tf.data.Dataset.from_generator(
    read, output_signature=tf.TensorSpec([None], tf.string)
  )
  data = data.prefetch(_AHEAD).unbatch()
  # A fixed number, because AUTOTUNE now and then settles on one core.
  calls = _CALLS_PER_CORE * (os.cpu_count() or 1)
  data = data.map(decode, num_parallel_calls=calls, deterministic=True)
  if batch_size:
    data = data.batch(batch_size)
  data = data.prefetch(_AHEAD)
  options = tf.data.Options()
  options.autotune.enabled = False
  data = data.with_options(options)
  try:
    for piece in data.as_numpy_iterator():
      for _ in range(len(piece) if batch_size else 1):
        pending.popleft()
      yield piece
  except tf.errors.OpError as error:
    if raised:
      raise raised[0] from None
    raise _decode_error(records, decode, list(pending), error) from error


def _decode_error(records: Records, decode, positions: list[int], error) -> ValueError:
  """Returns an error that names the image at which decoding stopped.

  Args:
    records: where the examples lie.
    decode: maps a record's data to its image.
    positions: positions of the images that may be at fault, in order.
    error: TensorFlow's error, which names none.
  """
  import tensorflow as tf

  # Decoded again one by one: the first that fails is the one.
  with _RecordReader(records) as reader:
    for position in positions:
      try:
        decode(tf.constant(reader.read(position)))
      except tf.errors.OpError as decode_error:
        return ValueError(
          f"the image of {records.location(position)} does not decode: "
          f"{tfrecords.short_message(decode_error)}; prepare the data set anew."
        )
  return ValueError(f"reading {records.files[0]}: {tfrecords.short_message(error)}.")


class _RecordReader:
  """Reads records at any position; keeps the files open until it is left."""

  def __init__(self, records: Records):
    self._records = records
    # By the file's index in `records.files`.
    self._handles: dict[int, int] = {}

  def __enter__(self) -> "_RecordReader":
    return self

  def __exit__(self, *error: object) -> None:
    for handle in self._handles.values():
      os.close(handle)

  def read(self, position: int) -> bytes:
    """Returns the data of a record.

    Raises:
      ValueError: if the record cannot be read.
    """
    records = self._records
    file = int(records.file[position])
    length = int(records.length[position])
    try:
      if file not in self._handles:
        self._handles[file] = os.open(records.files[file], os.O_RDONLY)
      data = os.pread(self._handles[file], length, int(records.offset[position]))
    except OSError as error:
      raise ValueError(
        f"cannot read {records.location(position)} ({error.strerror})."
      ) from error
    if len(data) < length:
      raise ValueError(
        f"{records.location(position)} is cut off: the file became shorter after it "
        f"was opened. Start again."
      )
    return data


def _create_decoder(
  builder: Any,
  task: Task,
  preset: preprocess.Preset,
  image_size: int,
  whole: bool,
) -> Callable[[Any], Any]:
  """Returns the TensorFlow function from a record's data to a resized uint8 image.

  Args:
    builder: the builder of the prepared data set.
    task: the task, which decides how pixels are scaled.
    preset: how images are resized.
    image_size: side of the model's input in pixels.
    whole: whether an elongated image stays whole, where the preset keeps its aspect
      ratio, instead of being cut to the stored square.
  """
  import tensorflow as tf

  features = tfrecords.select_features(builder, {"image": True})
  channels = features["image"].shape[-1]
  size = preset.stored_size(image_size)
  resize = preprocess.resize_whole if whole else preprocess.resize

  def resize_in_python(image: np.ndarray) -> np.ndarray:
    return resize(preset, image, image_size)

  def decode(data):
    # As TFDS decodes an image, without its checks of each shape: those cost a fifth.
    encoded = tf.io.parse_single_example(data, features.tf_example_spec)["image"]
    image = tf.io.decode_image(encoded, channels, expand_animations=False)
    image.set_shape([*features["image"].shape[:2], channels])
    if channels == 1:
      image = tf.tile(image, [1, 1, 3])
    if task.spec.startswith("dsprites"):
      # dSprites stores 0 and 1; scaled in uint8, as the official code does it.
      image = image * tf.constant(255, tf.uint8)
    if preset.resize == "tf1":
      # Equal to preprocess.resize_tf1, but in C++ and without Python's lock.
      floats = tf.raw_ops.ResizeBilinear(images=image[None], size=[size, size])[0]
      image = tf.cast(tf.round(floats), tf.uint8)
    else:
      image = tf.numpy_function(resize_in_python, [image], tf.uint8, stateful=False)
    image.set_shape([None, None, 3] if whole else [size, size, 3])
    return image

  return decode

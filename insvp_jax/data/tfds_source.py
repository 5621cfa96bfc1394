"""Reading prepared TensorFlow Datasets; with `tfrecords`, all that needs TensorFlow."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
import contextlib
import functools
import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import Any

from absl import logging
import ml_collections
import numpy as np

from insvp_jax.data import labels, name_lists, placement, preprocess, subsets, tfrecords
from insvp_jax.data import splits as splits_lib
from insvp_jax.data.arrays import TaskData
from insvp_jax.data.splits import StreamSplit
from insvp_jax.data.tasks import Task
from insvp_jax.data.tfrecords import Records

_CHUNK = 32
# Of records that were read and wait to be decoded.
_AHEAD = 2
# Of images that are decoded at a time, so that a large one holds nobody up.
_CALLS_PER_CORE = 4
# Raise it when decoding changes: splits decoded before are then decoded anew.
_DECODER = 1


def load(
  task: Task, data_config: ml_collections.ConfigDict, image_size: int
) -> TaskData:
  """Reads a task of `tasks.TASKS`, prepared by TFDS before.

  Args:
    task: a row of the table.
    data_config: `data_dir` is TFDS's folder ("" for its default); `subset`, `lists`,
      `split_seed`, `preset`, `resident_mb` and `cache_dir` as in `config`.
    image_size: side of the model's input in pixels.

  Returns:
    Splits train, val, train_val (both, in this order) and test.

  Raises:
    FileNotFoundError: the data set is not prepared, or files of it are missing.
    ValueError: the version on disk is another, or the files are damaged.
  """
  if not task.spec:
    raise FileNotFoundError(
      f"TFDS has no data set for {task.name}; point config.data.root to its folder. "
      f"python -m insvp_jax.tools.prepare_data --task={task.name} says what it holds."
    )
  preset = preprocess.get_preset(data_config.preset)
  task.subset(data_config.subset)
  builder = find_builder(task, data_config.data_dir)
  tfrecords.pick(builder, {"image": True})
  class_names = _class_names(builder, task)
  records = find_records(builder, task, data_config)
  streams = {
    name: _stream(builder, task, part, preset, image_size)
    for name, part in records.items()
  }
  for name, part in records.items():
    check_labels(part, len(class_names), name, task)
  sizes = {name: len(part) for name, part in records.items()}
  for warning in task.unpublished_sizes(sizes, data_config.subset):
    logging.warning("%s", warning)
  return TaskData(
    task.name,
    class_names,
    placement.place_all(streams, data_config, preset),
    source=_source(builder, task, data_config),
    final_split=task.final_split(data_config.subset),
  )


def check_labels(records: Records, num_classes: int, split: str, task: Task) -> None:
  """Checks that labels are class indices.

  Raises:
    ValueError: one is not; the message names its record.
  """
  wrong = np.flatnonzero((records.labels < 0) | (records.labels >= num_classes))
  if wrong.size:
    raise ValueError(
      f"the label of {records.describe(int(wrong[0]))} ({split} of {task.name}) is "
      f"{records.labels[wrong[0]]}, expected 0 to {num_classes - 1}: another data set, "
      f"or a damaged one; prepare {task.spec} anew."
    )


def _class_names(builder: Any, task: Task) -> tuple[str, ...]:
  rule = labels.LABEL_RULES[task.label_rule]
  if rule.class_names is not None:
    return tuple(rule.class_names)
  (feature,) = tfrecords.pick(builder, rule.features).values()
  names = tuple(getattr(feature, "names", None) or ())
  if len(names) != task.num_classes:
    raise ValueError(
      f"{builder.data_dir} has {len(names)} classes, {task.name} is published with "
      f"{task.num_classes}: another version or another data set."
    )
  return names


def find_records(
  builder: Any, task: Task, data_config: ml_collections.ConfigDict
) -> dict[str, Records]:
  """Returns where the examples of train, val, train_val and test lie.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: a file is damaged, or the data set is smaller than the published one.
  """
  subset = task.subset(data_config.subset)
  rule = labels.LABEL_RULES[task.label_rule]
  named = subset.rule in ("first", "shuffled", "long_tail", "lists")

  def find(expression: str, id_feature: str = "") -> Records:
    return tfrecords.find(builder, expression, rule, id_feature, data_config.cache_dir)

  if subset.rule == "slices":
    train, val = find(task.train), find(task.val)
  else:
    # Read first: all that may be wrong with lists is known before the long search.
    lists = name_lists.find(task, data_config.lists) if subset.rule == "lists" else {}
    everything = find(task.train, task.id_feature if named else "")
    if lists:
      found = name_lists.join(
        task, data_config.lists, lists, everything.names or (), everything.labels
      )
    else:
      found = subsets.draw(
        task, subset, everything.labels, everything.names, data_config.split_seed
      )
    train, val = (everything.take(positions) for positions in found)
  test = find(task.test)
  both = tfrecords.concatenate([train, val])
  return {"train": train, "val": val, "train_val": both, "test": test}


def import_tfds() -> Any:
  """Imports TFDS; TensorFlow must not take the accelerator's memory from JAX."""
  # Not its own lines on standard error: what they say of errors is in ours. "1" is
  # what JAX sets; whoever wants to see all of them sets "0".
  if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  import tensorflow as tf

  for kind in ("GPU", "TPU"):
    try:
      tf.config.set_visible_devices([], kind)
    except RuntimeError:  # TensorFlow is in use already: too late to hide them
      logging.warning("TensorFlow was started before; its %ss stay visible", kind)
  import tensorflow_datasets as tfds

  return tfds


def _source(builder: Any, task: Task, data_config: ml_collections.ConfigDict) -> str:
  tfds = import_tfds()
  source = f"tfds {builder.info.full_name} (tensorflow-datasets {tfds.__version__})"
  if len(task.subsets) > 1:
    source += f", subset {data_config.subset or next(iter(task.subsets))}"
  return source


def find_builder(task: Task, data_dir: str) -> Any:
  """Returns the builder of a prepared data set.

  Raises:
    FileNotFoundError: not prepared; the message holds the command that does it.
    ValueError: this TFDS does not know such a version, or it was prepared in another
      format of files.
  """
  tfds = import_tfds()
  from google.protobuf import json_format

  folder = str(Path(data_dir).expanduser()) if data_dir else None
  name = task.spec.split(":")[0]
  where = folder or "TFDS's default folder"
  argument = f" --data_dir={folder}" if folder else ""
  mend = (
    f"Prepare it once, on a machine with internet: python -m "
    f"insvp_jax.tools.prepare_data --task={task.name}{argument}, then point "
    f"config.data.data_dir to the folder."
  )
  try:
    builder = tfds.builder(task.spec, data_dir=folder)
  except (json.JSONDecodeError, json_format.Error) as error:
    raise ValueError(
      f"what describes {name} in {where} is damaged: {tfrecords.first_line(error)}. "
      f"Delete its folder. {mend}"
    ) from error
  except (AssertionError, ValueError, OSError) as error:
    raise ValueError(
      f"TFDS has no {task.spec} (for {task.name}), neither in its code nor in "
      f"{where}: {tfrecords.first_line(error)}"
    ) from error
  if not builder.info.splits:
    versions = _versions_on_disk(Path(builder.data_dir).parent)
    found = f" Found only: {', '.join(versions)}." if versions else ""
    raise FileNotFoundError(
      f"{task.name}: {name} {task.spec.split(':')[1]} is not prepared in {where}."
      f"{found} {mend}"
    )
  file_format = builder.info.file_format.value
  if file_format != "tfrecord":
    raise ValueError(
      f"{builder.data_dir} holds {file_format} files, expected tfrecord. {mend}"
    )
  return builder


def _versions_on_disk(folder: Path) -> list[str]:
  return sorted(path.parent.name for path in folder.glob("*/dataset_info.json"))


def _stream(
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

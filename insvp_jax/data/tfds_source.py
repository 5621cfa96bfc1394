"""Reading prepared TensorFlow Datasets. The only file that needs TensorFlow."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
import contextlib
import functools
import itertools
import os
from pathlib import Path
from typing import Any

from absl import logging
import ml_collections
import numpy as np

from insvp_jax.data import cache, preprocess
from insvp_jax.data.arrays import ArraySplit, TaskData, concatenate
from insvp_jax.data.tasks import LABEL_RULES, Task, supported

_CHUNK = 256


def load(
  task: Task, data_config: ml_collections.ConfigDict, image_size: int
) -> TaskData:
  """Reads a task of `tasks.TASKS`, prepared by TFDS before.

  Args:
    task: a row of the table.
    data_config: `data_dir` is TFDS's folder ("" for its default); `preset` and
      `cache_dir` as everywhere.
    image_size: side of the model's input in pixels.

  Returns:
    Splits train (800 for VTAB-1k), val (200), train_val (both, in this order) and
    test.

  Raises:
    FileNotFoundError: the data set is not prepared, or files of it are missing.
    ValueError: the task's label rule is not there, the version on disk is another,
      or the files are damaged.
  """
  if task.label_rule not in LABEL_RULES:
    raise ValueError(
      f"the task {task.name!r} needs the label rule {task.label_rule!r}, which is not "
      f"supported. Supported tasks: {', '.join(supported())}."
    )
  preset = preprocess.get_preset(data_config.preset)
  builder = _builder(task, data_config.data_dir)
  expressions = {"train": task.train, "val": task.val, "test": task.test}
  key = {
    "task": task.name,
    "builder": builder.info.full_name,
    "files": _fingerprint(Path(builder.data_dir)),
    "expressions": expressions,
    "resize": preset.resize,
    "size": preset.stored_size(image_size),
  }

  def read() -> TaskData:
    class_names = tuple(builder.info.features["label"].names)
    if len(class_names) != task.num_classes:
      raise ValueError(
        f"{builder.data_dir} has {len(class_names)} classes, {task.name} is published "
        f"with {task.num_classes}: another version or another data set."
      )
    splits = {
      name: _read_split(builder, expression, preset, image_size)
      for name, expression in expressions.items()
    }
    return TaskData(task.name, class_names, splits, source=_source(builder))

  return _with_train_val(cache.cached(key, read, data_config.cache_dir), task)


def _with_train_val(data: TaskData, task: Task) -> TaskData:
  """Adds the split train_val; warns of a test split of another size."""
  train, val, test = (data.splits[name] for name in ("train", "val", "test"))
  if len(test) != task.num_test:
    logging.warning(
      "%s: the test split has %d images, published are %d",
      task.name,
      len(test),
      task.num_test,
    )
  both = concatenate(train, val)
  splits = {"train": train, "val": val, "train_val": both, "test": test}
  return TaskData(data.name, data.class_names, splits, source=data.source)


def _import_tfds() -> Any:
  """Imports TFDS; TensorFlow must not take the accelerator's memory from JAX."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  import tensorflow as tf

  for kind in ("GPU", "TPU"):
    try:
      tf.config.set_visible_devices([], kind)
    except RuntimeError:  # TensorFlow is in use already: too late to hide them
      logging.warning("TensorFlow was started before; its %ss stay visible", kind)
  import tensorflow_datasets as tfds

  return tfds


def _source(builder: Any) -> str:
  tfds = _import_tfds()
  return f"tfds {builder.info.full_name} (tensorflow-datasets {tfds.__version__})"


def _builder(task: Task, data_dir: str) -> Any:
  """Returns the builder of a prepared data set.

  Raises:
    FileNotFoundError: not prepared; the message holds the command that does it.
    ValueError: this TFDS does not know such a version.
  """
  tfds = _import_tfds()
  folder = str(Path(data_dir).expanduser()) if data_dir else None
  name = task.spec.split(":")[0]
  where = folder or "TFDS's default folder"
  argument = f", data_dir={folder!r}" if folder else ""
  mend = (
    f'Prepare it once, on a machine with internet: python -c "import '
    f"tensorflow_datasets as tfds; tfds.builder('{task.spec}'{argument})"
    f'.download_and_prepare()", then point config.data.data_dir to the folder.'
  )
  try:
    builder = tfds.builder(task.spec, data_dir=folder)
  except (AssertionError, ValueError, OSError) as error:
    raise ValueError(
      f"TFDS has no {task.spec} (for {task.name}), neither in its code nor in "
      f"{where}: {_first_line(error)}"
    ) from error
  if not builder.info.splits:
    versions = _versions_on_disk(Path(builder.data_dir).parent)
    found = f" Found only: {', '.join(versions)}." if versions else ""
    raise FileNotFoundError(
      f"{task.name}: {name} {task.spec.split(':')[1]} is not prepared in {where}."
      f"{found} {mend}"
    )
  return builder


def _versions_on_disk(folder: Path) -> list[str]:
  return sorted(path.parent.name for path in folder.glob("*/dataset_info.json"))


def _fingerprint(folder: Path) -> list[Any]:
  return [cache.fingerprint(path) for path in sorted(folder.iterdir())]


def _read_split(
  builder: Any, expression: str, preset: preprocess.Preset, image_size: int
) -> ArraySplit:
  """Returns the images and labels of a TFDS split expression, in TFDS's order."""
  with _explained(builder, expression):
    number = builder.info.splits[expression].num_examples
    size = preset.stored_size(image_size)
    images = np.empty((number, size, size, 3), np.uint8)
    labels = np.empty((number,), np.int32)
    done = 0
    resize = functools.partial(_resize, preset=preset, image_size=image_size)
    examples = _examples(builder, expression)
    with ThreadPoolExecutor(min(8, max(2, os.cpu_count() or 2))) as pool:
      while chunk := list(itertools.islice(examples, _CHUNK)):
        here = slice(done, done + len(chunk))
        images[here] = list(pool.map(resize, [example["image"] for example in chunk]))
        labels[here] = [example["label"] for example in chunk]
        done += len(chunk)
    if done != number:
      raise ValueError(f"{done} examples, but dataset_info.json says {number}")
  return ArraySplit(images, labels)


def _examples(builder: Any, expression: str) -> Iterator[Any]:
  tfds = _import_tfds()
  dataset = builder.as_dataset(
    split=expression,
    shuffle_files=False,
    # Shard by shard: the order then does not depend on the number of shards.
    read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
    # Decodes nothing that is not needed.
    decoders=tfds.decode.PartialDecoding({"image": True, "label": True}),
  )
  return iter(tfds.as_numpy(dataset))


@contextlib.contextmanager
def _explained(builder: Any, expression: str) -> Iterator[None]:
  """Turns what goes wrong inside into one line that names the files and the mend."""
  import tensorflow as tf

  where = f"{expression} of {builder.data_dir}"
  mend = "prepare the data set anew"
  try:
    yield
  except tf.errors.NotFoundError as error:
    raise FileNotFoundError(
      f"{where}: a file is missing, {mend}: {_first_line(error)}."
    ) from error
  except tf.errors.OpError as error:
    raise ValueError(
      f"{where}: the files are damaged, {mend}: {_first_line(error)}."
    ) from error
  except ValueError as error:
    raise ValueError(f"{where}: {_first_line(error)}; {mend}.") from error


def _resize(pixels: Any, preset: preprocess.Preset, image_size: int) -> np.ndarray:
  return preprocess.resize(preset, np.asarray(pixels), image_size)


def _first_line(error: BaseException) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")

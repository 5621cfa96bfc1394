"""A task read from a prepared TensorFlow Dataset."""

from typing import Any

from absl import logging
import ml_collections
import numpy as np

from insvp_jax.data import labels, name_lists, placement, preprocess, subsets
from insvp_jax.data.arrays import TaskData
from insvp_jax.data.sources import tfds_builder, tfds_stream, tfrecords
from insvp_jax.data.sources.tfrecords import Records
from insvp_jax.data.tasks import Task


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
  builder = tfds_builder.find_builder(task, data_config.data_dir)
  tfrecords.pick(builder, {"image": True})
  class_names = _class_names(builder, task)
  records = find_records(builder, task, data_config)
  streams = {
    name: tfds_stream.stream(builder, task, part, preset, image_size)
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


def _source(builder: Any, task: Task, data_config: ml_collections.ConfigDict) -> str:
  tfds = tfds_builder.import_tfds()
  source = f"tfds {builder.info.full_name} (tensorflow-datasets {tfds.__version__})"
  if len(task.subsets) > 1:
    source += f", subset {data_config.subset or next(iter(task.subsets))}"
  return source

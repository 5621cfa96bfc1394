"""A task read from a data set that TFDS prepared.

`tfds_builder` finds the data set on disk, `tfrecords` finds where its examples lie and
computes their labels, this module divides them into splits, and `tfds_stream` decodes
their images.
"""

from typing import Any

from absl import logging
import ml_collections
import numpy as np

from insvp_jax.data import labels, load_or_stream, preprocess, subsets, vpt_lists
from insvp_jax.data.sources import tfds_builder, tfds_stream, tfrecords
from insvp_jax.data.sources.tfrecords import Records
from insvp_jax.data.splits import TaskData
from insvp_jax.data.tasks import Task


def load(
  task: Task, data_config: ml_collections.ConfigDict, image_size: int
) -> TaskData:
  """Reads a task whose data set was prepared by TFDS before.

  Args:
    task: a row of `tasks.TASKS`.
    data_config: the section config.data; `data_dir` is TFDS's folder ("" for its
      default); `subset`, `lists`, `split_seed`, `preset`, `resident_mb` and `cache_dir`
      are read, too.
    image_size: side of the model's input in pixels.

  Returns:
    The splits train, val, train_val (both, in this order) and test.

  Raises:
    FileNotFoundError: if the data set is not prepared, or files of it are missing.
    ValueError: if TFDS is not installed, the version on disk is another one, or files
      are damaged.
  """
  if not task.spec:
    raise FileNotFoundError(
      f"TFDS has no data set for {task.name}; point config.data.root to its folder. "
      f"insvp prepare --task={task.name} says what it holds."
    )
  preset = preprocess.get_preset(data_config.preset)
  # What may be wrong with the arguments or the data set's description is found out
  # before any file is searched, which takes long.
  task.subset(data_config.subset)
  builder = tfds_builder.find_builder(task, data_config.data_dir)
  tfrecords.select_features(builder, {"image": True})
  class_names = _class_names(builder, task)
  records = records_of_splits(builder, task, data_config)
  streams = {
    name: tfds_stream.stream(builder, task, part, preset, image_size)
    for name, part in records.items()
  }
  for name, part in records.items():
    _check_labels(part, len(class_names), name, task)
  sizes = {name: len(part) for name, part in records.items()}
  for warning in task.unpublished_sizes(sizes, data_config.subset):
    logging.warning("%s", warning)
  return TaskData(
    task.name,
    class_names,
    load_or_stream.load_or_stream_all(streams, data_config, preset),
    source=_source(builder, task, data_config),
    final_split=task.final_split(data_config.subset),
  )


def _check_labels(records: Records, num_classes: int, split: str, task: Task) -> None:
  """Checks that labels are class indices.

  Raises:
    ValueError: if one is not; the message names its record.
  """
  wrong = np.flatnonzero((records.labels < 0) | (records.labels >= num_classes))
  if wrong.size:
    raise ValueError(
      f"the label of {records.location(int(wrong[0]))} ({split} of {task.name}) is "
      f"{records.labels[wrong[0]]}, expected 0 to {num_classes - 1}: another data set, "
      f"or a damaged one; prepare {task.spec} anew."
    )


def _class_names(builder: Any, task: Task) -> tuple[str, ...]:
  """Returns one name per class, from the label rule or from TFDS's feature."""
  rule = labels.LABEL_RULES[task.label_rule]
  if rule.class_names is not None:
    return tuple(rule.class_names)
  (feature,) = tfrecords.select_features(builder, rule.features).values()
  names = tuple(getattr(feature, "names", None) or ())
  if len(names) != task.num_classes:
    raise ValueError(
      f"{builder.data_dir} has {len(names)} classes, {task.name} is published with "
      f"{task.num_classes}: another version or another data set."
    )
  return names


def records_of_splits(
  builder: Any, task: Task, data_config: ml_collections.ConfigDict
) -> dict[str, Records]:
  """Returns where the examples of train, val, train_val and test lie.

  Args:
    builder: the builder of the prepared data set.
    task: a row of `tasks.TASKS`.
    data_config: the section config.data, as for `load`.

  Raises:
    FileNotFoundError: if a file is missing.
    ValueError: if a file is damaged, or the data set is smaller than the published one.
  """
  subset = task.subset(data_config.subset)
  rule = labels.LABEL_RULES[task.label_rule]
  needs_names = subset.rule in ("first", "shuffled", "long_tail", "lists")

  def find(expression: str, id_feature: str = "") -> Records:
    return tfrecords.find_records(
      builder, expression, rule, id_feature, data_config.cache_dir
    )

  if subset.rule == "slices":
    train, val = find(task.train), find(task.val)
  else:
    # Read first: all that may be wrong with lists is known before the long search.
    lists = {}
    if subset.rule == "lists":
      lists = vpt_lists.read_train_val(task, data_config.lists)
    everything = find(task.train, task.id_feature if needs_names else "")
    if lists:
      chosen = vpt_lists.positions_in_tfds(
        task, data_config.lists, lists, everything.names or (), everything.labels
      )
    else:
      chosen = subsets.draw_train_val(
        task, subset, everything.labels, everything.names, data_config.split_seed
      )
    train, val = (everything.take(positions) for positions in chosen)
  test = find(task.test)
  both = tfrecords.concatenate([train, val])
  return {"train": train, "val": val, "train_val": both, "test": test}


def _source(builder: Any, task: Task, data_config: ml_collections.ConfigDict) -> str:
  """Returns what was read, with versions; stored with the result."""
  tfds = tfds_builder.import_tfds()
  source = f"tfds {builder.info.full_name} (tensorflow-datasets {tfds.__version__})"
  if len(task.subsets) > 1:
    source += f", subset {data_config.subset or next(iter(task.subsets))}"
  return source

"""Prepared TensorFlow Datasets, found on disk; where TensorFlow is first imported."""

import json
import os
from pathlib import Path
from typing import Any

from absl import logging

from insvp_jax.data.sources import tfrecords
from insvp_jax.data.tasks import Task


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

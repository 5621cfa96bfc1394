"""Finds a prepared data set on disk; TensorFlow is imported here and nowhere before."""

import json
import os
from pathlib import Path
from typing import Any

from absl import logging

from insvp_jax.data.sources import tfrecords
from insvp_jax.data.tasks import Task


def import_tfds(task: Task | None = None) -> Any:
  """Imports and returns TFDS, with the accelerators hidden from TensorFlow.

  TensorFlow would otherwise take the accelerators' memory from JAX.

  Args:
    task: what needs it, for the message; None where it is known to be there.

  Raises:
    ValueError: it is not installed; the message says how to install it.
  """
  try:
    return _import_tfds()
  except ModuleNotFoundError as error:
    # What these two lack themselves is another matter.
    if error.name not in ("tensorflow", "tensorflow_datasets") or task is None:
      raise
    instead = "; or name its files by config.data.root" if task.folder_format else ""
    raise ValueError(
      f"{task.name} needs TensorFlow Datasets: pip install 'insvp_jax[tfds]'{instead}"
    ) from error


def _import_tfds() -> Any:
  """Imports and returns TFDS, as `import_tfds` says."""
  # TensorFlow's own lines on standard error are silenced: what they say of errors is in
  # our messages. "1" is what JAX sets; whoever wants to see all of them sets "0".
  if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
  # oneDNN announces itself and rounds differently from machine to machine.
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

  Args:
    task: a row of `tasks.TASKS`; its `spec` names the data set and its versions.
    data_dir: TFDS's folder, as config.data.data_dir; "" for its default.

  Raises:
    FileNotFoundError: if the data set is not prepared; the message holds the command
      that does it.
    ValueError: if TFDS is not installed or does not know such a version, or the data
      set is damaged or was prepared in another format of files.
  """
  tfds = import_tfds(task)
  from google.protobuf import json_format

  folder = str(Path(data_dir).expanduser()) if data_dir else None
  name = task.spec.split(":")[0]
  where = folder or "TFDS's default folder"
  argument = f" --data_dir={folder}" if folder else ""
  advice = (
    f"Prepare it once, on a machine with internet: insvp prepare --task={task.name}"
    f"{argument}, then point config.data.data_dir to the folder."
  )
  try:
    builder = tfds.builder(task.spec, data_dir=folder)
  except (json.JSONDecodeError, json_format.Error) as error:
    raise ValueError(
      f"what describes {name} in {where} is damaged: {tfrecords.short_message(error)}. "
      f"Delete its folder. {advice}"
    ) from error
  except (AssertionError, ValueError, OSError) as error:
    raise ValueError(
      f"TFDS has no {task.spec} (for {task.name}), neither in its code nor in "
      f"{where}: {tfrecords.short_message(error)}"
    ) from error
  # A builder of what is not prepared comes from TFDS's code and has no splits.
  if not builder.info.splits:
    versions = _versions_on_disk(Path(builder.data_dir).parent)
    found = f" Found only: {', '.join(versions)}." if versions else ""
    raise FileNotFoundError(
      f"{task.name}: {name} {task.spec.split(':')[1]} is not prepared in {where}."
      f"{found} {advice}"
    )
  file_format = builder.info.file_format.value
  if file_format != "tfrecord":
    raise ValueError(
      f"{builder.data_dir} holds {file_format} files, expected tfrecord. {advice}"
    )
  return builder


def _versions_on_disk(folder: Path) -> list[str]:
  """Returns the prepared versions in a data set's folder."""
  return sorted(path.parent.name for path in folder.glob("*/dataset_info.json"))

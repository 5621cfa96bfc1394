"""Own images in three lines of Python: `insvp_jax.adapt(train, workdir=...)`.

The protocol is that of `configs/folder.py` with one method and one seed. What a
notebook has is made what the command line has: files become the task `folder`, images
in memory are read by `data.sources.memory`.
"""

from collections.abc import Mapping
import functools
import os
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from insvp_jax import config as config_lib
from insvp_jax import config_checks, config_files, trees
from insvp_jax.data import load_data
from insvp_jax.data.sources import image_folder, memory, segment_folder
from insvp_jax.run import Run, load_run
from insvp_jax.search import tune
from insvp_jax.train.trainer import ReadData

# What `adapt` decides, and what does it in their place.
_NOT_SETTINGS = {
  "task": "the images are the argument train",
  "method": "it is an argument of its own",
  "backbone.name": "it is the argument backbone",
  "tune.methods": "adapt trains one method, insvp_jax.tune compares several",
  "tune.variants": "adapt trains one method, insvp_jax.tune compares several",
  "data.labels": "a CSV is given as train",
}


def adapt(
  train: Any,
  val: Any = None,
  test: Any = None,
  *,
  workdir: str | os.PathLike,
  backbone: str | os.PathLike = "boxed",
  method: str = "insvp",
  lr: float | int | None = None,
  **settings: Any,
) -> Run:
  """Adapts a backbone to labelled images, and returns the run, ready to be used.

  The learning rate is chosen on val among those of `configs/folder.py`; what is
  returned is trained again on train + val, and its result is that on test. With `lr`
  nothing is chosen, and it is one training on train + val. Val and test that are not
  given are drawn from train, stratified and seeded, by `data.val_fraction` (a tenth)
  and `data.test_fraction` (a fifth; 0 for none).

  Images are given as

  - a folder or .zip of images with masks, as the task `segment_folder` reads it; then
    the settings are those of `configs/segment.py`, the run is one of segmentation, and
    what is said of accuracy above is so of mIoU;
  - a folder of `<class>/<image>`, or of splits of these, or a .zip of one;
  - a .csv of paths and labels, relative to it or to `data.root`;
  - a pair (images, labels): uint8 [n, h, w, 3], or a list of images of different sizes,
    and whole numbers or texts;
  - anything that yields (image, label) pairs or dicts, such as a data set of Hugging
    Face or torchvision. Images are arrays, Pillow's, paths or contents of files.

  The same call in the same workdir goes on where an earlier one was stopped, or returns
  the finished run; with other images it is refused.

  Args:
    train: the images to learn from.
    val: those to choose on; None for the split of `train`, or a part of it.
    test: those to be tested on; as `val`. Paths go with paths only.
    workdir: of the search; the run lies in `<workdir>/<method>/seed<n>`.
    backbone: as config.backbone.name: a release, a variant, a file, timm/... or
      hf-hub:...
    method: as config.method; of InsVP it is the preset of `configs/folder.py`, "tuned".
    lr: learning rate at the schedule's peak, config.optim.lr; None chooses.
    **settings: further keys of the config: `total_epochs=10`, `data=dict(shots=4)`, or
      `**{"data.shots": 4}`.

  Returns:
    The final run; of several `tune.seeds` that of the first.

  Raises:
    ValueError: bad input, or images other than those of the run in the workdir; the
      message says what came and what was expected.
    FileNotFoundError: images, weights or a CSV are not there.
    Stopped: SIGINT or SIGTERM came; a checkpoint of the final run was written.
  """
  changes = _flatten(settings)
  if lr is not None:
    if "optim.lr" in changes:
      raise ValueError("adapt got both lr and optim.lr; leave one out.")
    changes["optim.lr"] = lr
  given = {"train": train, "val": val, "test": test}
  has_masks = _has_masks(given)
  config = _config(os.fspath(backbone), method, changes, has_masks=has_masks)
  read = _open(config, {k: images for k, images in given.items() if images is not None})
  tune.run(config, workdir, read=read)
  return load_run(next(iter(tune.first_runs(config, workdir).values())))


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns {"section.key": value} of keys and of sections as dicts."""
  flat: dict[str, Any] = {}
  for name, value in settings.items():
    key = f"{prefix}{name}"
    value = value.to_dict() if isinstance(value, ConfigDict) else value
    own = _flatten(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    if both := set(own) & set(flat):
      raise ValueError(f"adapt got {min(both)} twice; leave one out.")
    flat |= own
  return flat


def _has_masks(given: Mapping[str, Any]) -> bool:
  """Returns whether the images come with masks.

  Raises:
    ValueError: they do, and are not one folder.
  """
  train, others = given["train"], (given["val"], given["test"])
  if not isinstance(train, str | os.PathLike) or image_folder.is_csv(os.fspath(train)):
    return False
  if not segment_folder.is_one(os.fspath(train)):
    return False
  if any(other is not None for other in others):
    raise ValueError(
      f"{os.fspath(train)} has images with masks; expected val and test in the same "
      "folder, as images/val and masks/val, or none of them."
    )
  return True


def _config(
  backbone: str, method: str, changes: Mapping[str, Any], *, has_masks: bool = False
) -> ConfigDict:
  """Returns configs/folder.py for one method, one seed and some changes.

  For images with masks it is configs/segment.py, with the learning rates of the other.

  Raises:
    ValueError: there is no such key, or it does not take the value.
  """
  parser = config_files.ConfigParser()
  config = parser.parse(config_files.find("folder"))
  task = "folder"
  if has_masks:
    rates, task = config.tune.lr, "segment_folder"
    config = parser.parse(config_files.find("segment"))
    config.tune.lr = rates
  arg = config_lib.parse_arg("", task=task, method=method, backbone=backbone)
  config = config_lib.select(config, arg)
  config.tune.seeds = (config.seed,)
  known = config_lib.keys()
  for key, value in changes.items():
    if key in _NOT_SETTINGS:
      raise ValueError(f"adapt takes no {key}: {_NOT_SETTINGS[key]}.")
    if key not in known:
      raise ValueError(
        f"adapt got {key}, which is no key of the config."
        f"{trees.did_you_mean(key, known)}"
      )
    value = value.item() if isinstance(value, np.generic) else value
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    value = tuple(value) if isinstance(value, list) else value
    config_checks.check_value(key, value)
    section, _, name = key.rpartition(".")
    (config[section] if section else config)[name] = value
  config_lib.apply_overrides(config, changes, tunes=False)
  return config


def _open(config: ConfigDict, given: Mapping[str, Any]) -> ReadData | None:
  """Says in the config where the images are; returns what reads them.

  Args:
    config: changed in place.
    given: what there is of train, val and test.

  Returns:
    None where `config` says all.

  Raises:
    ValueError: paths and images in memory are mixed, or cannot be read.
  """
  paths = {
    k: os.fspath(v) for k, v in given.items() if isinstance(v, str | os.PathLike)
  }
  is_csv = any(map(image_folder.is_csv, paths.values()))
  if config.data.root and not is_csv:
    raise ValueError(
      f"adapt got data.root={config.data.root!r}, which is where the paths of a CSV "
      "start from, but no CSV; leave it out."
    )
  if not paths:
    config.task = memory.TASK
    examples = {k: memory.collect(v, k, config.data) for k, v in given.items()}
    load = functools.partial(memory.load, examples)
  elif len(paths) < len(given):
    other = next(name for name in given if name not in paths)
    raise ValueError(
      f"{next(iter(paths))} is a path and {other} is not; give both as paths, or both "
      "as images."
    )
  elif len(paths) == 1:
    if is_csv:
      config.data.labels = paths["train"]
    else:
      config.data.root = paths["train"]
    return None
  else:
    config.data.root, layout = image_folder.join_layouts(paths, config.data)
    load = functools.partial(image_folder.load, layout=layout)
  return functools.partial(load_data, load=load)

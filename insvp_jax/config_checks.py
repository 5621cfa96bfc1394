"""What can be checked of a configuration before any data or device is touched."""

import math
import re
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from insvp_jax import config as config_lib
from insvp_jax import trees


def validate(config: ConfigDict) -> None:
  """Checks what can be checked before any data or device is touched.

  Raises:
    ValueError: names the key, its value and what is expected.
  """
  known = trees.flatten(config_lib.defaults().to_dict())
  missing = [name for name in known if not _has(config, name)]
  if missing:
    raise ValueError(
      f"the config lacks {', '.join(sorted(missing)).replace('/', '.')}; start it from "
      "insvp_jax.config.defaults()."
    )
  for key, low, high in _RANGES:
    value = _get(config, key)
    if not low <= value < math.inf or value > high:
      expected = f"at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
      raise ValueError(f"config.{key} is {value}, expected {expected}.")
  if config.total_steps == 0 and config.total_epochs == 0:
    raise ValueError(
      f"config.total_epochs is {config.total_epochs} and config.total_steps is 0; one "
      "of them must be positive."
    )
  if not 0 <= config.loss.label_smoothing < 1:
    raise ValueError(
      f"config.loss.label_smoothing is {config.loss.label_smoothing}, expected in "
      "[0, 1)."
    )
  for key in ("root", "data_dir", "cache_dir", "lists"):
    check_folder(f"config.data.{key}", config.data[key])
  config_lib.profile_steps(config)
  _check_tune(config.tune)
  if config.tune.select != "val":
    raise ValueError(
      f"config.tune.select is {config.tune.select!r}, expected 'val'. The test split "
      "never selects anything: it is seen once, by the final runs."
    )
  for pattern in config.optim.no_decay:
    try:
      re.compile(pattern)
    except (re.error, TypeError) as error:
      raise ValueError(
        f"config.optim.no_decay has {pattern!r}, expected regular expressions over "
        f"parameter names: {error}."
      ) from error
  if config.data.duplicates not in ("warn", "drop", "error"):
    raise ValueError(
      f"config.data.duplicates is {config.data.duplicates!r}, expected 'warn', 'drop' "
      "or 'error'."
    )
  if config.backbone.init not in ("default", "mimetic"):
    raise ValueError(
      f"config.backbone.init is {config.backbone.init!r}, expected 'default' or "
      "'mimetic'."
    )
  if config.data.train_split not in ("train", "train_val"):
    raise ValueError(
      f"config.data.train_split is {config.data.train_split!r}, expected 'train' or "
      "'train_val'. The test split never trains and never selects."
    )
  for key in ("dtype", "frozen_dtype"):
    if config.backbone[key] not in ("float32", "bfloat16"):
      raise ValueError(
        f"config.backbone.{key} is {config.backbone[key]!r}, expected 'float32' or "
        "'bfloat16'."
      )


def check_folder(name: str, path: str) -> None:
  """Checks that a folder is not given as a URL.

  Args:
    name: of the setting, for the message.
    path: its value; "" for none.

  Raises:
    ValueError: it is one.
  """
  if "://" in path:
    raise ValueError(
      f"{name} is {path}, a URL; expected a folder. Mount the bucket (gcsfuse does) "
      "and name the folder."
    )


# (key, lowest value, highest value).
_RANGES = (
  ("batch_size", 1, math.inf),
  ("eval_batch_size", 1, math.inf),
  ("log_every_steps", 1, math.inf),
  ("steps_per_call", 0, math.inf),
  ("eval_every_epochs", 0, math.inf),
  ("checkpoint_every_epochs", 0, math.inf),
  ("total_steps", 0, math.inf),
  ("total_epochs", 0, math.inf),
  ("image_size", 0, math.inf),
  ("backbone.fsdp", 1, math.inf),
  ("plan.num_classes", 0, math.inf),
  ("plan.num_train", 0, math.inf),
  ("prompt_images", 0, math.inf),
  ("keep_checkpoints", 1, math.inf),
  ("data.resident_mb", 0, math.inf),
  ("tune.population", 0, math.inf),
  ("data.val_fraction", 0, 1),
  ("data.test_fraction", 0, 1),
  ("loss.mixup_alpha", 0, math.inf),
  ("loss.cutmix_alpha", 0, math.inf),
  ("loss.mix_prob", 0, 1),
  ("loss.mix_switch_prob", 0, 1),
)


# {key of config.tune: (type of its values, what they are, an example)}.
_SEARCHED = {
  "methods": (str, "names of methods", "('insvp', 'linear')"),
  "lr": (float | int, "numbers >= 0", "(0.001, 0.01)"),
  "wd": (float | int, "numbers >= 0", "(0.0001, 0.01)"),
  "seeds": (int, "whole numbers", "(0, 1, 2)"),
}


def _check_tune(tune: ConfigDict) -> None:
  # ml_collections checks that these are tuples, not what is in them.
  for key, (kind, expected, example) in _SEARCHED.items():
    for value in tune[key]:
      is_wrong = isinstance(value, bool) or not isinstance(value, kind)
      if is_wrong or (key in ("lr", "wd") and not 0 <= value < math.inf):
        raise ValueError(
          f"config.tune.{key} has {value!r}, expected {expected}, e.g. "
          f'--config.tune.{key}="{example}".'
        )
    _check_unique(key, tune[key])
  for key, values in tune.grid.items():
    for value in values:
      if not all(isinstance(x, float | int) for x in np.atleast_1d(value).tolist()):
        raise ValueError(
          f"config.tune.grid.{key} has {value!r}, expected numbers, or pairs of them."
        )
    _check_unique(f"grid.{key}", values)


def _check_unique(key: str, values: tuple) -> None:
  if len(set(values)) < len(values):
    raise ValueError(f"config.tune.{key} is {values}: a value is there twice.")


def _get(config: ConfigDict, key: str) -> Any:
  section, _, field = key.rpartition(".")
  return config[section][field] if section else config[field]


def _has(config: ConfigDict, name: str) -> bool:
  node: Any = config
  for part in name.split("/"):
    if part not in node:
      return False
    node = node[part]
  return True

"""What can be checked of a configuration before any data or device is touched."""

from collections.abc import Mapping, Sequence
import os
from pathlib import Path
import re
import sys
from typing import Any

from ml_collections import ConfigDict

from insvp_jax import config as config_lib
from insvp_jax import trees
from insvp_jax.config_variants import Variant, is_shared, variants_of
from insvp_jax.methods import METHODS, fields, parts_of


def validate(config: ConfigDict) -> None:
  """Checks what can be checked before any data or device is touched.

  Raises:
    ValueError: names the key, its value and what is expected.
  """
  check_keys(config)
  for key, (default, _) in config_lib.keys().items():
    _check_value(key, _get(config, key), default)
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
  if config.data.sampling not in ("uniform", "balanced"):
    raise ValueError(
      f"config.data.sampling is {config.data.sampling!r}, expected 'uniform' or "
      "'balanced'."
    )
  if config.data.sampling == "balanced" and config.loss.class_weights:
    raise ValueError(
      "config.data.sampling is 'balanced' and config.loss.class_weights is True: each "
      "makes all classes count alike, both together would favour the small ones; "
      "expected one of them."
    )
  for key in ("root", "data_dir", "cache_dir", "lists", "labels"):
    check_folder(f"config.data.{key}", config.data[key])
  _check_home("config.backbone.weights", config.backbone.weights)
  config_lib.profile_steps(config)
  _check_tune(config.tune)
  _check_variants(config)
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
  if config.data.shots and config.data.fraction != 1:
    raise ValueError(
      f"both config.data.shots = {config.data.shots} and config.data.fraction = "
      f"{config.data.fraction:g} were given; leave one out."
    )
  _check_segment(config.segment)
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
  for key, known in (
    ("dtype", ("float32", "bfloat16")),
    ("frozen_dtype", config_lib.FROZEN_DTYPES),
  ):
    if config.backbone[key] not in known:
      raise ValueError(
        f"config.backbone.{key} is {config.backbone[key]!r}, expected "
        f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}."
      )


def _check_segment(segment: ConfigDict) -> None:
  """Checks the values of config.segment that types and ranges say nothing of.

  Raises:
    ValueError: names the key, its value and what is expected.
  """
  if segment.resize not in ("shorter", "none"):
    raise ValueError(
      f"config.segment.resize is {segment.resize!r}, expected 'shorter' or 'none'."
    )
  for key, count in (("train_scales", 2), ("scales", None)):
    scales = segment[key]
    are_numbers = all(
      isinstance(x, float | int) and not isinstance(x, bool) and 0.01 <= x <= 100
      for x in scales
    )
    if not scales or not are_numbers or count not in (None, len(scales)):
      raise ValueError(
        f"config.segment.{key} is {scales!r}, expected {count or 'some'} numbers in "
        "[0.01, 100], e.g. (0.5, 2.0)."
      )
  low, high = segment.train_scales
  if low > high:
    raise ValueError(
      f"config.segment.train_scales is {segment.train_scales!r}, expected the least "
      "factor first."
    )
  for block in segment.aux_blocks or ():
    if not isinstance(block, int) or isinstance(block, bool):
      raise ValueError(
        f"config.segment.aux_blocks has {block!r}, expected numbers of blocks, counted "
        "from 1."
      )


def check_keys(config: ConfigDict) -> None:
  """Checks that a config has every key.

  Raises:
    ValueError: it lacks some.
  """
  missing = sorted(key for key in config_lib.keys() if not _has(config, key))
  if missing:
    more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
    raise ValueError(
      f"the config lacks {', '.join(missing[:5])}{more}; start it from "
      "insvp_jax.config.defaults()."
    )


def check_types(section: str, stored: Mapping[str, Any]) -> None:
  """Checks the values of a section of a config that a run has stored.

  Keys that are missing or not known belong to another version.

  Args:
    section: its name.
    stored: its values by name.

  Raises:
    ValueError: names the key, its value and what is expected.
  """
  known = config_lib.keys()
  for name, value in stored.items():
    if f"{section}.{name}" in known:
      _check_value(f"{section}.{name}", value, known[f"{section}.{name}"][0])


def check_value(key: str, value: Any) -> None:
  """Checks the type of the value of one of the config's keys.

  Args:
    key: such as "optim.lr".
    value: that it is to have.

  Raises:
    ValueError: names the key, its value and what is expected.
  """
  _check_value(key, value, config_lib.keys()[key][0])


def _check_value(key: str, value: Any, default: Any) -> None:
  """Checks the type of a key's value, and that the number is one it can become.

  Args:
    key: such as "optim.lr".
    value: of it.
    default: of it; a type for a None that takes values of that type.

  Raises:
    ValueError: names the key, its value and what is expected.
  """
  kind = default if isinstance(default, type) else type(default)
  if value is None and isinstance(default, type):
    return
  types, expected = _KINDS[kind]
  if not isinstance(value, types) or (isinstance(value, bool) and kind is not bool):
    raise ValueError(f"config.{key} is {_shown(value)}, expected {expected}.")
  if kind in (int, float):
    low, high = _RANGES.get(key, _RANGE_OF_KIND[kind])
    _check_number(f"config.{key} is", value, kind, low, high)


def _check_number(
  text: str, value: float | int, kind: type, low: float | int, high: float | int
) -> None:
  """Checks that a number is in a range, also as the float32 that it becomes.

  Args:
    text: how the message begins.
    value: the number.
    kind: int or float.
    low: the lowest allowed value.
    high: the highest one.

  Raises:
    ValueError: it is not.
  """
  # Not a chain of math.isnan: NaN fails every comparison.
  if not low <= value <= high:
    largest = config_lib.MAX_INT if kind is int else _LARGEST
    bounds = f"in [{low:.10g}, {high:.10g}]"
    if high == largest:
      bounds = f"at least {low:.10g}" + (f", at most {high}" if value > high else "")
    if low == -_LARGEST:
      bounds = "a finite number"
    raise ValueError(f"{text} {_shown(value)}, expected {bounds}.")
  # As float32 it would be 0, or lose its digits.
  if kind is float and 0 < abs(value) < _SMALLEST:
    raise ValueError(
      f"{text} {value}, expected 0 or a number of at least {_SMALLEST:g}: computed "
      "with in float32, it would be 0."
    )


def _shown(value: Any) -> str:
  """Returns a value as text; Python refuses to print integers of many digits."""
  if isinstance(value, int) and value.bit_length() > 256:
    return f"an integer of {value.bit_length()} bits"
  return repr(value)


def check_folder(name: str, path: str) -> None:
  """Checks that a folder is not given as a URL, nor in a home that there is not.

  Args:
    name: of the setting, for the message.
    path: its value; "" for none.

  Raises:
    ValueError: it is.
  """
  _check_home(name, path)
  if "://" in path:
    raise ValueError(
      f"{name} is {path}, a URL; expected a folder. Mount the bucket (gcsfuse does) "
      "and name the folder."
    )


def check_workdir(workdir: str | os.PathLike) -> None:
  """Checks that a run's folder has a name that checkpoints can be written to.

  Raises:
    ValueError: its path is no text, as in an ASCII locale or of bytes that are none.
  """
  path = os.path.abspath(workdir)
  try:
    path.encode()
  except UnicodeEncodeError as error:
    encoding = sys.getfilesystemencoding()
    raise ValueError(
      f"the workdir {path} is no text in {encoding}, expected a path that is. Choose "
      "another folder, or set LC_ALL=C.UTF-8."
    ) from error


def _check_home(name: str, path: str) -> None:
  try:
    Path(path).expanduser()
  except RuntimeError as error:
    raise ValueError(
      f"{name} is {path}, but there is no such home folder; expected a path in full."
    ) from error


# Of float32, in which all is computed.
_LARGEST, _SMALLEST = 3.4e38, 1e-37
_SEED = (0, config_lib.MAX_SEED)
_COUNT = (1, config_lib.MAX_INT)
_SHARE = (0, 1)
# What Python takes for a key of each type, and what it is called.
_KINDS: dict[type, tuple[Any, str]] = {
  bool: (bool, "True or False"),
  int: (int, "a whole number"),
  float: (float | int, "a number"),
  str: (str, "a text"),
  tuple: (tuple | list, "a tuple"),
}
# (lowest, highest) of a key of that type that is not in the table below.
_RANGE_OF_KIND = {int: (0, config_lib.MAX_INT), float: (-_LARGEST, _LARGEST)}
_NOT_NEGATIVE = (0, _LARGEST)
# (lowest, highest) by key. `optim.check_optim` and the methods check their own, too.
_RANGES: dict[str, tuple[float | int, float | int]] = {
  "seed": _SEED,
  "data.split_seed": _SEED,
  "eval_batch_size": (0, 2**16),  # batches are padded to it
  "log_every_steps": _COUNT,
  "eval_every_epochs": _NOT_NEGATIVE,
  "checkpoint_every_epochs": _NOT_NEGATIVE,
  "total_epochs": _NOT_NEGATIVE,
  "image_size": (0, 2**13),
  "prompt_images": (0, 256),  # rows of one picture
  "keep_checkpoints": _COUNT,
  "backbone.fsdp": _COUNT,
  "backbone.width": (1, 2**16),
  "backbone.depth": (1, 2**10),
  "backbone.mlp_dim": (1, 2**18),
  "backbone.num_heads": (1, 2**10),
  "backbone.patch_size": (1, 2**13),
  "backbone.window": (1, 2**10),
  "plan.num_classes": (0, 2**24),
  "data.val_fraction": _SHARE,
  "data.test_fraction": _SHARE,
  "data.fraction": (1e-6, 1),
  "data.max_pixels": _COUNT,
  "data.max_file_mb": (1, 2**20),
  "data.max_16bit": (0, 2**16 - 1),
  "data.ignore_label": (-1, 2**16 - 1),
  "segment.channels": (1, 2**12),
  "segment.aux_weight": _NOT_NEGATIVE,
  "segment.max_share": _SHARE,
  "segment.stride": (0, 2**13),
  "segment.batch_size": (1, 2**12),
  "optim.lr": _NOT_NEGATIVE,
  "optim.wd": _NOT_NEGATIVE,
  "loss.mixup_alpha": (0, 1e6),
  "loss.cutmix_alpha": (0, 1e6),
  "loss.mix_prob": _SHARE,
  "loss.mix_switch_prob": _SHARE,
}


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
      if is_wrong or (key in ("lr", "wd") and not value >= 0):
        raise ValueError(
          f"config.tune.{key} has {_shown(value)}, expected {expected}, e.g. "
          f'--config.tune.{key}="{example}".'
        )
      if key in ("lr", "wd"):
        _check_number(f"config.tune.{key} has", value, float, *_RANGES[f"optim.{key}"])
      if key == "seeds":
        _check_number("config.tune.seeds has", value, int, *_SEED)
    _check_unique(key, tune[key])
  _check_tuned_fields(tune.fields)
  for key, values in tune.grid.items():
    for value in values:
      numbers = value if isinstance(value, tuple | list) else (value,)
      if not all(isinstance(x, float | int) for x in numbers):
        raise ValueError(
          f"config.tune.grid.{key} has {value!r}, expected numbers, or pairs of them."
        )
      for number in numbers:
        _check_number(f"config.tune.grid.{key} has", number, float, -_LARGEST, _LARGEST)
    _check_unique(f"grid.{key}", values)


_PAIRS = (
  "pairs of a method's field and its values, e.g. "
  "--config.tune.fields=\"(('autovp.mapping', ('full', 'frequency')),)\""
)


def _check_tuned_fields(pairs: Sequence[Any]) -> None:
  """Checks `config.tune.fields`: form, names, types of the values.

  Whether a field can have a value, its method says, once there is one.

  Raises:
    ValueError: names the key, its value and what is expected.
  """
  for pair in pairs:
    is_pair = isinstance(pair, tuple | list) and len(pair) == 2
    if not (is_pair and isinstance(pair[0], str) and isinstance(pair[1], tuple | list)):
      raise ValueError(f"config.tune.fields has {pair!r}, expected {_PAIRS}.")
    name, values = pair
    if not values or None in values or any(values.count(x) > 1 for x in values):
      raise ValueError(
        f"config.tune.fields: {name} has the values {values!r}, expected one or more, "
        "each once, and none of them None."
      )
    method, _, field = name.partition(".")
    known = {
      f"{section}.{each}"
      for section in config_lib.method_sections()
      for each in fields.declared(METHODS[section])
    }
    if name not in known:
      raise ValueError(
        f"config.tune.fields: {name} is no field of a method, such as autovp.mapping."
        f"{trees.did_you_mean(name, sorted(known))}"
      )
    for value in values:
      kind = fields.value_types(METHODS[method])[field]
      _check_value(f"tune.fields: {name}", value, kind)
  _check_unique("fields", tuple(name for name, _ in pairs))


def _check_variants(config: ConfigDict) -> None:
  """Checks `config.tune.variants`: labels, keys, and the config of each row.

  Raises:
    ValueError: names the row, what it has and what is expected.
  """
  labels: dict[str, str] = {}
  for variant in variants_of(config) if config.tune.variants else ():
    label, folder = variant.label, variant.folder.lower()
    where = f"config.tune.variants: {label!r}"
    is_text = label.isprintable() and "|" not in label and len(label) <= 64
    if not (is_text and folder):
      raise ValueError(
        f"{where} is no label, expected up to 64 characters, letters or digits among "
        "them and no |: it names a row of tables and a folder."
      )
    # Some file systems do not tell cases apart.
    if folder in labels:
      raise ValueError(
        f"{where} and {labels[folder]!r} would have one folder; change a label."
      )
    labels[folder] = label
    _check_changes(where, variant)
    row = variant.config(config)
    if "total_epochs" in variant.changes and row.total_steps:
      raise ValueError(
        f"{where} changes total_epochs, which has no effect while config.total_steps "
        f"is {row.total_steps}; set that to 0."
      )
    try:
      validate(row)
    except ValueError as error:
      raise ValueError(f"{where}: {error}") from error


def _check_changes(where: str, variant: Variant) -> None:
  """Checks the keys that a row changes, and the types of their values.

  Args:
    where: how the message begins.
    variant: the row.

  Raises:
    ValueError: the row cannot change a key, or not to this value.
  """
  known, parts = config_lib.keys(), parts_of(variant.method)
  for key, value in variant.changes.items():
    if key not in known:
      raise ValueError(
        f"{where} changes {key}, which is no key of the config."
        f"{trees.did_you_mean(key, known)}"
      )
    if is_shared(key):
      raise ValueError(
        f"{where} changes {key}, which all rows share: task, images (but for how many "
        "train: data.shots, data.fraction), backbone, seeds and the search are the "
        "same. Set it for all of them, or start another search."
      )
    section = key.partition(".")[0]
    if section in METHODS and section not in parts:
      raise ValueError(
        f"{where} changes {key}, but its method is {variant.method}; leave it out."
      )
    try:
      _check_value(key, value, known[key][0])
    except ValueError as error:
      raise ValueError(f"{where}: {error}") from error


def _check_unique(key: str, values: tuple) -> None:
  if len(set(values)) < len(values):
    raise ValueError(f"config.tune.{key} is {values}: a value is there twice.")


def _get(config: ConfigDict, key: str) -> Any:
  section, _, field = key.rpartition(".")
  return config[section][field] if section else config[field]


def _has(config: ConfigDict, key: str) -> bool:
  node: Any = config
  for part in key.split("."):
    if not isinstance(node, ConfigDict) or part not in node:
      return False
    node = node[part]
  return True

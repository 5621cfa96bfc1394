"""The rows of a search: methods side by side, or variants of some.

`config.tune.variants` has their labels, methods and what each changes in the config:

  ("no patches", "insvp", (("insvp.use_patch", False),)), ("linear", "linear", ())

`config.tune.methods` is the short form: each method is the variant of its own name that
changes nothing.
"""

from collections.abc import Collection, Mapping
import dataclasses
import re
from typing import Any

from ml_collections import ConfigDict

from insvp_jax import config as config_lib
from insvp_jax.methods import parts_of

# How many of the training images are used, and no more: val and test, which rows are
# compared on, are the same ones whatever these say.
_SUBSET = r"data/(shots|fraction)"
# What all rows share: images and backbone, which are prepared once, and what is no part
# of a single run or does not shape it. How images are sampled is a row's own.
_SHARED = (
  rf"task|method|seed|image_size|backbone/.*|(?!({_SUBSET}|data/sampling)$)data/.*|"
  f"{config_lib.MAY_CHANGE}"
)


@dataclasses.dataclass(frozen=True)
class Variant:
  """A row of a search.

  Attributes:
    label: its name in tables.
    method: what it trains.
    changes: what it changes in the config, such as {"insvp.use_patch": False}.
  """

  label: str
  method: str
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def folder(self) -> str:
    """The name of its folder in the workdir."""
    return re.sub(r"[^\w+-]+", "_", self.label, flags=re.ASCII).strip("_-")

  def config(self, config: ConfigDict, tunes: bool = False) -> ConfigDict:
    """Returns the config of this row alone.

    What the row changes is not searched for in it: of `tune.lr`, `tune.wd`,
    `tune.fields` and `tune.grid` its own value is left.

    Args:
      config: of all rows.
      tunes: as for `config.apply_overrides`.
    """
    row = config.copy_and_resolve_references()
    row.method = self.method
    row.tune.methods = row.tune.variants = ()
    for key, value in self.changes.items():
      section, _, name = key.rpartition(".")
      (row[section] if section else row)[name] = value
      if section in parts_of(self.method) and name in row.tune.grid:
        row.tune.grid[name] = ()
    config_lib.apply_overrides(row, self.changes, tunes)
    return row


def variants_of(config: ConfigDict) -> list[Variant]:
  """Returns the rows of a search; without lists the one of `config.method`.

  Raises:
    ValueError: both lists are given, or `tune.variants` has what is no row.
  """
  tune = config.tune
  if not tune.variants:
    return [Variant(method, method) for method in tune.methods or (config.method,)]
  if tune.methods:
    raise ValueError(
      "both config.tune.methods and config.tune.variants were given; leave one out, "
      'e.g. by --config.tune.variants="()".'
    )
  return [_parse(row) for row in tune.variants]


def _parse(row: Any) -> Variant:
  try:
    label, method, changes = row
    keys = [key for key, _ in changes]
    is_row = all(isinstance(text, str) for text in (label, method, *keys))
  except (TypeError, ValueError):
    is_row = False
  if not is_row:
    raise ValueError(
      f"config.tune.variants has {row!r}, expected rows of (label, method, ((key, "
      "value), ...)), e.g. --config.tune.variants=\"(('no patches', 'insvp', "
      "(('insvp.use_patch', False),)), ('linear', 'linear', ()))\"."
    )
  if len(set(keys)) < len(keys):
    raise ValueError(
      f"config.tune.variants: {label!r} changes one key twice: {', '.join(keys)}."
    )
  return Variant(label, method, dict(changes))


def is_shared(key: str) -> bool:
  """Returns whether all rows of a search have the same value of a key."""
  return bool(re.fullmatch(_SHARED, key.replace(".", "/")))


def check_overrides(config: ConfigDict, keys: Collection[str]) -> None:
  """Checks that no key of the command line is without effect on every row.

  Args:
    config: with the overrides applied.
    keys: that were overridden, such as "total_epochs".

  Raises:
    ValueError: one is; or as for `variants_of`.
  """
  if not config.tune.variants:
    return
  variants = variants_of(config)
  changed_by_all = set.intersection(*(set(variant.changes) for variant in variants))
  lists = {"tune.lr": "optim.lr", "tune.wd": "optim.wd"}
  for key in keys:
    if key == "method" or lists.get(key, key) in changed_by_all:
      raise ValueError(
        f"--config.{key} was given, but each row of config.tune.variants has its own; "
        "leave one out."
      )

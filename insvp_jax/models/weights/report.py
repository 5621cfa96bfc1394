"""What loading a backbone did to each leaf."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from insvp_jax.errors import printable


def abbreviate(names: Sequence[str] | Mapping[str, Any], limit: int = 4) -> str:
  """Returns the first few names, printable, and how many more there are."""
  more = f" and {len(names) - limit} more" if len(names) > limit else ""
  return ", ".join(map(printable, list(names)[:limit])) + more


@dataclasses.dataclass(frozen=True)
class LoadReport:
  """What happened to every leaf of a file and of a model.

  Names are big_vision's with one group per block, whatever the model's layout;
  those in `skipped` are the file's.

  Attributes:
    path: the file.
    layout: the file's layout, in words.
    num_params: scalars loaded.
    loaded: names that came from the file.
    changed: name -> how the file's values were changed.
    skipped: name in the file -> why it was left out.
    missing: names that the file lacks; they were initialized.
    notes: further remarks.
  """

  path: str
  layout: str
  num_params: int
  loaded: tuple[str, ...]
  changed: dict[str, str]
  skipped: dict[str, str]
  missing: tuple[str, ...]
  notes: tuple[str, ...] = ()

  def __str__(self) -> str:
    """Returns one line: what was loaded, and what is not as in the file."""
    total = len(self.loaded) + len(self.missing)
    parts = [
      f"{len(self.loaded)} of {total} leaves, {self.num_params:,} parameters, from "
      f"{self.path} ({self.layout})",
      *map(": ".join, self.changed.items()),
    ]
    reasons: dict[str, list[str]] = {}
    for name, reason in self.skipped.items():
      reasons.setdefault(reason, []).append(name)
    parts += [f"skipped: {abbreviate(names)} ({why})" for why, names in reasons.items()]
    if self.missing:
      parts.append(f"missing, drawn anew: {abbreviate(self.missing)}")
    return "; ".join([*parts, *self.notes])

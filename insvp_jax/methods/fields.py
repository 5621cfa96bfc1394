"""A method's fields, declared once.

A method is a dataclass. Each of its fields is declared in the class, by `field`, with
its type, its default, one line of documentation and a check. The config's sections, the
keys of `config.tune.grid`, `--print_config` and the checks at construction are derived
from that.
"""

from collections.abc import Callable, Mapping
import dataclasses
import types
from typing import Any, get_args, get_origin

# The field that chooses among the `presets` of the fields after it.
PRESET = "preset"
# `(name, value, the backbone's spec) -> value` in the type that the method computes
# with; raises ValueError where the field cannot have the value.
Check = Callable[[str, Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Declaration:
  """What is declared of one field; see `field` for the attributes."""

  default: Any
  doc: str
  check: Check | None
  hparam: bool
  presets: Mapping[str, Any]
  keeps: int | None

  def default_for(self, spec: Any, preset: str | None) -> Any:
    """Returns the default under a backbone's spec and a preset."""
    if self.presets:
      return self.presets[preset]
    return self.default(spec) if callable(self.default) else self.default

  def doc_line(self) -> str:
    """Returns the documentation with the defaults, in one line."""
    if self.presets:
      names: dict[str, list[str]] = {}
      for preset, value in self.presets.items():
        names.setdefault(repr(value), []).append(preset)
      defaults = (f"{value} ({', '.join(of)})" for value, of in names.items())
      return f"{self.doc}; None: {', '.join(defaults)}"
    if self.default is None or callable(self.default):
      return self.doc
    return f"{self.doc}; None: {self.default!r}"


def field(
  default: Any,
  doc: str,
  *,
  check: Check | None = None,
  hparam: bool = False,
  presets: Mapping[str, Any] | None = None,
  keeps: int | None = None,
) -> Any:
  """Declares a field of a method.

  Args:
    default: its value where it is left out or None; or a function of the backbone's
      spec that returns it, in which case `doc` says what that is.
    doc: one line on what it is.
    check: of every value that is not None.
    hparam: whether it shapes no array and chooses no operation, like a rate or a
      weight. It may then come as data; see `Method.hparam`.
    presets: defaults by the value of the field "preset", in place of `default`.
    keeps: of a mask, how many entries of each row a search may not prune; None for
      other fields. Where a mask is None a parameter of its name trains in its place.
      It may come as data, too.

  Returns:
    A `dataclasses.field`. Its own default is None where the default is not constant.
  """
  declaration = Declaration(default, doc, check, hparam, presets or {}, keeps)
  constant = None if presets or callable(default) else default
  return dataclasses.field(default=constant, metadata={"declaration": declaration})


def declared(method: type) -> dict[str, Declaration]:
  """Returns the declarations of a method's fields, in their order."""
  return {
    f.name: f.metadata["declaration"]
    for f in dataclasses.fields(method)
    if "declaration" in f.metadata
  }


def value_types(method: type) -> dict[str, type]:
  """Returns the type that the config takes for each declared field.

  It is the first one of the annotation: float of `float | int`, int of `int | None`.
  Sequences are tuples.
  """
  annotations = {f.name: f.type for f in dataclasses.fields(method)}
  return {name: _value_type(annotations[name]) for name in declared(method)}


def _value_type(annotation: Any) -> type:
  if isinstance(annotation, types.UnionType):
    annotation = get_args(annotation)[0]
  # Of the generic types only `Sequence[...]` is in use.
  return tuple if get_origin(annotation) else annotation

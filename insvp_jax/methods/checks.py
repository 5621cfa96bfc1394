"""Checks of a method's fields, with one clear line each; see `fields.Check`."""

from collections.abc import Callable
import math
from typing import Any

from insvp_jax import trees
from insvp_jax.methods.base import BackboneSpec
from insvp_jax.methods.fields import Check

# The most tokens, channels or layers of anything: more is a slip, and would not fit.
_MOST = 2**16


def _is_positive_int(value: Any) -> bool:
  is_int = isinstance(value, int) and not isinstance(value, bool)
  return is_int and 1 <= value <= _MOST


def _is_finite_number(value: Any) -> bool:
  is_number = isinstance(value, float | int) and not isinstance(value, bool)
  return is_number and math.isfinite(value)


def _expect(
  is_valid: Callable[[Any], bool],
  expected: str,
  convert: Callable[[Any], Any] = lambda value: value,
) -> Check:
  """Returns a check of the value alone.

  Args:
    is_valid: whether a field can have the value.
    expected: what it can have, for the message.
    convert: applied to a valid value.
  """

  def check(name: str, value: Any, spec: BackboneSpec) -> Any:
    del spec
    if not is_valid(value):
      raise ValueError(f"{name} is {value!r}, expected {expected}.")
    return convert(value)

  return check


def _sequence_of(
  is_valid: Callable[[Any], bool], length: int | None = None
) -> Callable[[Any], bool]:
  def are_valid(value: Any) -> bool:
    is_sequence = isinstance(value, tuple | list) and value
    has_length = is_sequence and length in (None, len(value))
    return bool(has_length) and all(map(is_valid, value))

  return are_valid


boolean = _expect(lambda value: isinstance(value, bool), "True or False")
finite_number = _expect(_is_finite_number, "a finite number", float)
not_negative = _expect(
  lambda value: _is_finite_number(value) and value >= 0, "a number of at least 0", float
)
below_one = _expect(
  lambda value: _is_finite_number(value) and 0 < value < 1,
  "a number between 0 and 1, without these",
  float,
)
path = _expect(lambda value: isinstance(value, str), "a path")
positive_int = _expect(_is_positive_int, f"an integer from 1 to {_MOST}")
rate = _expect(
  lambda value: _is_finite_number(value) and 0 <= value < 1,
  "a dropout rate in [0, 1)",
  float,
)
share = _expect(
  lambda value: _is_finite_number(value) and 0 <= value <= 1,
  "a share in [0, 1]",
  float,
)


def positive_ints(length: int) -> Check:
  """Returns the check of a sequence of so many integers from 1 on; makes a tuple."""
  are_valid = _sequence_of(_is_positive_int, length)
  return _expect(are_valid, f"{length} integers from 1 to {_MOST}", tuple)


def finite_numbers(length: int | None = None) -> Check:
  """Returns the check of a sequence of so many numbers; makes a tuple of floats."""
  are_valid = _sequence_of(_is_finite_number, length)
  expected = (
    "a tuple of finite numbers" if length is None else f"{length} finite numbers"
  )
  return _expect(are_valid, expected, lambda value: tuple(map(float, value)))


def integers(least: int, expected: str) -> Check:
  """Returns the check of one or more integers from `least` on; makes a tuple."""

  def is_valid(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least

  return _expect(_sequence_of(is_valid), expected, tuple)


def one_of(*known: str) -> Check:
  """Returns the check of a choice; the message has the nearest known one."""

  def check(name: str, value: Any, spec: BackboneSpec) -> str:
    del spec
    if value not in known:
      raise ValueError(
        f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}."
        f"{trees.did_you_mean(value, known)}"
      )
    return value

  return check


def some_of(*known: str) -> Check:
  """Returns the check of a sequence of choices, each once; makes a tuple."""

  def check(name: str, value: Any, spec: BackboneSpec) -> tuple[str, ...]:
    choices = tuple(value) if isinstance(value, tuple | list) else ()
    for choice in choices:
      one_of(*known)(name, choice, spec)
    if not choices or len(set(choices)) < len(choices):
      raise ValueError(f"{name} is {value!r}, expected some of {known}, each once.")
    return choices

  return check


def below_width(name: str, value: Any, spec: BackboneSpec) -> int:
  """Returns the value.

  Raises:
    ValueError: it is no integer from 1 to the width of the backbone.
  """
  if not _is_positive_int(value) or value > spec.width:
    raise ValueError(
      f"{name} is {value!r}, but the backbone's tokens are {spec.width} wide; "
      f"expected an integer from 1 to {spec.width}."
    )
  return value


def block_count(name: str, value: Any, spec: BackboneSpec) -> int:
  """Returns the value.

  Raises:
    ValueError: it is no integer from 1 to the number of the backbone's blocks.
  """
  if not _is_positive_int(value) or value > spec.depth:
    raise ValueError(
      f"{name} is {value!r}, but the backbone has {spec.depth} blocks; "
      f"expected an integer from 1 to {spec.depth}."
    )
  return value

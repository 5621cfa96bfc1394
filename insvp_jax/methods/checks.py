"""Checks of the values that a user gives to a method, with one clear line each."""

from collections.abc import Sequence
import math
from typing import Any

from insvp_jax import trees


def _is_int(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
  number = isinstance(value, (int, float)) and not isinstance(value, bool)
  return number and math.isfinite(value)


def boolean(name: str, value: Any) -> bool:
  """Returns the value, or raises ValueError if it is not True or False."""
  if not isinstance(value, bool):
    raise ValueError(f"{name} is {value!r}, expected True or False.")
  return value


def positive_int(name: str, value: Any) -> int:
  """Returns the value, or raises ValueError if it is no integer from 1 on."""
  if not _is_int(value) or value < 1:
    raise ValueError(f"{name} is {value!r}, expected an integer of at least 1.")
  return value


def block_count(name: str, value: Any, depth: int) -> int:
  """Returns the value, or raises ValueError if the backbone has fewer blocks."""
  if not _is_int(value) or not 1 <= value <= depth:
    raise ValueError(
      f"{name} is {value!r}, but the backbone has {depth} blocks; "
      f"expected an integer from 1 to {depth}."
    )
  return value


def rate(name: str, value: Any) -> float:
  """Returns a dropout rate, or raises ValueError outside of [0, 1)."""
  if not _is_number(value) or not 0 <= value < 1:
    raise ValueError(f"{name} is {value!r}, expected a dropout rate in [0, 1).")
  return float(value)


def choice(name: str, value: Any, known: Sequence[str]) -> str:
  """Returns the value, or raises ValueError if it is none of the known ones."""
  if value not in known:
    raise ValueError(
      f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}."
      f"{trees.did_you_mean(value, known)}"
    )
  return value


def _sequence(name: str, value: Any, length: int, valid: Any, kind: str) -> Sequence:
  right = isinstance(value, (tuple, list)) and len(value) == length
  if not right or not all(map(valid, value)):
    raise ValueError(f"{name} is {value!r}, expected {length} {kind}.")
  return value


def positive_ints(name: str, value: Any, length: int) -> tuple[int, ...]:
  """Returns a tuple, or raises ValueError if it is not `length` integers >= 1."""

  def valid(x: Any) -> bool:
    return _is_int(x) and x >= 1

  return tuple(_sequence(name, value, length, valid, "integers of at least 1"))


def numbers(name: str, value: Any, length: int) -> tuple[float, ...]:
  """Returns a tuple of floats, or raises ValueError if it is not `length` numbers."""
  found = _sequence(name, value, length, _is_number, "finite numbers")
  return tuple(float(x) for x in found)

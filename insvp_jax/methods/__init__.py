"""Adaptation methods: one file each, found by name in `METHODS`."""

from typing import Any

from insvp_jax import trees
from insvp_jax.methods import fields
from insvp_jax.methods.base import BackboneSpec, BlockPrompts, Method
from insvp_jax.methods.bias import Bias
from insvp_jax.methods.full import Full
from insvp_jax.methods.insvp import InsVP
from insvp_jax.methods.linear import Linear
from insvp_jax.methods.vpt import VPTDeep, VPTShallow

__all__ = [
  "METHODS",
  "BackboneSpec",
  "BlockPrompts",
  "Method",
  "create_method",
  "method_fields",
]

METHODS: dict[str, type[Method]] = {
  "insvp": InsVP,
  "vpt_shallow": VPTShallow,
  "vpt_deep": VPTDeep,
  "linear": Linear,
  "full": Full,
  "bias": Bias,
}


def method_fields(name: str) -> tuple[str, ...]:
  """Returns the names of a method's own fields.

  Raises:
    ValueError: unknown method, with the nearest known name.
  """
  return tuple(fields.declared(trees.lookup(METHODS, name, "method")))


def create_method(name: str, spec: BackboneSpec, /, **kwargs: Any) -> Method:
  """Returns a method for a backbone.

  Args:
    name: a key of `METHODS`.
    spec: the backbone's sizes.
    **kwargs: the method's own fields; None is the method's default.

  Raises:
    ValueError: unknown method or field, with the nearest known name, or a value
      that a field cannot have.
  """
  known = method_fields(name)
  for field in kwargs:
    if field not in known:
      listed = f"Known: {', '.join(known)}." if known else "It has none."
      raise ValueError(
        f"unknown field {field!r} of the method {name!r}."
        f"{trees.did_you_mean(field, known)} {listed}"
      )
  values = {field: value for field, value in kwargs.items() if value is not None}
  return METHODS[name](spec, **values)

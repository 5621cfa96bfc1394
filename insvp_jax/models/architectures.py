"""Which backbones there are: their classes, variants and fields."""

from collections.abc import Mapping, Sequence
import dataclasses
from numbers import Integral
from typing import Any

import flax.linen as nn

from insvp_jax import trees
from insvp_jax.models import convnext, resnet, swin
from insvp_jax.models.convnext import ConvNeXt
from insvp_jax.models.resnet import ResNet
from insvp_jax.models.swin import Swin
from insvp_jax.models.vit import ViT
from insvp_jax.models.vit import decode_variant as decode_vit
from insvp_jax.models.weights import is_file_name

# {variant: (class, fields)} of those that are no ViT; a ViT's is its size and its patch
# size, as in "B/16".
VARIANTS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
  name: (backbone, fields)
  for backbone, module in ((Swin, swin), (ConvNeXt, convnext), (ResNet, resnet))
  for name, fields in module.VARIANTS.items()
}
# By the keys of `weights.formats.NAMES`.
CLASSES = {"vit": ViT, "swin": Swin, "convnext": ConvNeXt, "resnet": ResNet}
_INNER = ("unshard", "parent", "name")
# A class without it computes all tokens anyway.
_WITHOUT_EFFECT = ("skip_unread",)


def is_variant(name: str) -> bool:
  """Returns whether a name is an architecture's, which comes without weights."""
  return name in VARIANTS or ("/" in name and not is_file_name(name))


def decode_variant(name: str) -> tuple[type[nn.Module], dict[str, Any]]:
  """Returns the class of a variant, and its fields.

  Raises:
    ValueError: there is no such variant.
  """
  if name in VARIANTS:
    return VARIANTS[name]
  return ViT, decode_vit(name)


def variant_of(backbone: type[nn.Module]) -> str:
  """Returns a variant of a class that is no ViT; all its fields can be replaced."""
  return next(name for name, (known, _) in VARIANTS.items() if known is backbone)


def fields_of(backbone: type[nn.Module]) -> tuple[str, ...]:
  """Returns the names of a class's fields that a user may set."""
  return tuple(name for name in backbone.__dataclass_fields__ if name not in _INNER)


# Of all classes.
FIELDS = tuple(
  dict.fromkeys(
    field
    for backbone in (ViT, *(backbone for backbone, _ in VARIANTS.values()))
    for field in fields_of(backbone)
  )
)


def build(
  backbone: type[nn.Module], fields: Mapping[str, Any], overrides: Mapping[str, Any]
) -> nn.Module:
  """Returns a backbone.

  Args:
    backbone: its class.
    fields: of its variant.
    overrides: fields that replace those; None leaves one alone. A field that this class
      does not have may be there with the value that it has by default in another one:
      it asks for nothing.

  Raises:
    ValueError: an unknown field, with the nearest known one.
  """
  # The size of the images is asked for on its own.
  known = [field for field in fields_of(backbone) if field != "image_size"]
  given = {}
  for field, value in overrides.items():
    if field in known:
      given |= {} if value is None else {field: value}
      continue
    default = ViT.__dataclass_fields__.get(field)
    is_default = default is not None and value == default.default
    if value is None or is_default or field in _WITHOUT_EFFECT:
      continue
    raise ValueError(
      f"unknown backbone field {field!r} of a {backbone.__name__}."
      f"{trees.did_you_mean(field, known)} Known: {', '.join(known)}."
    )
  given = {**fields, **given}
  _check_types(backbone, given)
  built = backbone(**given)
  built.check()
  return built


# The most that a size can be: more is a slip, and would fill the memory.
_MOST = 2**20


def _check_types(backbone: type[nn.Module], given: Mapping[str, Any]) -> None:
  """Checks that fields of a backbone have the types that its class says.

  Args:
    backbone: its class.
    given: the fields; the others have their defaults.

  Raises:
    ValueError: one has not, or is no size that anything can have.
  """

  def is_size(value: Any, least: int = 1) -> bool:
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    return is_whole and least <= value <= _MOST

  def are_sizes(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(map(is_size, value))

  def is_share(value: Any) -> bool:
    return isinstance(value, float | int) and 0 < value < 1

  tuples = f"a tuple of whole numbers from 1 to {_MOST}"
  for field in dataclasses.fields(backbone):
    if field.name in _INNER or field.name not in given:
      continue
    # What is off at 0 may be 0.
    least = 0 if field.default == 0 else 1
    checks = {
      int: (lambda x, y=least: is_size(x, y), f"a whole number, {least} to {_MOST}"),
      Sequence[int]: (are_sizes, tuples),
      Sequence[int] | int: (lambda x: is_size(x) or are_sizes(x), f"{tuples}, or one"),
      float: (is_share, "a number between 0 and 1"),
      bool: (lambda x: isinstance(x, bool), "True or False"),
      bool | None: (lambda x: isinstance(x, bool | None), "True, False or None"),
      str: (lambda x: isinstance(x, str), "a text"),
    }
    is_valid, expected = checks[field.type]
    value = given[field.name]
    if not is_valid(value):
      raise ValueError(f"{field.name} is {value!r}, expected {expected}.")

"""What a family of golden files says beyond its arrays."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
  """How a golden file becomes a model.

  Attributes:
    method: a key of METHODS; "" where the file has no model: then only `extras` are
      called.
    fields: the method's own fields.
    names: our name of each of the method's parameters -> its name in the file, or a
      list with a name for each block (None where a block has none). Empty: the same.
    constants: parameters of ours, by name, that the file does not draw.
    model: arguments of `create_model` beside those that follow from the file's sizes;
      "backbone_kwargs" are added to the file's.
    images: `(recipe, config) -> the model's input`; None for the recipe's images.
    trains_backbone: names of the backbone's parameters that the file has gradients of.
    extra_loss: `(case, params, reads) -> nats` that join the cross-entropy.
    extras: `case -> {name: array}`: what else the file pins; called after `results`.
  """

  method: str
  fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  names: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  images: Callable[..., Any] | None = None
  trains_backbone: tuple[str, ...] = ()
  extra_loss: Callable[..., Any] | None = None
  extras: tuple[Callable[..., dict[str, Any]], ...] = ()


def by_block(config: Mapping[str, Any], pattern: str) -> list[str]:
  """Returns the names of all blocks of `pattern`, which has {i} for the block."""
  return [pattern.format(i=i) for i in range(config["vit"]["depth"])]

"""Prompt tokens of each stage of a backbone; most backbones have one stage.

Lists here have an entry for each stage that has prompts, the first ones.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from insvp_jax.methods.base import BackboneSpec, Method
from insvp_jax.methods.hooks import BlockPrompts
from insvp_jax.methods.ops.dropout import Dropout, drop_per_sample


def widths(spec: BackboneSpec, blocks: int) -> list[int]:
  """Returns the widths of the prompts for the first so many blocks."""
  return [stage.width for stage in spec.stages[: len(spec.stage_counts(blocks))]]


def named(spec: BackboneSpec, name: str, arrays: Sequence[Any]) -> dict[str, Any]:
  """Returns {name: array} of one stage, {name_0: ..., name_1: ...} of several."""
  if len(spec.stages) == 1:
    return dict(zip((name,), arrays, strict=True))
  return {f"{name}_{i}": array for i, array in enumerate(arrays)}


def create(
  method: Method, init: nn.initializers.Initializer, blocks: int, length: int
) -> list[Array]:
  """Creates "common_prompt" [l, p, d], or "common_prompt_<stage>" of several stages.

  Args:
    method: whose parameters they are.
    init: of all.
    blocks: the first so many blocks have a set each.
    length: tokens p of a set.
  """
  spec = method.spec
  shapes = [
    (count, length, width)
    for count, width in zip(
      spec.stage_counts(blocks), widths(spec, blocks), strict=True
    )
  ]
  return [
    method.param(name, init, shape)
    for name, shape in named(spec, "common_prompt", shapes).items()
  ]


def drop(
  dropout: Dropout,
  tokens: Sequence[Array],
  num_samples: Any,
  *,
  train: bool,
) -> list[Array]:
  """Returns prompts that all images share, with dropout drawn for each image.

  From [l, p, d] to [l, b or 1, p, d]; the batch axis is 1 where nothing is dropped.
  """
  return [
    drop_per_sample(dropout, t[:, None], num_samples, train=train) for t in tokens
  ]


def join(spec: BackboneSpec, tokens: Sequence[Array]) -> BlockPrompts:
  """Returns prompts [l, b or 1, p, d] as the backbone takes them."""
  return BlockPrompts(tokens[0] if len(spec.stages) == 1 else tuple(tokens))


def for_each(images: Array, tokens: Sequence[Array]) -> list[Array]:
  """Returns prompts [l, b or 1, p, d] of each stage as [l, b, p, d]."""
  return [jnp.repeat(t, len(images) // t.shape[1], axis=1) for t in tokens]

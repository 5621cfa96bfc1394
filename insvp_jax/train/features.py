"""Features that are computed once, where nothing before the head trains.

A linear head then trains in milliseconds a step, and all trials, seeds and populations
of a search share one pass of the backbone over each split.
"""

from collections.abc import Iterator, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict
import numpy as np

from insvp_jax import trees
from insvp_jax.data import pipeline, preprocess, resident
from insvp_jax.data.splits import Split
from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.methods.base import Method
from insvp_jax.train.program import Program

_HOOKS = ("prompt_image", "prompt_tokens", "adapt_feature")


def are_constant(config: ConfigDict, program: Program) -> bool:
  """Returns whether a training image has the same feature in each step.

  So it is where only the head trains, the method changes nothing before it, and
  images are neither augmented nor mixed.

  Args:
    config: the whole configuration.
    program: made for it.
  """
  method = type(program.model.prompter)
  adapts = any(getattr(method, hook) is not getattr(Method, hook) for hook in _HOOKS)
  mask = trees.flatten(program.mask).items()
  trains = any(chosen for name, chosen in mask if not name.startswith("head/"))
  mixes = config.loss.mixup_alpha > 0 or config.loss.cutmix_alpha > 0
  augments = preprocess.get_preset(config.data.preset).augments
  return not (adapts or trains or mixes or augments)


def nbytes(program: Program, number: int) -> int:
  """Returns the bytes on each device of so many features."""
  return number * program.model.backbone.spec.width * 4


def are_cached(config: ConfigDict, program: Program, number: int) -> bool:
  """Returns whether a split's features are computed once and kept on the devices.

  Args:
    config: the whole configuration; `cache_features` turns it off, and
      `data.resident_mb` limits it.
    program: made for it.
    number: of the split's examples.
  """
  fits = nbytes(program, number) <= config.data.resident_mb * 2**20
  return config.cache_features and fits and are_constant(config, program)


def describe(config: ConfigDict, program: Program, split: Split) -> str:
  """Returns one line on how a run comes by its features; "" if that is nothing new."""
  size = f"{nbytes(program, len(split)) / 2**20:.1f} MiB"
  if are_cached(config, program, len(split)):
    return f"features of the {len(split)} training images are computed once: {size}"
  if config.cache_features and are_constant(config, program):
    return (
      f"features are computed in each step: {size} of them are more than "
      f"config.data.resident_mb = {config.data.resident_mb}"
    )
  return ""


class FeatureCache:
  """The features of some splits under one backbone, on every device.

  In all they take no more than `config.data.resident_mb`; the oldest make room.
  """

  def __init__(self):
    """Holds nothing yet."""
    self._held: dict[Any, dict[str, Array]] = {}

  def arrays(
    self,
    config: ConfigDict,
    program: Program,
    split: Split,
    backbone: Mapping[str, Any],
    seed: int | None = None,
  ) -> dict[str, Array] | None:
    """Returns "features" (float32 [n or more, d]) and "labels" [n] of a split.

    Args:
      config: the whole configuration.
      program: made for it.
      split: the examples, in memory or streamed.
      backbone: its parameters, on the devices.
      seed: that these were drawn with; None for loaded ones.

    Returns:
      Replicated arrays; None where features are not cached (see `are_cached`).
    """
    if not are_cached(config, program, len(split)):
      return None
    settings = config.data.preset, config.backbone.frozen_dtype
    key = (split.digest, seed, *settings)
    if key not in self._held:
      needed = nbytes(program, len(split))
      self._make_room(config.data.resident_mb * 2**20 - needed)
      self._held[key] = _compute(config, program, split, backbone)
    return self._held[key]

  def _make_room(self, limit: int) -> None:
    def used() -> int:
      return sum(held["features"].nbytes for held in self._held.values())

    while self._held and used() > limit:
      self._held.pop(next(iter(self._held)))


def _compute(
  config: ConfigDict, program: Program, split: Split, backbone: Mapping[str, Any]
) -> dict[str, Array]:
  whole = mesh_lib.replicated(program.mesh)
  batches = eval_batches(config, program, split)
  size, width = eval_size(config, program), program.model.backbone.spec.width
  rows = -(-len(split) // size) * size
  create = jax.jit(lambda: jnp.zeros((rows, width), jnp.float32), out_shardings=whole)
  # There is room for all of them once, and for no more.
  write = jax.jit(_write, donate_argnums=0, out_shardings=whole)
  features = create()
  for i, batch in enumerate(batches):
    found = program.feature_step({"backbone": backbone}, batch)
    features = write(features, found, np.int32(i * size))
    # Batches that wait for the device hold their images.
    jax.block_until_ready(features)
  return {"features": features, "labels": resident.put_array(split.labels, whole)}


def _write(features, found, start):
  return jax.lax.dynamic_update_slice(features, found, (start, 0))


def eval_size(config: ConfigDict, program: Program) -> int:
  """Returns the size of a batch to evaluate; any one fits, since it is padded."""
  devices = program.mesh.size
  return -(-config.eval_batch_size // devices) * devices


def eval_batches(
  config: ConfigDict,
  program: Program,
  split: Split,
  arrays: Mapping[str, Array] | None = None,
) -> Iterator[dict[str, Array]]:
  """Returns every example of a split once, in padded batches with a "mask".

  Args:
    config: the whole configuration.
    program: made for it.
    split: the examples.
    arrays: from `FeatureCache.arrays`; the batches have features then, else images.
  """
  rows, size = mesh_lib.batch_sharding(program.mesh), eval_size(config, program)
  if arrays is None:
    return pipeline.eval_batches(split, batch_size=size, sharding=rows)
  take = jax.jit(_take, static_argnames="size", out_shardings=rows)
  starts = range(0, len(split), size)
  return (take(dict(arrays), np.int32(start), size=size) for start in starts)


def _take(arrays, start, size: int):
  number = arrays["labels"].shape[0]
  indices = start + jnp.arange(size)
  take = functools.partial(jnp.take, indices=indices, axis=0, mode="clip")
  mask = (indices < number).astype(jnp.float32)
  return {name: take(array) for name, array in arrays.items()} | {"mask": mask}

"""Features that are computed once, where nothing before the head trains.

A linear head then trains in milliseconds a step, and all trials and seeds of a search
share one pass of the backbone over each split.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict
import numpy as np

from insvp_jax import trees
from insvp_jax.data import preprocess, resident
from insvp_jax.data.splits import ArraySplit, Split
from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.train import batches
from insvp_jax.train.program import Program


def are_constant(config: ConfigDict, program: Program) -> bool:
  """Returns whether a training image has the same feature in each step.

  That holds where only the head trains, the method overrides no hook that could change
  the feature, and images are neither augmented nor mixed.

  Args:
    config: the whole configuration.
    program: made for it.
  """
  if not program.objective.ONE_FEATURE:
    return False
  adapts = bool(type(program.model.prompter).overridden_hooks())
  trains = any(
    is_trainable
    for name, is_trainable in trees.flatten(program.mask).items()
    if not name.startswith("head/")
  )
  return not (adapts or trains) and _is_same_in_each_step(config)


def _is_same_in_each_step(config: ConfigDict) -> bool:
  """Returns whether a training image is neither augmented nor mixed."""
  mixes = config.loss.mixup_alpha > 0 or config.loss.cutmix_alpha > 0
  return not (mixes or preprocess.get_preset(config.data.preset).augments)


def nbytes(program: Program, num_examples: int) -> int:
  """Returns the bytes on each device of the features of so many examples."""
  return num_examples * program.model.backbone.spec.width * 4


def are_cached(config: ConfigDict, program: Program, num_examples: int) -> bool:
  """Returns whether a split's features are computed once and kept on the devices.

  Args:
    config: the whole configuration; `cache_features` turns it off, and
      `data.resident_mb` limits it.
    program: made for it.
    num_examples: of the split.
  """
  fits = nbytes(program, num_examples) <= config.data.resident_mb * 2**20
  return config.cache_features and fits and are_constant(config, program)


def summary_line(config: ConfigDict, program: Program, split: Split) -> str:
  """Returns one line on how a run comes by its features; "" if not from a cache."""
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
    self._entries: dict[Any, dict[str, Array]] = {}

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
    # All that a feature depends on, besides the weights that the cache stands for.
    key = (split.digest, seed, config.data.preset, config.backbone.frozen_dtype)
    if key not in self._entries:
      self._make_room(config.data.resident_mb * 2**20 - nbytes(program, len(split)))
      self._entries[key] = _compute(config, program, split, backbone)
    return self._entries[key]

  def _make_room(self, limit: int) -> None:
    """Drops the oldest entries until the others take at most `limit` bytes."""

    def used() -> int:
      return sum(entry["features"].nbytes for entry in self._entries.values())

    while self._entries and used() > limit:
      self._entries.pop(next(iter(self._entries)))


class RouteCache:
  """The route of each image of some splits in memory, where the method has one."""

  def __init__(self):
    """Holds nothing yet."""
    self._entries: dict[Any, Array] = {}

  def array(
    self,
    config: ConfigDict,
    program: Program,
    split: Split,
    params: Mapping[str, Any],
    *,
    train: bool,
    seed: int | None = None,
  ) -> Array | None:
    """Returns the route of a split's images, int32 [n or more].

    Args:
      config: the whole configuration; `cache_features` turns it off.
      program: made for it.
      split: the examples.
      params: of the whole model, on the devices; of several trials those of all.
      train: whether the images are to be trained on, which may augment or mix them.
      seed: that the backbone was drawn with; None for a loaded one.

    Returns:
      A replicated array; None where the route is computed in each step: of streams, of
      images that change and of a backbone that trains.
    """
    is_trainable = trees.flatten(program.mask)
    trains = any(is_trainable[n] for n in is_trainable if n.startswith("backbone/"))
    is_constant = not trains and (not train or _is_same_in_each_step(config))
    if not (program.model.prompter.routes() and config.cache_features and is_constant):
      return None
    if not isinstance(split, ArraySplit):
      return None
    flat, carried = trees.flatten(params), trees.flatten(program.carried)
    fixed = {n: flat[n] for n in flat if n.startswith("prompter/") and not carried[n]}
    key = (
      *(split.digest, seed, config.data.preset, config.backbone.frozen_dtype),
      trees.digest(jax.device_get(fixed)),
    )
    if key not in self._entries:
      shapes = trees.flatten(program.shapes)
      # Of several trials the first: what differs between them does not matter.
      one = {n: x if x.shape == shapes[n].shape else x[0] for n, x in flat.items()}
      whole = trees.unflatten(one)
      rows = []
      for batch in batches.eval_batches(config, program, split):
        rows.append(program.route_step(whole, batch))
        # Batches that wait for the device hold their images: one at a time.
        jax.block_until_ready(rows[-1])
      join = jax.jit(jnp.concatenate, out_shardings=mesh_lib.replicated(program.mesh))
      self._entries[key] = join(rows)
    return self._entries[key]


def _compute(
  config: ConfigDict, program: Program, split: Split, backbone: Mapping[str, Any]
) -> dict[str, Array]:
  """Runs the backbone over a split, batch by batch, into one array."""
  replicated = mesh_lib.replicated(program.mesh)
  size = batches.eval_batch_size(config, program, len(split))
  width = program.model.backbone.spec.width
  # Rows of whole batches: the last one is padded.
  num_rows = -(-len(split) // size) * size
  create = jax.jit(
    lambda: jnp.zeros((num_rows, width), jnp.float32), out_shardings=replicated
  )
  # Donated: there is room for all features once, and for no more.
  write = jax.jit(
    jax.lax.dynamic_update_slice, donate_argnums=0, out_shardings=replicated
  )
  features = create()
  for i, batch in enumerate(batches.eval_batches(config, program, split)):
    rows = program.feature_step({"backbone": backbone}, batch)
    features = write(features, rows, (np.int32(i * size), np.int32(0)))
    # Batches that wait for the device hold their images: one at a time.
    jax.block_until_ready(features)
  return {"features": features, "labels": resident.put_array(split.labels, replicated)}

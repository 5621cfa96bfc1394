"""What a method computes of the training images, before training and between epochs."""

from collections.abc import Iterator, Mapping
import functools
from typing import Any

import jax
from jaxtyping import Array
from ml_collections import ConfigDict
import numpy as np

from insvp_jax import trees
from insvp_jax.data import preprocess, splits
from insvp_jax.data.splits import Split
from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.distributed import sharding as sharding_lib
from insvp_jax.methods.base import Apply
from insvp_jax.train import batches
from insvp_jax.train import state as state_lib
from insvp_jax.train.program import Program


def prepare_params(
  config: ConfigDict, program: Program, split: Split, params: Mapping[str, Any]
) -> Mapping[str, Any]:
  """Returns a run's first parameters, with what the method computes of the images.

  Args:
    config: the whole configuration.
    program: made for it.
    split: the training images, which are passed once, in their order.
    params: on the host, as drawn.

  Raises:
    ValueError: the method returned a parameter of another shape.
  """
  method = program.model.prompter
  if not method.prepares():
    return params
  on_device = state_lib.cast_frozen(params, program.mask, config)
  on_device = sharding_lib.device_put(on_device, program.state_sharding.params)
  prepared = method.prepare(on_device, *_tools(config, program, split))
  # The backbone stays as it was loaded.
  changed = {k: jax.device_get(v) for k, v in prepared.items() if k != "backbone"}
  before, after = trees.flatten(params), trees.flatten(changed)
  for name, leaf in after.items():
    if name not in before or before[name].shape != np.shape(leaf):
      expected = list(before[name].shape) if name in before else "no such parameter"
      raise ValueError(
        f"{type(method).__name__}.prepare returned {name} {list(np.shape(leaf))}, "
        f"expected {expected}."
      )
    after[name] = np.asarray(leaf, before[name].dtype)
  return trees.unflatten({**before, **after})


def refresh_state(
  config: ConfigDict, program: Program, split: Split, state: state_lib.TrainState
) -> state_lib.TrainState:
  """Returns a state with what the method computes anew; see `Method.refresh`.

  Args:
    config: the whole configuration.
    program: made for it.
    split: the training images.
    state: of one trial, or of several: then of each by itself.
  """
  method, tools = program.model.prompter, _tools(config, program, split)
  is_trainable, carried = trees.flatten(program.mask), trees.flatten(program.carried)
  names = [name for name in carried if carried[name] and not is_trainable[name]]
  flat, members = trees.flatten(state.params), np.ndim(state.peak_lr)
  refreshed = []
  for i in range(np.size(state.peak_lr)):
    own = {n: leaf[i] if members and carried[n] else leaf for n, leaf in flat.items()}
    own = trees.flatten(method.refresh(trees.unflatten(own), *tools))
    refreshed.append({n: jax.device_get(own[n]) for n in names})
  leaves = {n: np.stack([own[n] for own in refreshed]) for n in names}
  leaves = {n: leaf if members else leaf[0] for n, leaf in leaves.items()}
  shardings = trees.flatten(program.state_sharding.params)
  placed = {
    n: sharding_lib.device_put(np.asarray(leaf, flat[n].dtype), shardings[n])
    for n, leaf in leaves.items()
  }
  return state.replace(params=trees.unflatten({**flat, **placed}))


def _tools(config: ConfigDict, program: Program, split: Split) -> tuple[Any, Apply]:
  """Returns what a method computes with: (batches, apply)."""
  return functools.partial(_batches, config, program, split), program.apply


def _whole(batch: dict[str, Array]) -> dict[str, Array]:
  return batch


def _batches(
  config: ConfigDict, program: Program, split: Split, limit: int | None = None
) -> Iterator[dict[str, Any]]:
  """Yields images as the backbone gets them, with labels and mask on the host.

  Args:
    config: the whole configuration.
    program: made for it.
    split: the training images.
    limit: of how many at most, at even distances; None for all.
  """
  if limit is not None and limit < len(split):
    split = splits.to_memory(split, np.arange(limit) * len(split) // limit)
  preset = preprocess.get_preset(config.data.preset)
  size = program.model.input_size
  rows = mesh_lib.batch_sharding(program.mesh)
  # Of functions that live on, so that they are compiled once.
  normalise = jax.jit(
    preprocess.eval_preprocess, static_argnums=(0, 2), out_shardings=rows
  )
  whole = jax.jit(_whole, out_shardings=mesh_lib.replicated(program.mesh))
  for batch in batches.eval_batches(config, program, split):
    others = whole({name: batch[name] for name in ("labels", "mask")})
    images = normalise(preset, batch["images"], size)
    yield {"images": images, **jax.device_get(others)}

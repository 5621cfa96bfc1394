"""What a method computes once, from the training images, before the first step."""

from collections.abc import Iterator, Mapping
import functools
from typing import Any

import jax
from jaxtyping import Array
from ml_collections import ConfigDict
import numpy as np

from insvp_jax import trees
from insvp_jax.data import preprocess
from insvp_jax.data.splits import Split
from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.distributed import sharding as sharding_lib
from insvp_jax.methods.base import Apply, Method
from insvp_jax.methods.combined import Combined
from insvp_jax.methods.hooks import UNCHANGED, Adaptation
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
  if not _prepares(method):
    return params
  on_device = state_lib.cast_frozen(params, program.mask, config, np.asarray)
  on_device = sharding_lib.device_put(on_device, program.state_sharding.params)
  prepared = method.prepare(
    on_device,
    functools.partial(_batches, config, program, split),
    Apply(backbone=_apply_backbone(program)),
  )
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


def _prepares(method: Method) -> bool:
  parts = method.parts.methods.values() if isinstance(method, Combined) else (method,)
  return any(type(part).prepare is not Method.prepare for part in parts)


def _batches(
  config: ConfigDict, program: Program, split: Split
) -> Iterator[dict[str, Any]]:
  """Yields images as the backbone gets them, with labels and mask on the host."""
  preset, size = (
    preprocess.get_preset(config.data.preset),
    program.model.backbone.image_size,
  )
  replicated = mesh_lib.replicated(program.mesh)
  rows = mesh_lib.batch_sharding(program.mesh)
  normalise = jax.jit(
    lambda images: preprocess.eval_preprocess(preset, images, size), out_shardings=rows
  )
  whole = jax.jit(lambda x: x, out_shardings=replicated)
  for batch in batches.eval_batches(config, program, split):
    others = whole({name: batch[name] for name in ("labels", "mask")})
    yield {"images": normalise(batch["images"]), **jax.device_get(others)}


def _apply_backbone(program: Program):
  """Returns `Apply.backbone`, jitted."""
  model = sharding_lib.unshard_in_use(program.model, program.mesh)

  def encode(module, images: Array, adaptation: Adaptation) -> Array:
    tokens = module.backbone.embed(images, adaptation)
    return module.backbone.encode(tokens, adaptation)

  @functools.partial(jax.jit, out_shardings=mesh_lib.replicated(program.mesh))
  def apply(params, images, adaptation):
    feature, sown = model.apply(
      {"params": params}, images, adaptation, method=encode, mutable=["reads"]
    )
    reads = sown.get("reads")
    return feature, reads and reads["backbone"]["Transformer"]["blocks"]

  def apply_backbone(params, images, adaptation=None):
    return apply(params, images, UNCHANGED if adaptation is None else adaptation)

  return apply_backbone

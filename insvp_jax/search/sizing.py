"""How many members of a population fit into the device's memory, before it is used."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from insvp_jax import trees
from insvp_jax.data.splits import Split
from insvp_jax.search.population import Population
from insvp_jax.train import losses, parameters

# Of the device's memory: the rest is for what the compiler needs besides.
_SHARE = 0.7
# Without a limit that the device knows.
_MOST = 64


def chunk_size(
  configs: Sequence[ConfigDict], population: Population, split: Split
) -> int:
  """Returns how many of the members shall train at once.

  `config.tune.population`, or with 0 (automatic) as many as the device's memory holds.
  CPUs are busy with one member already, so there it is 1, unless nothing but the head
  trains: then the backbone, which is nearly all of the work, is computed once for all.

  Args:
    configs: of all members.
    population: of them.
    split: that they train on.
  """
  asked, wanted = configs[0].tune.population, len(configs)
  if asked:
    return min(asked, wanted)
  stats = jax.local_devices()[0].memory_stats()
  if stats and "bytes_limit" in stats:
    shared, each = member_bytes(configs[0], population)
    shared += split.stored_size**2 * 3 * len(split)
    free = _SHARE * stats["bytes_limit"] - shared
    return max(1, min(wanted, int(free // each)))
  trainable, _ = trees.split(population.program.mask, population.program.mask)
  head_alone = all(name.startswith("head/") for name in trainable)
  return min(wanted, _MOST) if head_alone and population.one_seed else 1


def balanced(number: int, limit: int) -> int:
  """Returns the size of the fewest chunks that hold a number of members.

  All chunks but the last are full, and the last lacks as little as possible.
  """
  return -(-number // -(-number // limit))


def member_bytes(config: ConfigDict, population: Population) -> tuple[int, int]:
  """Returns the bytes on a device (that the members share, of each member).

  An estimate by abstract evaluation, which allocates nothing: parameters, gradients,
  moments, and what the forward pass keeps for the backward pass.
  """
  (one, shared), (two, _) = (_kept_bytes(config, population, m) for m in (1, 2))
  each = two - one
  return shared + max(one - each, 0), max(each, 1)


def _kept_bytes(config: ConfigDict, population: Population, m: int) -> tuple[int, int]:
  """Returns bytes (of m members, of the frozen parameters)."""
  program = population.program
  model, size = program.trained, program.model.backbone.image_size
  params = parameters.param_shapes(model)
  trainable, frozen = trees.split(params, program.mask)
  axes, _ = trees.split(population.axes.params, program.mask)
  _, frozen_axes = trees.split(population.axes.params, program.mask)
  axis = None if population.one_seed else 0
  lead = () if population.one_seed else (m,)
  b = config.batch_size
  images = jax.ShapeDtypeStruct((*lead, b, size, size, 3), jnp.float32)

  def stacked(leaves: Mapping[str, Any], axes: Mapping[str, Any]):
    return {
      n: jax.ShapeDtypeStruct(x.shape if axes[n] is None else (m, *x.shape), x.dtype)
      for n, x in leaves.items()
    }

  def loss(trainable, frozen, images):
    variables = {"params": trees.merge(trainable, frozen)}
    rngs = {"dropout": jax.random.key(0)}
    logits = model.apply(variables, images, train=True, rngs=rngs)
    targets = jnp.zeros((b, model.head.num_classes)).at[:, 0].set(1.0)
    return jnp.mean(losses.cross_entropy(logits, targets))

  def backward(trainable, frozen, images):
    def members(trainable):
      return jax.vmap(loss, (axes, frozen_axes, axis))(trainable, frozen, images)

    return jax.vjp(members, trainable)[1]

  leaves = stacked(trainable, axes), stacked(frozen, frozen_axes)
  kept = jax.eval_shape(backward, *leaves, images)
  moments = jax.eval_shape(program.optimizer.init, params)
  # Parameters, gradients and updates.
  own = 3 * m * _bytes(trainable) + m * _bytes(moments)
  activations = (_bytes(kept) + 2 * _bytes(images)) / program.mesh.size
  return int(own + activations), _bytes(frozen)


def _bytes(tree: Any) -> int:
  return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

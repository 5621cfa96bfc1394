"""Which parameter lies where: frozen backbones too large for one device are split.

Trainable leaves and the optimizer's state are small and lie whole on every device.
Frozen leaves of the backbone are sharded over the mesh's axis "fsdp", each along one of
its axes, and all-gathered where a block needs them. No gradient of a frozen weight
exists, so nothing is ever scattered back.

Source: Rajbhandari et al. 2020, "ZeRO", stage 3, of which only the parameters remain.
"""

from collections.abc import Mapping, Sequence
import functools
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array
import numpy as np

from insvp_jax import trees
from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.models.classifier import PromptedClassifier

# Leaves with fewer scalars (a block's biases) stay whole: fetching them takes longer.
MIN_SHARDED_SIZE = 2**14
# A scanned encoder's leaves have the blocks as first axis, and a step takes one block
# of them. Sharded along that axis, every step would need the part of another device.
# Backbones call the module of stacked blocks by one of these names.
SCANNED_BLOCKS = r"backbone/(.*/)?(encoderblock|blocks)/.*"


def param_shardings(
  shapes: Mapping[str, Any], mask: Mapping[str, Any], mesh: Mesh
) -> dict[str, Any]:
  """Returns the sharding of each parameter, as a tree.

  Args:
    shapes: the tree of parameters, arrays or `jax.ShapeDtypeStruct`.
    mask: bool tree, True where trainable.
    mesh: from `mesh.create_mesh`; without an axis "fsdp" all leaves are whole.
  """
  trainable = trees.flatten(mask)

  def spec(name: str, shape: Sequence[int]) -> PartitionSpec:
    """Returns that of a parameter, or of an array of one that has several."""
    if trainable[name] or not name.startswith("backbone/"):
      return PartitionSpec()
    if re.fullmatch(SCANNED_BLOCKS, name):
      return PartitionSpec(None, *_fsdp_spec(shape[1:], mesh))
    return _fsdp_spec(shape, mesh)

  return trees.unflatten(
    {
      name: jax.tree.map(lambda x, n=name: NamedSharding(mesh, spec(n, x.shape)), leaf)
      for name, leaf in trees.flatten(shapes).items()
    }
  )


def _fsdp_spec(shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
  """Returns how a leaf is sharded: along its first axis that divides, or not at all.

  Parts along the first axis are contiguous: they are read and gathered as they lie.
  Along another one XLA gathers by way of a transposed copy of the stack of blocks.
  """
  num_parts = mesh.shape.get(mesh_lib.FSDP_AXIS, 1)
  divisible = [i for i, size in enumerate(shape) if size and size % num_parts == 0]
  if num_parts == 1 or not divisible or np.prod(shape) < MIN_SHARDED_SIZE:
    return PartitionSpec()
  return PartitionSpec(*[None] * divisible[0], mesh_lib.FSDP_AXIS)


def unshard_in_use(model: PromptedClassifier, mesh: Mesh) -> PromptedClassifier:
  """Returns the model for parameters that lie as `param_shardings` says.

  It computes the same of the same parameters, and all-gathers weights where they are
  used, in the forward pass and again in the backward pass. With `scan` a device has
  one block's weights at a time. Of unrolled blocks XLA decides when it gathers and
  how long it keeps; on CPUs it may keep all.
  """
  if mesh_lib.FSDP_AXIS not in mesh.shape:
    return model

  def all_gather(leaf: Array) -> Array:
    # As it lies, then whole. Left to itself, XLA may shard the activations like the
    # weights, so that every device computes on all images; or gather all blocks before
    # it takes one.
    for spec in (_fsdp_spec(leaf.shape, mesh), PartitionSpec()):
      leaf = jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))
    return leaf

  gather_all = functools.partial(jax.tree.map, all_gather)
  return model.clone(backbone=model.backbone.clone(unshard=gather_all))


def device_put(tree: Any, shardings: Any) -> Any:
  """Returns host arrays as arrays on the devices; each gets only its own part.

  Args:
    tree: numpy arrays; every process must pass the same values.
    shardings: a tree of the same structure.
  """

  def put_leaf(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

  return jax.tree.map(put_leaf, tree, shardings)

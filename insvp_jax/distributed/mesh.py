"""Devices: one mesh, and how arrays lie on it.

The batch is split over all devices; everything else is replicated, but for frozen
backbones that are too large for one device (see `sharding.py`). A step that is
correct on one device is then correct on many: XLA inserts the communication.
"""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"
FSDP_AXIS = "fsdp"


def create_mesh(devices: Sequence[jax.Device] | None = None, *, fsdp: int = 1) -> Mesh:
  """Returns the mesh over `devices`, or over all of them.

  Args:
    devices: the devices.
    fsdp: over how many devices a frozen backbone is split. With 1 the mesh has the
      one axis "data", else ("data", "fsdp") of sizes (devices / fsdp, fsdp), where
      neighbours share a backbone.

  Raises:
    ValueError: `fsdp` does not divide the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  if fsdp < 1 or count % fsdp:
    fits = [str(n) for n in range(1, count + 1) if count % n == 0]
    raise ValueError(
      f"config.backbone.fsdp is {fsdp}, which does not divide {count} devices. Use "
      f"{' or '.join(fits)}."
    )
  shape, axes = ((count,), (DATA_AXIS,))
  if fsdp > 1:
    shape, axes = ((count // fsdp, fsdp), (DATA_AXIS, FSDP_AXIS))
  # Auto: with the default (Explicit) a plain linen ViT raises ShardingTypeError.
  return jax.make_mesh(
    shape, axes, axis_types=(AxisType.Auto,) * len(axes), devices=devices
  )


def platform(mesh: Mesh) -> str:
  """Returns the kind of the devices: "cpu", "gpu" or "tpu"."""
  return mesh.devices.flat[0].platform


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays whose first axis is the batch."""
  # Over all axes: devices that share a backbone still have rows of their own.
  return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays that every device holds in full."""
  return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, mesh: Mesh, name: str = "batch_size") -> None:
  """Checks that a global batch splits evenly over the devices of the mesh.

  A size of 0 stands for one that does; see `config.automatic_batch_size`.

  Raises:
    ValueError: it does not; the message has the nearest sizes that would.
  """
  devices = mesh.size
  if batch_size < 0 or batch_size % devices:
    below = max(batch_size, 0) // devices * devices
    fits = [size for size in (below, below + devices) if size > 0]
    raise ValueError(
      f"{name} is {batch_size}, which does not split evenly over {devices} devices. "
      f"Use {' or '.join(str(size) for size in fits)}."
    )

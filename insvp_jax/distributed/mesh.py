"""Devices: one mesh, how arrays lie on it, and the set-up of several processes.

The batch is split over all devices; everything else is replicated, but for frozen
backbones that are too large for one device (see `shardings.py`). A step that is
correct on one device is then correct on many: XLA inserts the communication.
"""

from collections.abc import Mapping, Sequence
import os
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

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


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays whose first axis is the batch."""
  # Over all axes: devices that share a backbone still have rows of their own.
  return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays that every device holds in full."""
  return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, mesh: Mesh, name: str = "batch_size") -> None:
  """Checks that a global batch splits evenly over the devices of the mesh.

  Raises:
    ValueError: it does not; the message has the nearest sizes that would.
  """
  devices = mesh.size
  if batch_size < 1 or batch_size % devices:
    below = max(batch_size, 0) // devices * devices
    fits = [size for size in (below, below + devices) if size > 0]
    raise ValueError(
      f"{name} is {batch_size}, which does not split evenly over {devices} devices. "
      f"Use {' or '.join(str(size) for size in fits)}."
    )


def put_replicated(tree: Any, mesh: Mesh) -> Any:
  """Returns the tree with each array on every device of the mesh.

  Every process must pass the same values. An array that is already in place is
  returned as it is, so do not donate the result and go on using the argument.
  """
  return jax.device_put(tree, replicated(mesh))


def put_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
  """Returns this process's rows as part of global arrays, split over the devices.

  Args:
    batch: arrays of one first axis: global batch size / number of processes.
    mesh: from `create_mesh`.

  Raises:
    ValueError: the rows do not split evenly over this process's devices.
  """
  rows = {name: len(array) for name, array in batch.items()}
  devices = len(mesh.local_devices)
  if len(set(rows.values())) > 1 or any(n % devices for n in rows.values()):
    raise ValueError(
      f"the batch has rows {rows}; all must be equal and divisible by the "
      f"{devices} devices of this process. Pad the batch."
    )
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, np.asarray(array))
    for name, array in batch.items()
  }


def detect_cluster(environ: Mapping[str, str] | None = None) -> str | None:
  """Returns which launcher started this process as one of several, or None.

  It reads only environment variables, no network. A Cloud TPU VM outside of GKE does
  not say there whether it is one of several, so the launch scripts ask for it.

  Args:
    environ: the environment variables; None reads this process's.
  """
  environ = os.environ if environ is None else environ
  counts = {
    "manual": ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES"),
    "slurm": ("SLURM_STEP_NODELIST", "SLURM_NTASKS"),
    "openmpi": ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE"),
  }
  for cluster, (marker, count) in counts.items():
    # One task of a cluster is an ordinary single process.
    if environ.get(marker) and int(environ.get(count) or 1) > 1:
      return cluster
  if "," in environ.get("TPU_WORKER_HOSTNAMES", ""):
    return "tpu"
  if environ.get("MEGASCALE_COORDINATOR_ADDRESS"):
    return "tpu"
  # An index alone: a notebook in a pod is not one of several processes.
  if environ.get("KUBERNETES_SERVICE_HOST") and environ.get("JOB_COMPLETION_INDEX"):
    return "kubernetes"
  return None


def is_one_of_several(multihost: bool | None = None) -> bool:
  """Returns whether this process is to join others; see `initialize_distributed`."""
  return detect_cluster() is not None if multihost is None else multihost


def initialize_distributed(multihost: bool | None = None, **options: int) -> bool:
  """Joins the processes of a cluster; call it before any use of a device.

  Args:
    multihost: True joins in any case, False never does, None (the default) does
      where `detect_cluster` finds a cluster. A single host needs no joining.
    **options: time-outs, for `jax.distributed.initialize`.

  Returns:
    Whether this process is now one of a joined group.

  Raises:
    ValueError: joining was asked for, but JAX finds no cluster to join.
  """
  if jax.distributed.is_initialized():
    return True
  if not is_one_of_several(multihost):
    return False
  try:
    jax.distributed.initialize(**_manual_settings(), **options)
  except ValueError as error:
    cluster = detect_cluster()
    raise ValueError(
      f"multihost={multihost}, detected cluster: {cluster}, but JAX could not join "
      f"other processes: {error} Start one process per host with SLURM, Open MPI, "
      "Kubernetes or on a TPU pod, set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES "
      "and JAX_PROCESS_ID, or pass multihost=False."
    ) from error
  return True


def _manual_settings() -> dict[str, int]:
  """Returns what JAX does not read by itself beside JAX_COORDINATOR_ADDRESS."""
  names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
  return {key: int(os.environ[var]) for key, var in names.items() if var in os.environ}


def process_info() -> dict[str, Any]:
  """Returns which process this is and what it runs on, for logs and run records."""
  return {
    "process_index": jax.process_index(),
    "process_count": jax.process_count(),
    "local_device_count": jax.local_device_count(),
    "device_count": jax.device_count(),
    "platform": jax.default_backend(),
    "device_kind": jax.devices()[0].device_kind,
  }

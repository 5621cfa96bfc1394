"""How much memory this process has needed at its peak."""

import resource
import sys

import jax


def peak_host_mb() -> float:
  """Returns the largest resident size of this process so far, in MiB."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # In KiB, but on macOS in bytes.
  return peak / (2**20 if sys.platform == "darwin" else 2**10)


def peak_device_mb() -> float | None:
  """Returns the peak of the local device that needed most, in MiB.

  None where the backend does not say: the CPU's memory is the host's.
  """
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
  return max(peaks) / 2**20 if peaks else None

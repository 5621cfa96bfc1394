"""Two real processes that find each other on this machine."""

import os
from pathlib import Path
import socket
import subprocess
import sys

ROOT = Path(__file__).parents[1]


def environs(count: int = 2) -> list[dict[str, str]]:
  """Returns what the environments of processes that form a cluster add to others."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  return [
    {
      "JAX_PLATFORMS": "cpu",
      "JAX_COORDINATOR_ADDRESS": address,
      "JAX_NUM_PROCESSES": str(count),
      "JAX_PROCESS_ID": str(index),
    }
    for index in range(count)
  ]


def run_together(code: str, timeout: float = 300) -> list[str]:
  """Runs Python code as two processes; returns the last line that each printed."""
  # One device each, whatever the environment says.
  flags = os.environ.get("XLA_FLAGS", "").split()
  flags = [flag for flag in flags if "device_count" not in flag]
  inherited = {**os.environ, "XLA_FLAGS": " ".join(flags)}
  workers = [
    subprocess.Popen(
      [sys.executable, "-c", code],
      cwd=ROOT,
      env=inherited | environ,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for environ in environs()
  ]
  lines = []
  try:
    for worker in workers:
      out, err = worker.communicate(timeout=timeout)
      assert worker.returncode == 0, err
      # Gloo prints before.
      lines.append(out.splitlines()[-1])
  finally:
    for worker in workers:
      if worker.poll() is None:
        worker.kill()
        worker.wait()
  return lines

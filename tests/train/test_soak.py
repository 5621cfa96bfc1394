"""A long run in miniature needs no more of anything at its end than at its start."""

import os
from pathlib import Path
import subprocess
import sys
import time

import pytest
from tiny_commands import base_flags, flags_of, make_place

STEPS = 10_000


def needs(pid: int) -> dict[str, int]:
  """Returns what a process has: resident KiB, open files, threads."""
  status = dict(
    line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
  )
  return {
    "memory": int(status["VmRSS"].split()[0]),
    "files": len(os.listdir(f"/proc/{pid}/fd")),
    "threads": int(status["Threads"]),
  }


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_ten_thousand_steps_with_two_hundred_checkpoints_leak_nothing(root, tmp_path):
  workdir = tmp_path / "run"
  command = [
    *[sys.executable, "-m", "insvp_jax.main", f"--workdir={workdir}"],
    *base_flags(root, make_place(tmp_path)),
    *flags_of(
      method="linear",
      total_steps=STEPS,
      # 6 steps are an epoch.
      checkpoint_every_epochs=50 / 6,
      eval_every_epochs=500 / 6,
      log_every_steps=10,
      tensorboard=True,
    ),
  ]
  found: list[dict[str, int]] = []
  checkpoints = []
  with (tmp_path / "said").open("w") as said:
    process = subprocess.Popen(command, cwd=root, stdout=said, stderr=said)
    metrics, size = workdir / "metrics.jsonl", 0
    while process.poll() is None:
      time.sleep(0.1)
      new = metrics.stat().st_size if metrics.exists() else 0
      if new == size:
        continue
      size = new
      try:
        found.append(needs(process.pid))
        checkpoints.append(os.listdir(workdir / "checkpoints"))
      except (FileNotFoundError, ProcessLookupError, KeyError):
        break  # it has just ended
  assert process.wait() == 0, (tmp_path / "said").read_text()
  # The first tenth warms up: threads start, allocators fill their pools.
  warm = found[len(found) // 10 :]
  assert len(warm) > 20
  third = len(warm) // 3

  def least(part, name):
    """Returns what is there even in the quietest moment.

    How much a checkpoint that is being written holds open depends on how busy the
    machine is, but what leaked stays.
    """
    return min(row[name] for row in part)

  early, late = warm[:third], warm[-third:]
  assert least(late, "memory") < 1.05 * least(early, "memory")
  for name in ("files", "threads"):
    # A leak of one per checkpoint would be over 100; pools of threads fill up late.
    assert least(late, name) <= least(early, name) + 8, name
  # Two that are kept, one that is written and those that are about to go.
  assert max(map(len, checkpoints)) <= 5
  names = sorted(os.listdir(workdir / "checkpoints"))
  assert names == sorted([str(STEPS - 50), str(STEPS)])

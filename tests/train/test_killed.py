"""A run killed at any moment and started again ends as if nothing had happened."""

import contextlib
import json
import os
from pathlib import Path
import random
import signal
import time

from main_driver import Driver
import numpy as np
import pytest
from tiny_commands import base_flags, flags_of, make_place

from insvp_jax.checkpoints.files import (
  CHECKSUMS,
  find_steps,
  read_arrays,
  read_json,
  verify,
)

KILLS = 10
TOTAL = 300  # steps, of which no attempt that is killed can do many


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
  with Driver(tmp_path_factory.mktemp("cwd")) as driver:
    yield driver


@pytest.fixture(scope="module")
def base(root, tmp_path_factory):
  """A run in which all that is drawn at random is drawn."""
  return [
    *base_flags(root, make_place(tmp_path_factory.mktemp("place"))),
    *flags_of(
      total_steps=TOTAL,
      log_every_steps=1,
      checkpoint_every_epochs=10 / 6,
      eval_every_epochs=10 / 6,
      data__preset="insvp_release",
      vpt_deep__dropout=0.1,
      loss__mixup_alpha=0.8,
      loss__cutmix_alpha=1.0,
      optim__accumulate_steps=2,
    ),
  ]


def rows(workdir):
  """Returns the whole lines of metrics.jsonl: one may be under way."""
  path = workdir / "metrics.jsonl"
  lines = path.read_text().splitlines(keepends=True) if path.exists() else []
  return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(workdir):
  found = rows(workdir)
  return found[-1]["step"] if found else 0


def saving(workdir):
  """Returns the checkpoints that are being written, also by a run that is dead."""
  found = set()
  for path in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
    with contextlib.suppress(FileNotFoundError):
      found.add((path.name, path.stat().st_ino))
  return found


def touched(workdir):
  """Returns when metrics.jsonl was last written to."""
  path = workdir / "metrics.jsonl"
  return path.stat().st_mtime_ns if path.exists() else 0


def await_moment(draw, kind, workdir, before):
  """Returns at a random moment of a run: its start, a step, or a save.

  Args:
    draw: the random numbers.
    kind: which of these.
    workdir: of the run.
    before: (`saving`, `touched`) when the run was started.
  """
  deadline = time.monotonic() + 120
  if kind == "start":
    time.sleep(draw.uniform(0, 2))
    return
  target = find_or_0(workdir) + draw.randint(1, 45)
  while time.monotonic() < deadline:
    # Before it is touched it tells of the steps of the run that was killed.
    stepped = touched(workdir) != before[1] and last_step(workdir) >= target
    if saving(workdir) - before[0] if kind == "save" else stepped:
      break
    time.sleep(0.002)
  time.sleep(draw.uniform(0, 0.3 if kind == "save" else 0.01))


def find_or_0(workdir):
  """Returns the step of the newest checkpoint, 0 without one."""
  try:
    return int(find_steps(workdir)[0].name)
  except FileNotFoundError:
    return 0


def compared(workdir):
  """Returns all that a run leaves behind but times and measurements."""
  where = find_steps(workdir)[0]
  arrays = {
    f"{item}/{name}": np.asarray(leaf).tobytes()
    for item in ("adapter", "optimizer")
    for name, leaf in read_arrays(where, item).items()
  }
  measured = ("_seconds", "_second", "_mb", "seconds")
  progress, result = (
    {k: v for k, v in found.items() if not k.endswith(measured) and "timed" not in k}
    for found in (
      read_json(where, "progress"),
      json.loads((workdir / "result.json").read_text()),
    )
  )
  metrics = [
    {k: v for k, v in row.items() if k != "images_per_second"} for row in rows(workdir)
  ]
  assert len(metrics) == (workdir / "metrics.jsonl").read_text().count("\n")
  names = sorted(str(p.relative_to(workdir)) for p in files(workdir))
  return {
    "arrays": arrays,
    "progress": progress,
    "result": result,
    "metrics": metrics,
    "names": names,
    "config": (workdir / "config.json").read_text(),
  }


def files(workdir: Path):
  """Returns the workdir's files and the directories of its checkpoints."""
  return [*workdir.iterdir(), *(workdir / "checkpoints").iterdir()]


@pytest.mark.slow
def test_killed_at_ten_random_moments_equals_never_killed(driver, base, tmp_path):
  whole = driver.run(*base, f"--workdir={tmp_path / 'whole'}")
  assert whole.status == 0, whole.err
  workdir = tmp_path / "killed"
  command = [*base, f"--workdir={workdir}"]
  draw = random.Random(0)
  reached = []
  for i in range(KILLS):
    kind = ("step", "save", "step", "save", "start")[i % 5]
    before = saving(workdir), touched(workdir)
    (pid,) = driver.start(*command, envs=[{}])
    await_moment(draw, kind, workdir, before)
    os.kill(pid, signal.SIGKILL)
    (done,) = driver.wait()
    assert done.status == -signal.SIGKILL, (kind, done)
    reached.append(find_or_0(workdir))
    # A checkpoint is complete or not there.
    for step in (workdir / "checkpoints").glob("[0-9]*"):
      if step.name.isdigit():
        assert (step / CHECKSUMS).exists()
        verify(step)
  # Nothing was lost but the steps since the last checkpoint.
  assert reached == sorted(reached) and reached[-1] > 30, str(reached)
  (pid,) = driver.start(*command, envs=[{}])
  while "test_accuracy" not in str(rows(workdir)[-1:]):
    time.sleep(0.002)
  # Here before the last checkpoint is complete, or result.json is there.
  os.kill(pid, signal.SIGKILL)
  driver.wait()
  last = driver.run(*command)
  assert last.status == 0, last.err
  assert "resumed at step" in last.err
  first, second = compared(tmp_path / "whole"), compared(workdir)
  for what, content in first.items():
    assert content == second[what], what
  assert len(first["metrics"]) == TOTAL + TOTAL // 10 and len(first["arrays"]) > 8

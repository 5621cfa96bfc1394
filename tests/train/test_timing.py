"""Time is counted where it is spent, and goes on after an interruption."""

import types

import jax
import pytest

from insvp_jax.train import memory
from insvp_jax.train import timing as clock_lib
from insvp_jax.train.timing import Clock


@pytest.fixture
def now(monkeypatch):
  """A time that passes when it is told to."""
  now = types.SimpleNamespace(seconds=0.0)
  monkeypatch.setattr(clock_lib.time, "perf_counter", lambda: now.seconds)
  return now


def test_compiling_waiting_and_training_are_told_apart(now):
  clock = Clock()
  assert (clock.images_per_second, clock.step_seconds) == (0.0, None)
  with clock.compiling(), clock.waiting(False):
    now.seconds += 5
  clock.add(0, 8)
  assert (
    clock.describe() == "5.0 s of training: 5.0 s compiling, 0.0 s waiting for input"
  )
  for _ in range(4):
    with clock.compiling(False), clock.waiting():
      now.seconds += 0.25
    now.seconds += 0.25
  clock.add(4, 8)
  now.seconds += 100  # an evaluation
  clock.skip()
  assert (clock.seconds, clock.compile_seconds, clock.input_wait_seconds) == (7, 5, 1)
  assert (clock.images_per_second, clock.step_seconds) == (16, 0.5)
  assert clock.describe().endswith("1.0 s waiting for input, 500 ms a step")
  again = Clock(**clock.state())
  assert again.state() == clock.state() and again.describe() == clock.describe()


def test_peaks_of_memory(monkeypatch):
  assert 50 < memory.peak_host_mb() < 10**6
  stats = [{"peak_bytes_in_use": 2**20}, {"peak_bytes_in_use": 3 * 2**20}, None]
  devices = [types.SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]
  monkeypatch.setattr(jax, "local_devices", lambda: devices)
  assert memory.peak_device_mb() == 3
  monkeypatch.setattr(jax, "local_devices", lambda: devices[2:])
  assert memory.peak_device_mb() is None

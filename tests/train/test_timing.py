"""Time is counted where it is spent, and goes on after an interruption."""

import types

import jax
import pytest

from insvp_jax.train import report, timing
from insvp_jax.train.timing import Timer


@pytest.fixture
def now(monkeypatch):
  """A time that passes when it is told to."""
  now = types.SimpleNamespace(seconds=0.0)
  monkeypatch.setattr(timing.time, "perf_counter", lambda: now.seconds)
  return now


def test_compiling_waiting_and_training_are_told_apart(now):
  timer = Timer()
  assert (timer.images_per_second, timer.step_seconds) == (None, None)
  with timer.compiling():
    now.seconds += 5
  timer.add(0, 0)
  line = "5.0 s of training: 5.0 s compiling, 0.0 s waiting for input"
  assert timer.summary_line() == line
  for _ in range(4):
    with timer.waiting():
      now.seconds += 0.25
    now.seconds += 0.25
  timer.add(4, 32)
  now.seconds += 100  # an evaluation
  timer.restart()
  assert (timer.seconds, timer.compile_seconds, timer.input_wait_seconds) == (7, 5, 1)
  assert (timer.images_per_second, timer.step_seconds) == (16, 0.5)
  assert timer.summary_line().endswith("1.0 s waiting for input, 500 ms a step")
  again = Timer.of({**timer.state(), "step": 4})
  assert again.state() == timer.state()
  assert again.summary_line() == timer.summary_line()


def test_features_are_counted_apart_and_steps_on_them_have_no_rate(now):
  timer = Timer()
  with timer.computing_features():
    now.seconds += 2
  timer.add(0, 0)
  now.seconds += 1
  timer.add(10, 0)
  assert timer.summary_line() == (
    "3.0 s of training: 0.0 s compiling, 2.0 s computing features, 0.0 s waiting for "
    "input, 100 ms a step"
  )
  assert timer.images_per_second is None and timer.feature_seconds == 2


def test_peaks_of_memory(monkeypatch):
  assert 50 < report.peak_host_mb() < 10**6
  stats = [{"peak_bytes_in_use": 2**20}, {"peak_bytes_in_use": 3 * 2**20}, None]
  devices = [types.SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]
  monkeypatch.setattr(jax, "local_devices", lambda: devices)
  assert report.peak_device_mb() == 3
  monkeypatch.setattr(jax, "local_devices", lambda: devices[2:])
  assert report.peak_device_mb() is None

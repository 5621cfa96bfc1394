"""Signals: remembered while training, raised outside of it."""

import gc
import os
import random
import signal
import subprocess
import sys
import threading

import pytest
import stopped_starts
from tiny_commands import base_flags, make_place

from insvp_jax import main
from insvp_jax.distributed import stopping
from insvp_jax.distributed.stopping import Interrupted, Stopped, StopSignal

SIGNALS = [(signal.SIGTERM, 42), (signal.SIGINT, 130)]


def handlers():
  return [signal.getsignal(signum) for signum, _ in SIGNALS]


@pytest.mark.parametrize("signum, status", SIGNALS)
def test_a_signal_is_remembered_and_the_handlers_come_back(signum, status):
  before = handlers()
  with StopSignal().listen() as stop:
    assert stop.signum is None
    os.kill(os.getpid(), signum)
    assert stop.signum == signum
  assert handlers() == before
  stopped = Stopped(stop.signum, step=7)
  assert stopped.exit_status == status
  assert f"{signal.Signals(signum).name} at step 7; the checkpoint" in str(stopped)


def test_the_second_signal_acts_at_once(root):
  code = """
import signal
from insvp_jax.distributed.stopping import StopSignal
with StopSignal().listen():
  signal.raise_signal(signal.SIGTERM)
  print("once", flush=True)
  signal.raise_signal(signal.SIGTERM)
  print("twice", flush=True)
"""
  command = [sys.executable, "-c", code]
  done = subprocess.run(command, cwd=root, capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (-signal.SIGTERM, "once\n"), done.stderr


def test_the_handlers_come_back_after_an_error():
  before = handlers()
  with pytest.raises(RuntimeError), StopSignal().listen():
    raise RuntimeError
  assert handlers() == before


def test_of_several_processes_ctrl_c_becomes_the_signal_that_all_hear_of():
  before, heard = handlers(), []
  previous = signal.signal(signal.SIGTERM, lambda signum, frame: heard.append(signum))
  try:
    with StopSignal().listen(is_single_process=False) as stop:
      os.kill(os.getpid(), signal.SIGINT)
      # Where to stop is for all of them to agree on.
      assert (stop.signum, stop.passed_on) == (None, signal.SIGINT)
      assert heard == [signal.SIGTERM]
      assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
  finally:
    signal.signal(signal.SIGTERM, previous)
  assert handlers() == before


def test_in_another_thread_nothing_changes():
  before, inside = handlers(), []

  def elsewhere():
    with StopSignal().listen() as stop:
      inside.append(handlers())
      assert stop.signum is None

  thread = threading.Thread(target=elsewhere)
  thread.start()
  thread.join()
  assert inside == [before]


@pytest.fixture
def interrupting():
  """Outside of training: the handlers of then, and none of a signal yet."""
  before = handlers()
  stopping.handle(stopping.interrupt)
  yield
  # Nothing came, for the tests that follow.
  stopping.handle(stopping.interrupt)
  for (signum, _), handler in zip(SIGNALS, before, strict=True):
    signal.signal(signum, handler)


@pytest.mark.parametrize("signum, status", SIGNALS)
def test_outside_of_training_a_signal_interrupts(interrupting, signum, status):
  stopping.check()
  # No `except Exception` may swallow it.
  with pytest.raises(KeyboardInterrupt, match="stopped by SIG") as interrupted:
    os.kill(os.getpid(), signum)
  assert isinstance(interrupted.value, Interrupted)
  assert interrupted.value.exit_status == status


@pytest.mark.parametrize("signum, status", SIGNALS)
def test_a_signal_that_a_callback_swallows_is_heard_later(
  interrupting, monkeypatch, capsys, signum, status
):
  monkeypatch.setattr(sys, "unraisablehook", stopping.report_unraisable)

  def collected(phase, info):
    if not stopping.raised():
      os.kill(os.getpid(), signum)

  monkeypatch.setattr(gc, "callbacks", gc.callbacks)
  gc.callbacks.append(collected)
  try:
    gc.collect()
  finally:
    gc.callbacks.remove(collected)
  # What trains looks before it starts and, where nobody listens, after each step.
  with pytest.raises(Interrupted, match="stopped by SIG"):
    stopping.check()
  with pytest.raises(Interrupted), StopSignal().listen():
    pytest.fail("it starts")
  assert handlers() == [stopping.interrupt] * 2
  assert StopSignal().signum == signum
  assert stopping.raised().exit_status == status
  assert capsys.readouterr().err == ""


def test_an_error_that_was_made_of_a_signal_is_a_stop(
  interrupting, monkeypatch, capsys
):
  def run(*args, **kwargs):
    stopping.handle(stopping.interrupt)
    try:
      signal.raise_signal(signal.SIGTERM)
    except Interrupted as error:
      raise ImportError("half of a library") from error

  monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
  monkeypatch.setattr(main.app, "run", run)
  with pytest.raises(SystemExit) as stop:
    main.run(["insvp"])
  assert stop.value.code == 42
  assert capsys.readouterr().err.startswith("insvp_jax: stopped by SIGTERM.")


@pytest.mark.parametrize("signum, status", SIGNALS)
def test_until_all_is_imported_a_signal_ends_the_process(root, signum, status):
  code = f"""
from insvp_jax.distributed import stopping
stopping.handle(stopping.end)
import signal
try:
  signal.raise_signal({int(signum)})
finally:
  print("raised")
"""
  command = [sys.executable, "-c", code]
  done = subprocess.run(command, cwd=root, capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (status, ""), done.stderr
  name = signal.Signals(signum).name
  assert done.stderr.startswith(f"insvp_jax: stopped by {name}. Start the same")


@pytest.mark.slow
def test_signals_at_random_moments_of_the_start_are_heard(root, tmp_path):
  flags = [*base_flags(root, make_place(tmp_path)), stopped_starts.ENDLESS]
  longest = stopped_starts.seconds_to_first_step(flags, tmp_path)
  rng = random.Random(0)
  for i, (signum, status) in enumerate(SIGNALS * 2):
    seconds = rng.uniform(0, longest)
    got, err = stopped_starts.stopped(flags, tmp_path / str(i), signum, seconds)
    assert got == status and "Traceback" not in err, (seconds, err)

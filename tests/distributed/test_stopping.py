"""Signals: remembered while training, raised outside of it."""

import os
import signal
import subprocess
import sys
import threading

import pytest

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


@pytest.mark.parametrize("signum, status", SIGNALS)
def test_outside_of_training_a_signal_interrupts(signum, status):
  previous = signal.signal(signum, stopping.interrupt)
  try:
    # No `except Exception` may swallow it.
    with pytest.raises(KeyboardInterrupt, match="stopped by SIG") as interrupted:
      os.kill(os.getpid(), signum)
  finally:
    signal.signal(signum, previous)
  assert isinstance(interrupted.value, Interrupted)
  assert interrupted.value.exit_status == status

"""A workdir has one owner at a time, and a dead owner does not keep it."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from insvp_jax.distributed import lock

HOLD = """
import sys, time
from insvp_jax import lock
with lock.hold(sys.argv[1]):
  print("held", flush=True)
  time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path, root):
  """A process that holds the lock of `tmp_path`."""
  command = [sys.executable, "-c", HOLD, str(tmp_path)]
  process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "held\n"
  yield process
  process.kill()
  process.wait()
  process.stdout.close()


def test_a_held_workdir_is_refused_and_a_left_one_is_free(tmp_path):
  workdir = tmp_path / "new"
  with lock.hold(workdir):
    with (
      pytest.raises(ValueError, match=f"another run .*process {os.getpid()} on "),
      lock.hold(workdir),
    ):
      pass
    assert (workdir / lock.LOCK_FILE).exists()
  assert not list(workdir.iterdir())
  with pytest.raises(RuntimeError), lock.hold(workdir):
    raise RuntimeError
  with lock.hold(workdir):
    pass


def test_a_living_owner_is_named_and_a_killed_one_loses_it_at_once(tmp_path, owner):
  with (
    pytest.raises(ValueError, match=rf"process {owner.pid} on .*, started 20\d\d-"),
    lock.hold(tmp_path),
  ):
    pass
  owner.send_signal(signal.SIGKILL)
  owner.wait()
  assert (tmp_path / lock.LOCK_FILE).exists()
  with lock.hold(tmp_path):
    found = json.loads((tmp_path / lock.LOCK_FILE).read_text())
    assert (found["pid"], found["host"]) == (os.getpid(), socket.gethostname())


def leave(workdir, **owner):
  """Writes the lock of a process on another host."""
  path = workdir / lock.LOCK_FILE
  path.write_text(
    json.dumps({"host": "elsewhere", "pid": 7, "started": "then", **owner})
  )
  return path


def test_a_silent_owner_on_another_host_loses_it_after_a_while(tmp_path, capsys):
  path = leave(tmp_path)
  with lock.hold(tmp_path, stale_seconds=0.5):
    assert json.loads(path.read_text())["pid"] == os.getpid()
  said = "belongs to process 7 on elsewhere, started then; waiting for up to"
  assert said in capsys.readouterr().err
  os.utime(leave(tmp_path), (1, 1))
  with lock.hold(tmp_path):
    pass
  assert capsys.readouterr().err == ""


def test_an_owner_on_another_host_that_lives_keeps_it(tmp_path):
  path = leave(tmp_path)
  timer = threading.Timer(0.3, os.utime, [path])
  timer.start()
  with (
    pytest.raises(ValueError, match="process 7 on elsewhere, started then. Wait"),
    lock.hold(tmp_path, stale_seconds=60),
  ):
    pass
  timer.join()
  assert json.loads(path.read_text())["host"] == "elsewhere"


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_half_a_lock_is_no_lock(tmp_path, content):
  (tmp_path / lock.LOCK_FILE).write_text(content)
  with lock.hold(tmp_path):
    pass


def test_without_locks_of_the_file_system_the_time_tells(tmp_path, monkeypatch):
  def unsupported(file, how):
    raise OSError(95, "Operation not supported")

  monkeypatch.setattr(lock.fcntl, "flock", unsupported)
  path = leave(tmp_path, host=socket.gethostname())
  with lock.hold(tmp_path, stale_seconds=0.2):
    assert json.loads(path.read_text())["pid"] == os.getpid()


def test_an_owner_renews_the_time(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
  with lock.hold(tmp_path):
    path = tmp_path / lock.LOCK_FILE
    os.utime(path, (1, 1))
    while path.stat().st_mtime == 1:
      time.sleep(0.01)


def test_a_place_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  with (
    pytest.raises(OSError, match="cannot write to .*file: .*Choose another workdir"),
    lock.hold(tmp_path / "file"),
  ):
    pass

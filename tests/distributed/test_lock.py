"""A workdir has one owner at a time, and a dead owner does not keep it."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from insvp_jax.distributed import lock

HOLD = """
import sys, time
from insvp_jax.distributed import lock
with lock.hold(sys.argv[1]):
  print("held", flush=True)
  time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path, root):
  """A process that holds the lock of `tmp_path`."""
  command = [sys.executable, "-c", HOLD, str(tmp_path)]
  with subprocess.Popen(
    command, cwd=root, stdout=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()


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


def test_a_living_owner_is_named_and_a_killed_one_loses_it_at_once(
  tmp_path, owner, capsys
):
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
  assert capsys.readouterr().err == ""


def test_who_was_killed_on_another_host_is_named(tmp_path, capsys):
  path = tmp_path / lock.LOCK_FILE
  path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "started": "then"}))
  with lock.hold(tmp_path):
    assert json.loads(path.read_text())["pid"] == os.getpid()
  said = capsys.readouterr().err
  assert "was not left in order by process 7 on elsewhere, started then. If" in said
  assert said.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_half_a_lock_is_no_lock(tmp_path, content):
  (tmp_path / lock.LOCK_FILE).write_bytes(content)
  with lock.hold(tmp_path):
    pass


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_of_the_file_system_a_line_says_so(
  tmp_path, monkeypatch, capsys, number
):
  def unsupported(file, how):
    raise OSError(number, "not supported")

  monkeypatch.setattr(fcntl, "flock", unsupported)
  with lock.hold(tmp_path), lock.hold(tmp_path):
    pass
  assert not list(tmp_path.iterdir())
  said = capsys.readouterr().err.splitlines()
  assert said == 2 * [
    f"the file system of {tmp_path} has no locks (not supported): nothing keeps "
    "another run out of it."
  ]


def test_a_place_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  with (
    pytest.raises(OSError, match="cannot write to .*file: .*Choose another workdir"),
    lock.hold(tmp_path / "file"),
  ):
    pass


def test_a_full_disk_leaves_nothing_locked(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(lock.Path, "write_text", full)
    with pytest.raises(OSError, match="No space left.* workdir"), lock.hold(tmp_path):
      pass
  with lock.hold(tmp_path):
    pass


@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "pipe", "folder"])
def test_a_lock_that_is_not_ours_is_left_alone(tmp_path, kind):
  other, workdir = tmp_path / "other", tmp_path / "run"
  workdir.mkdir()
  other.write_text("precious")
  path = workdir / lock.LOCK_FILE
  if kind == "link":
    path.symlink_to(other)
  elif kind == "dangling":
    path.symlink_to(tmp_path / "nowhere")
  elif kind == "hard link":
    os.link(other, path)
  elif kind == "pipe":
    os.mkfifo(path)
  else:
    path.mkdir()
  with (
    pytest.raises(ValueError, match=r"\.lock (is a|has 2 names).*another workdir"),
    lock.hold(workdir),
  ):
    pass
  assert other.read_text() == "precious"
  assert not (tmp_path / "nowhere").exists() and os.path.lexists(path)


def test_the_workdir_itself_may_be_a_link(tmp_path):
  (tmp_path / "scratch").mkdir()
  (tmp_path / "run").symlink_to("scratch")
  with lock.hold(tmp_path / "run"):
    assert (tmp_path / "scratch" / lock.LOCK_FILE).is_file()


@pytest.mark.parametrize(
  "before", ['{"host": ["x"]}', "[" * 10**5, '{"host": "a\\nb"}']
)
def test_an_odd_lock_that_nobody_holds_is_taken(tmp_path, before, capsys):
  (tmp_path / lock.LOCK_FILE).write_text(before)
  with lock.hold(tmp_path):
    pass
  assert capsys.readouterr().err.count("\n") <= 1

"""One run to one workdir: a lock file that says who has it.

On one host the operating system knows whether its owner lives: it frees the lock of
a process that dies, however it does. Of another host's owner the file's time tells,
which a living one renews.
"""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import json
import os
from pathlib import Path
import socket
import sys
import tempfile
import threading
import time
from typing import Any

LOCK_FILE = ".lock"
BEAT_SECONDS = 10
# Without a sign of life for so long the owner on another host is dead: more than what
# network file systems show a file's time late by.
STALE_SECONDS = 90


@contextlib.contextmanager
def hold(
  workdir: str | os.PathLike, stale_seconds: float | int = STALE_SECONDS
) -> Iterator[None]:
  """Owns a workdir inside of the with block.

  Args:
    workdir: made if need be.
    stale_seconds: how long the owner on another host may give no sign of life.

  Raises:
    ValueError: another process that lives owns it.
    OSError: the workdir cannot be written to.
  """
  path = Path(workdir) / LOCK_FILE
  file = _open(path)
  try:
    _take(file, path, stale_seconds)
    try:
      with _renewed(path):
        yield
    finally:
      with contextlib.suppress(OSError):
        path.unlink()
  finally:
    os.close(file)


def _open(path: Path) -> int:
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
  except OSError as error:
    raise OSError(
      f"cannot write to {path.parent}: {error.strerror}. Choose another workdir."
    ) from error


def _take(file: int, path: Path, stale_seconds: float | int) -> None:
  """Writes this process's name into the file, once nobody else has it."""
  is_known_free = _flock(file, path)
  owner = _read(file)
  host = socket.gethostname()
  # The lock of a host that does not share its locks, or of a file system without any.
  if owner and not (is_known_free and owner.get("host") == host):
    _await_silence(file, path, owner, stale_seconds)
  mine = {
    "host": host,
    "pid": os.getpid(),
    "started": time.strftime("%Y-%m-%d %H:%M:%S"),
  }
  try:
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(mine).encode(), 0)
  except OSError as error:
    raise OSError(f"cannot write {path}: {error.strerror}. Free some space.") from error


def _flock(file: int, path: Path) -> bool:
  """Returns whether the operating system knows that no living process has it."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    raise _owned(path, _read(file)) from error
  except OSError as error:
    if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
      return False
    raise
  # The owner may have left, and taken the file along, since it was opened.
  if not path.exists() or not os.path.samestat(os.fstat(file), path.stat()):
    raise _owned(path, {})
  return True


def _await_silence(file, path: Path, owner, stale_seconds: float | int) -> None:
  """Returns when an owner that cannot be asked has been silent for long enough.

  Raises:
    ValueError: it renews the file, so it lives.
  """
  seen = os.fstat(file).st_mtime_ns
  # The files' clock may be that of another host than this one.
  with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name) as probe:
    age = (os.fstat(probe.fileno()).st_mtime_ns - seen) / 1e9
  left = stale_seconds - age
  if left > 0:
    print(
      f"{path.parent} belongs to {_name(owner)}; waiting for up to {left:.0f} s to see "
      "whether that lives.",
      file=sys.stderr,
      flush=True,
    )
  until = time.monotonic() + left
  while time.monotonic() < until:
    time.sleep(min(1.0, stale_seconds / 10))
    if not path.exists() or path.stat().st_mtime_ns != seen:
      raise _owned(path, owner)


def _read(file: int) -> dict[str, Any]:
  """Returns who owns the lock; {} if nobody does, or died while taking it."""
  try:
    owner = json.loads(os.pread(file, 4096, 0))
  except ValueError:
    return {}
  return owner if isinstance(owner, dict) else {}


def _name(owner: dict[str, Any]) -> str:
  return (
    f"process {owner.get('pid', '?')} on {owner.get('host', '?')}, "
    f"started {owner.get('started', '?')}"
  )


def _owned(path: Path, owner: dict[str, Any]) -> ValueError:
  who = _name(owner) if owner else "a process that has just started"
  return ValueError(
    f"{path.parent} belongs to another run that is under way: {who}. Wait for it, stop "
    "it, or use another workdir."
  )


@contextlib.contextmanager
def _renewed(path: Path) -> Iterator[None]:
  """Renews the file's time inside of the with block."""
  over = threading.Event()

  def renew() -> None:
    while not over.wait(BEAT_SECONDS):
      with contextlib.suppress(OSError):
        os.utime(path)

  thread = threading.Thread(target=renew, name="insvp_jax_lock", daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()

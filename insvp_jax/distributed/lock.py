"""One run to one workdir: a lock file that says who has it.

The operating system frees the lock of a process that ends, however it does, so the next
run takes it at once. Other hosts know of it where the file system tells them: network
file systems do, a bucket that is mounted as a folder does not.
"""

from collections.abc import Iterator
import contextlib
import errno
import json
import os
from pathlib import Path
import socket
import sys
import time

import filelock

from insvp_jax import files

LOCK_FILE = ".lock"
_MAX_BYTES = 2**16  # who owns it takes a hundred
_HAS_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def hold(workdir: str | os.PathLike) -> Iterator[None]:
  """Owns a workdir inside of the with block.

  A line on stderr says so where the file system has no locks, and where the last owner
  was killed on another host: if the file system does not share its locks, that run may
  still be under way.

  Args:
    workdir: made if need be.

  Raises:
    ValueError: another process that lives owns it, or the lock is a link or no file.
    OSError: the workdir cannot be written to.
  """
  path = Path(workdir) / LOCK_FILE
  with contextlib.ExitStack() as stack:
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      # To lock a file empties it.
      files.check_writable_in_place(path)
      stack.enter_context(_locked(path))
      _write_owner(path)
    except OSError as error:
      raise OSError(
        f"cannot write to {path.parent}: {error.strerror}. Choose another workdir."
      ) from error
    yield


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
  # The library's fallback, a file that is there or not, would be kept by a killed run.
  lock = filelock.FileLock(path, timeout=0, fallback_to_soft=False)
  try:
    lock.acquire()
  except filelock.Timeout as error:
    owner = _read_owner(path)
    name = _describe(owner) if owner else "a process that has just started"
    raise ValueError(
      f"{path.parent} belongs to another run that is under way: {name}. Wait for it, "
      "stop it, or use another workdir."
    ) from error
  except OSError as error:
    if error.errno not in _HAS_NO_LOCKS:
      raise
    _warn(
      f"the file system of {path.parent} has no locks ({error.strerror}): nothing "
      "keeps another run out of it."
    )
  try:
    yield
  finally:
    # While it is locked still: nobody else's file is removed.
    with contextlib.suppress(OSError):
      path.unlink()
    lock.release()


def _write_owner(path: Path) -> None:
  """Writes this process into the lock file; says who has been killed elsewhere."""
  host, before = socket.gethostname(), _read_owner(path)
  if before.get("host", host) != host:
    _warn(
      f"{path.parent} was not left in order by {_describe(before)}. If that run is "
      "still under way, stop one of the two."
    )
  started = time.strftime("%Y-%m-%d %H:%M:%S")
  owner = {"host": host, "pid": os.getpid(), "started": started}
  path.write_text(json.dumps(owner))


def _read_owner(path: Path) -> dict[str, str | int]:
  """Returns host, pid and start of who owns the lock; {} if that cannot be read."""
  try:
    owner = files.parse_json(files.read_bytes(path, _MAX_BYTES))
  except (OSError, ValueError):
    return {}
  known = owner.items() if isinstance(owner, dict) else ()
  return {key: value for key, value in known if isinstance(value, str | int)}


def _describe(owner: dict[str, str | int]) -> str:
  # In one line of moderate length, whatever they are.
  pid, host, started = (
    " ".join(str(owner.get(key, "?")).split())[:80]
    for key in ("pid", "host", "started")
  )
  return f"process {pid} on {host}, started {started}"


def _warn(text: str) -> None:
  print(text, file=sys.stderr, flush=True)

"""The processes of one run: joined, compared, watched.

They talk through the key-value store of JAX's coordination service, which needs no
device: it answers while a device program hangs on a process that is gone.

Left to itself JAX aborts with a stack trace when a process is lost. Here each process
tells the others once in a while that it lives; who fails says why, and who misses
another says which one, in one line. Both end the process, since no step can be taken
without all of them.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import ctypes
import itertools
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from typing import Any, NoReturn

import jax

from insvp_jax import trees
from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.distributed.stopping import Stopped

# A lost process is no fault of the command: started again it resumes.
LOST = 42
_DAY = 24 * 3600 * 1000  # in ms: some host may take hours to decode a task
_numbers = itertools.count()


def _store() -> Any:
  """Returns the client of the coordination service, or None in a single process."""
  # JAX has no public name for it; Orbax takes it from here, too.
  from jax._src import distributed

  return distributed.global_state.client


def check_same(what: str, mine: Mapping[str, Any], mend: str = "") -> None:
  """Checks that all processes hold the same; returns when all have looked.

  Args:
    what: what is compared, for the message.
    mine: nested JSON-like values; every process passes its own.
    mend: what to do about a difference.

  Raises:
    ValueError: this process and the first one differ; the message names the keys.
  """
  # Unlike the number of processes, this starts no device.
  store = _store()
  if store is None:
    return
  index = jax.process_index()
  # Every process makes the same calls in the same order.
  key = f"insvp_jax/same/{next(_numbers)}"
  if index == 0:
    store.key_value_set(key, json.dumps(mine))
  first = trees.flatten(json.loads(store.blocking_key_value_get(key, _DAY)))
  here = trees.flatten(json.loads(json.dumps(mine)))
  wrong = [
    f"{name.replace('/', '.')} is {here.get(name)!r}, not {first.get(name)!r}"
    for name in sorted({*here, *first})
    if here.get(name) != first.get(name)
  ]
  if wrong:
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    raise ValueError(
      f"process {index} differs from process 0 in {what}: {'; '.join(wrong[:5])}{more}."
      f" {mend}".rstrip()
    )
  wait(key)


def wait(name: str) -> None:
  """Returns when every process has called it with this name."""
  if store := _store():
    store.wait_at_barrier(f"{name}/barrier/{next(_numbers)}", _DAY)


@contextlib.contextmanager
def joined(
  multihost: bool | None, *, join_timeout: int, lost_timeout: int
) -> Iterator["Watch | None"]:
  """Joins the processes of a cluster and watches them inside of the with block.

  Args:
    multihost: as for `partition.initialize_distributed`.
    join_timeout: seconds in which all processes have to come.
    lost_timeout: seconds without a sign of life after which one counts as lost.

  Yields:
    The watch, or None in a single process.

  Raises:
    ValueError: joining was asked for, but there is no cluster to join.
  """
  if not mesh_lib.is_one_of_several(multihost):
    yield None
    return
  with _said_clearly(join_timeout) as abort:
    mesh_lib.initialize_distributed(
      multihost,
      initialization_timeout=join_timeout,
      # JAX's own check is the second line, where this process does not get to look.
      heartbeat_timeout_seconds=2 * lost_timeout,
    )
  watch = Watch(_store(), jax.process_index(), jax.process_count(), lost_timeout)
  abort.explain = watch.explain_abort
  watch.start()
  try:
    yield watch
  except Stopped:
    # All processes stop at the same step.
    _leave_together(watch)
    raise
  _leave_together(watch)


def _leave_together(watch: "Watch") -> None:
  """Ends the coordination service once no process needs it any more."""
  # The first process may still draw; JAX itself waits for minutes only.
  wait("insvp_jax/end")
  watch.finish()
  jax.distributed.shutdown()


class Watch(threading.Thread):
  """Tells the others that this process lives, and ends it when one of them is gone."""

  def __init__(
    self,
    store: Any,
    index: int,
    count: int,
    lost_timeout: float | int,
    leave: Callable[[int], Any] = os._exit,
  ):
    """Takes the key-value store; `start` begins to watch.

    Args:
      store: the client of the coordination service.
      index: of this process.
      count: of all processes.
      lost_timeout: seconds without a sign of life after which one counts as lost.
      leave: ends the process with a status, at once.
    """
    super().__init__(name="insvp_jax_watch", daemon=True)
    self._store, self._index, self._count = store, index, count
    self._timeout, self._leave = lost_timeout, leave
    self._interval = max(lost_timeout / 12, 0.25)
    self._beats = 0
    self._over = threading.Event()
    self._gives_up = False
    # Of each process what it last said, and when that was new.
    self._said: dict[int, tuple[str, float]] = {
      i: ("", time.monotonic()) for i in range(count)
    }

  def run(self) -> None:
    """Looks around until `finish`."""
    while not self._over.wait(self._interval):
      # Without an answer the coordinator is gone, and JAX aborts: see explain_abort.
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        self.look()

  def look(self) -> None:
    """Gives a sign of life and takes those of the others."""
    self._beats += 1
    self._say(str(self._beats))
    for name, text in self._store.key_value_dir_get("insvp_jax/failed/"):
      index = _index_of(name)
      status, message = json.loads(text)
      if index != self._index:
        self._give_up(status, f"process {index} stopped: {message}")
    now = time.monotonic()
    for name, text in self._store.key_value_dir_get("insvp_jax/alive/"):
      if self._said[_index_of(name)][0] != text:
        self._said[_index_of(name)] = (text, now)
    if lost := self._silent_for(self._timeout):
      self._give_up(LOST, _lost(lost, self._timeout))

  def finish(self) -> None:
    """Says that this process has done its work, and stops watching."""
    self._close()
    self._say("done")

  def fail(self, status: int, message: str) -> NoReturn:
    """Tells the others why this process gives up, and ends it.

    JAX's orderly end would wait for the others, which wait for this one.
    """
    self._close()
    text = json.dumps([status, message])
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._store.key_value_set(
        f"insvp_jax/failed/{self._index}", text, allow_overwrite=True
      )
      # The coordination service ends with this process: the others look first.
      deadline = time.monotonic() + 3 * self._interval
      while self._index == 0 and self._others() and time.monotonic() < deadline:
        time.sleep(self._interval / 10)
    sys.stdout.flush()
    sys.stderr.flush()
    self._leave(status)
    raise SystemExit(status)

  def await_verdict(self, error: BaseException) -> None:
    """Gives a lost process time to be missed, if the error may come from that."""
    chain: BaseException | None = error
    while chain is not None:
      if isinstance(chain, jax.errors.JaxRuntimeError):
        self._over.wait(self._timeout + 3 * self._interval)
        if self._gives_up:
          # The process is about to be ended: whatever else is said would be wrong.
          time.sleep(self._timeout)
        return
      chain = chain.__cause__ or chain.__context__

  def explain_abort(self) -> tuple[int, str] | None:
    """Returns (status, line) if JAX aborts because of another process."""
    if self._index != 0 and not _answers(_coordinator()):
      return LOST, _lost([0], 0)
    if lost := self._silent_for(3 * self._interval):
      return LOST, _lost(lost, self._timeout)
    return None

  def _silent_for(self, seconds: float | int) -> list[int]:
    before = time.monotonic() - seconds
    return [
      index
      for index, (text, when) in self._said.items()
      if index != self._index and text != "done" and when < before
    ]

  def _others(self) -> list[int]:
    """Returns which other processes have not left yet."""
    said = {
      _index_of(name): text
      for name, text in self._store.key_value_dir_get("insvp_jax/alive/")
    }
    return [i for i in self._said if i != self._index and said.get(i) != "done"]

  def _say(self, text: str) -> None:
    key = f"insvp_jax/alive/{self._index}"
    self._store.key_value_set(key, text, allow_overwrite=True)

  def _close(self) -> None:
    self._over.set()
    if self.is_alive() and threading.current_thread() is not self:
      self.join(self._timeout)

  def _give_up(self, status: int, line: str) -> None:
    if not self._over.is_set():
      self._gives_up = True
      self._over.set()
      print(f"insvp_jax: {line}", file=sys.stderr, flush=True)
      self._say("done")
      self._leave(status)


def _index_of(name: str) -> int:
  return int(name.rpartition("/")[2])


def _lost(indices: list[int], seconds: float | int) -> str:
  who = f"process {indices[0]}" if len(indices) == 1 else f"processes {indices}"
  since = f" since {seconds:g} s" if seconds else ""
  return (
    f"{who} of this run gives no sign of life{since}: killed, or its machine is gone. "
    "Start the same command again on all hosts to resume from the last checkpoint."
  )


def _coordinator() -> str:
  from jax._src import distributed

  return distributed.global_state.coordinator_address or ""


def _answers(address: str) -> bool:
  host, _, port = address.rpartition(":")
  try:
    socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
  except (OSError, ValueError):
    return False
  return True


class _Abort:
  """Puts one line in the place of JAX's abort, where `explain` has one to give.

  JAX ends the process from a thread of its own, which no Python code sees, unless
  the signal that abort() raises calls it.
  """

  def __init__(self):
    self.explain: Callable[[], tuple[int, str] | None] = lambda: None
    self.stderr: int | None = None  # where the standard error was before
    self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._handle)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), self._handler)

  def _handle(self, signum: int) -> None:
    del signum
    found = self.explain()
    if found is not None:
      if self.stderr is not None:
        os.dup2(self.stderr, 2)
      os.write(2, f"insvp_jax: {found[1]}\n".encode())
      os._exit(found[0])


_abort: list[_Abort] = []  # C keeps no reference of the handler


@contextlib.contextmanager
def _said_clearly(join_timeout: int) -> Iterator[_Abort]:
  """Makes one line of what JAX aborts with when the others do not come in time."""
  abort = _Abort()
  _abort.append(abort)

  def explain() -> tuple[int, str]:
    return 2, (
      f"not all processes met at the coordinator {_coordinator()} within "
      f"{join_timeout} s. Check that every process runs, reaches that address "
      "(process 0 listens there) and has another process id, or raise --join_timeout."
    )

  abort.explain = explain
  with tempfile.TemporaryFile() as said:
    sys.stderr.flush()
    abort.stderr = os.dup(2)
    os.dup2(said.fileno(), 2)
    try:
      yield abort
    finally:
      os.dup2(abort.stderr, 2)
      os.close(abort.stderr)
      abort.stderr = None
      said.seek(0)
      os.write(2, said.read())
  abort.explain = lambda: None

"""The processes of one run: found, joined, compared, watched.

They talk through the key-value store of JAX's coordination service, which lives in
process 0, the coordinator. It needs no device, so it answers also while a device
program hangs on a process that is gone.

No step can be taken without all processes. So one that fails tells the others why, one
that is gone is missed by the others, and all of them end with one line.
"""

from collections.abc import Iterator, Mapping
import contextlib
import ctypes
import io
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

import jax

from insvp_jax import errors, trees
from insvp_jax.distributed.stopping import Stopped

# The exit status where another process was lost. That is no fault of the command:
# started again it resumes.
LOST = 42
_DAY = 24 * 3600 * 1000  # in ms: some host may take hours to decode a task
# Seconds for which process 0 waits after a failure, so that the others end before it.
_LEAD_OF_OTHERS = 1.0
# Every process makes the same calls in the same order, so these numbers agree.
_call_numbers = itertools.count()


def is_main_process() -> bool:
  """Returns whether this process writes and prints what is the same for all of them."""
  return jax.process_index() == 0


def print_once(text: str, *, file: io.TextIOBase | None = None) -> None:
  """Prints on the first of several processes alone; to `file` or standard output."""
  if is_main_process():
    print(text, file=file, flush=True)


def detect_cluster(environ: Mapping[str, str] | None = None) -> str | None:
  """Returns which launcher started this process as one of several, or None.

  It reads only environment variables, no network. A Cloud TPU VM outside of GKE does
  not say there whether it is one of several, so the launch scripts ask for it.

  Args:
    environ: the environment variables; None reads this process's.
  """
  environ = os.environ if environ is None else environ
  launchers = {
    "manual": ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES"),
    # As JAX does before Slurm, whose step may be that of Open MPI's own daemons.
    "openmpi": ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE"),
    "slurm": ("SLURM_STEP_NODELIST", _slurm_variable(environ)),
  }
  for launcher, (marker, num_processes) in launchers.items():
    # One task of a cluster is an ordinary single process.
    if environ.get(marker) and _number(environ, num_processes, 1) > 1:
      return launcher
  if "," in environ.get("TPU_WORKER_HOSTNAMES", ""):
    return "tpu"
  if environ.get("MEGASCALE_COORDINATOR_ADDRESS"):
    return "tpu"
  # A service host alone: a notebook in a pod is not one of several processes.
  if environ.get("KUBERNETES_SERVICE_HOST") and environ.get("JOB_COMPLETION_INDEX"):
    return "kubernetes"
  return None


def _slurm_variable(environ: Mapping[str, str]) -> str:
  """Returns the variable with the number of tasks that were started together.

  A job may hold more than the step that this process belongs to: a shell, or one of
  several programs side by side.
  """
  step = "SLURM_STEP_NUM_TASKS"
  return step if environ.get(step) else "SLURM_NTASKS"


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
  """Returns the whole number in a variable; the default where it is not set.

  Raises:
    ValueError: it is none.
  """
  text = environ.get(name, "").strip()
  if text and not re.fullmatch(r"[0-9]{1,9}", text):
    raise ValueError(f"the variable {name} is {text!r}, expected a whole number.")
  return int(text or default)


def initialize_distributed(multihost: bool | None = None, **timeouts: int) -> bool:
  """Joins the processes of a cluster; call it before any use of a device.

  Args:
    multihost: True joins in any case, False never does, None (the default) does
      where `detect_cluster` finds a cluster. A single host needs no joining.
    **timeouts: in seconds, for `jax.distributed.initialize`.

  Returns:
    Whether this process is now one of several.

  Raises:
    ValueError: joining was asked for, but JAX finds no cluster to join.
  """
  cluster = detect_cluster()
  if multihost is False or (multihost is None and cluster is None):
    return False
  # JAX reads JAX_COORDINATOR_ADDRESS by itself, but not these two.
  variables = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
  if cluster == "slurm" and not os.environ.get("JAX_NUM_PROCESSES"):
    # JAX would wait for all tasks of the job.
    variables["num_processes"] = _slurm_variable(os.environ)
  numbers = {
    key: _number(os.environ, variable, 0)
    for key, variable in variables.items()
    if os.environ.get(variable)
  }
  try:
    jax.distributed.initialize(**numbers, **timeouts)
  except ValueError as error:
    raise ValueError(
      f"multihost={multihost}, detected cluster: {cluster}, but JAX could not join "
      f"other processes: {error} Start one process per host with SLURM, Open MPI, "
      "Kubernetes or on a TPU pod, set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES "
      "and JAX_PROCESS_ID, or pass multihost=False."
    ) from error
  return True


@contextlib.contextmanager
def joined(
  multihost: bool | None, *, join_timeout: int, lost_timeout: int
) -> Iterator["Watch | None"]:
  """Joins the processes of a cluster and watches them inside of the with block.

  Args:
    multihost: as for `initialize_distributed`.
    join_timeout: seconds in which all processes have to come; else this one ends with
      one line and status 2.
    lost_timeout: seconds without a sign of life after which a process counts as lost.

  Yields:
    The watch, or None in a single process.

  Raises:
    ValueError: joining was asked for, but there is no cluster to join.
  """
  timer = threading.Timer(join_timeout, _end_for_want_of_others, [join_timeout])
  timer.daemon = True
  timer.start()
  try:
    # JAX's own time-outs abort with a stack trace, so they have to come after ours. It
    # misses a process when half of its time-out is over at the earliest: at two times
    # `lost_timeout` it came first in 1 of 45 kills, at three times in none of 20.
    is_one_of_several = initialize_distributed(
      multihost,
      initialization_timeout=join_timeout + 60,
      heartbeat_timeout_seconds=3 * lost_timeout,
    )
  finally:
    timer.cancel()
  if not is_one_of_several:
    yield None
    return
  jax_state = _jax_state()
  watch = Watch(
    jax_state.client, jax_state.process_id, jax_state.num_processes, lost_timeout
  )
  with _aborts_explained(watch):
    watch.start()
    try:
      yield watch
    except Stopped:
      # All processes stop at the same step.
      _leave_together(watch)
      raise
    _leave_together(watch)


def check_same(what: str, values: Mapping[str, Any], advice: str = "") -> None:
  """Checks that all processes hold the same; returns when all have looked.

  Args:
    what: what is compared, for the message.
    values: nested JSON-like values; every process passes its own.
    advice: what to do about a difference.

  Raises:
    ValueError: this process and the first one differ; the message names the keys.
  """
  store, index = _jax_state().client, _jax_state().process_id
  if store is None:
    return
  key = f"insvp_jax/same/{next(_call_numbers)}"
  if index == 0:
    store.key_value_set(key, json.dumps(values))
  first = trees.flatten(json.loads(store.blocking_key_value_get(key, _DAY)))
  # Through JSON as well: lists for tuples.
  here = trees.flatten(json.loads(json.dumps(values)))
  different = [
    f"{name.replace('/', '.')} is {here.get(name)!r}, not {first.get(name)!r}"
    for name in sorted({*here, *first})
    if here.get(name) != first.get(name)
  ]
  if different:
    more = f" and {len(different) - 5} more" if len(different) > 5 else ""
    raise ValueError(
      f"process {index} differs from process 0 in {what}: "
      f"{'; '.join(different[:5])}{more}. {advice}".rstrip()
    )
  wait(key)


def wait(name: str) -> None:
  """Returns when every process has called it with this name."""
  if store := _jax_state().client:
    store.wait_at_barrier(f"{name}/barrier/{next(_call_numbers)}", _DAY)


class Watch(threading.Thread):
  """Gives signs of life, and ends this process when another one fails or is lost.

  Attributes:
    verdict_seconds: after so long it has missed whatever process is lost now.
  """

  # JAX's own heartbeats end in abort() and a stack trace. Python cannot have its hook
  # for them: jaxlib 0.10.2 and 0.12.0.1 cannot convert the absl::Status that they would
  # call `missed_heartbeat_callback` with (std::bad_cast and abort(), in 5 of 5 kills).
  # With `jax_enable_recoverability`, `client.get_live_nodes` says who is lost and no
  # process aborts; but it warns at each start, and processes no longer wait for each
  # other at the end: one that came 3 s after the coordinator aborted.

  def __init__(
    self, store: Any, index: int, num_processes: int, lost_timeout: float | int
  ):
    """Takes the key-value store; `start` begins to watch.

    Args:
      store: the client of the coordination service.
      index: of this process.
      num_processes: of the whole run.
      lost_timeout: seconds without a sign of life after which a process counts as lost.
    """
    super().__init__(name="insvp_jax_watch", daemon=True)
    self._store, self._index, self._lost_timeout = store, index, lost_timeout
    self._interval = max(lost_timeout / 12, 0.25)
    self.verdict_seconds = lost_timeout + 5 * self._interval
    self._num_looks = 0
    self._is_over = threading.Event()
    now = self._answered_at = time.monotonic()
    # The last sign of life of each other process, and since when it is known.
    self._signs = {i: ("", now) for i in range(num_processes) if i != index}

  def run(self) -> None:
    """Looks at the others every now and then, until `stop`."""
    while not self._is_over.wait(self._interval):
      # Without an answer the coordinator is gone: see `_aborts_explained`.
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        self.look()

  def look(self) -> None:
    """Gives a sign of life and looks for those of the others."""
    self._num_looks += 1
    self._store.key_value_set(
      f"insvp_jax/alive/{self._index}", str(self._num_looks), allow_overwrite=True
    )
    for index, text in self._read("failed").items():
      status, message = json.loads(text)
      self._meet_after_failure()
      _end(status, f"process {index} stopped: {message}")
    now = self._answered_at = time.monotonic()
    for index, sign in self._read("alive").items():
      if index in self._signs and sign != self._signs[index][0]:
        self._signs[index] = sign, now
    silent = [i for i, (_, t) in self._signs.items() if now - t > self._lost_timeout]
    if silent:
      if self._index == 0 and len(silent) < len(self._signs):
        # The others have looked by then, and say as well who is lost.
        time.sleep(2 * self._interval)
      _end(LOST, _describe_lost(silent, self._lost_timeout))

  def stop(self) -> None:
    """Stops watching."""
    self._is_over.set()
    if self.is_alive():
      self.join(self._lost_timeout)

  def fail(self, status: int, message: str) -> NoReturn:
    """Tells the others why this process gives up, and ends it.

    JAX's orderly end would wait for the others, which wait for this one.
    """
    self.stop()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._store.key_value_set(
        f"insvp_jax/failed/{self._index}", json.dumps([status, message])
      )
    self._meet_after_failure()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

  def await_verdict(self, error: BaseException) -> None:
    """Gives a lost process time to be missed, if the error may come from that.

    The devices notice a lost process at once, this watch only after `lost_timeout`. It
    then ends this process, and what else would be said about the error was wrong.
    """
    cause: BaseException | None = error
    while cause is not None:
      # Errors of collectives are ValueErrors where Gloo runs them, on CPUs.
      if isinstance(cause, jax.errors.JaxRuntimeError) or (
        isinstance(cause, ValueError) and not errors.is_ours(cause)
      ):
        time.sleep(self.verdict_seconds)
        return
      cause = cause.__cause__ or cause.__context__

  def has_coordinator(self) -> bool:
    """Returns whether process 0 is there and answers."""
    if self._index == 0:
      return True
    if time.monotonic() - self._answered_at > self._lost_timeout:
      return False
    host, _, port = _jax_state().coordinator_address.rpartition(":")
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
      return False
    return True

  def _read(self, kind: str) -> dict[int, str]:
    """Returns what each process has said of a kind: {index: text}."""
    entries = self._store.key_value_dir_get(f"insvp_jax/{kind}/")
    return {int(name.rpartition("/")[2]): text for name, text in entries}

  def _meet_after_failure(self) -> None:
    """Waits until all know of a failure: the store ends with process 0."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._store.wait_at_barrier("insvp_jax/failed", int(3000 * self._interval))
    if self._index == 0:
      # JAX of the others prints lines, and aborts, once the store is gone.
      time.sleep(_LEAD_OF_OTHERS)


def _leave_together(watch: Watch) -> None:
  """Ends the coordination service once no process needs it any more."""
  # The first process may still draw; JAX itself waits for minutes only.
  wait("insvp_jax/end")
  watch.stop()
  jax.distributed.shutdown()


@contextlib.contextmanager
def _aborts_explained(watch: Watch) -> Iterator[None]:
  """Puts one line and status 42 in the place of an abort that a lost process causes."""
  # JAX aborts within 0.4 s of the death of process 0; a Python thread that waited for
  # just that was quicker in 7 of 14 kills. From there on nothing runs but the handler
  # of the signal that abort() raises, and not one of Python's: these run later, in the
  # main thread, which may hang in a collective. So C is given this one.

  @ctypes.CFUNCTYPE(None, ctypes.c_int)
  def at_abort(signum: int) -> None:
    del signum
    if not watch.has_coordinator():
      _end(LOST, _describe_lost([0]))
    # Any other abort may come from a lost process, too, which the watch then misses.
    time.sleep(watch.verdict_seconds)

  set_handler = ctypes.CDLL(None).signal
  set_handler(int(signal.SIGABRT), at_abort)
  try:
    yield
  finally:
    set_handler(int(signal.SIGABRT), None)


def _end_for_want_of_others(join_timeout: int) -> NoReturn:
  _end(
    2,
    "not all processes met at the coordinator "
    f"{_jax_state().coordinator_address or '(unknown)'} within {join_timeout} s. Check "
    "that every process runs, reaches that address (process 0 listens there) and has "
    "another process id, or raise --join_timeout. If this is to be a run of one "
    "process, pass --config.multihost=False.",
  )


def _describe_lost(indices: list[int], seconds: float | int | None = None) -> str:
  who = f"processes {indices} of this run give"
  if len(indices) == 1:
    who = f"process {indices[0]} of this run gives"
  since = f" since {seconds:g} s" if seconds else ""
  return (
    f"{who} no sign of life{since}: killed, or its machine is gone. Start the same "
    "command again on all hosts to resume from the last checkpoint."
  )


def _end(status: int, line: str) -> NoReturn:
  """Ends the process with one line, at once and from any thread."""
  os.write(2, f"insvp_jax: {line}\n".encode())
  os._exit(status)


def _jax_state() -> Any:
  """Returns what JAX knows of the processes; its `client` is None in a single one.

  JAX has no public name for it; Orbax takes it from here, too.
  """
  from jax._src import distributed

  return distributed.global_state

"""Ctrl-C and SIGTERM: finish the step, write a checkpoint, say so by exit status."""

from collections.abc import Callable, Iterator
import contextlib
import os
import signal
import sys
import threading
from typing import Any, NoReturn

# SIGTERM is how schedulers take a machine away: 42 asks the launcher to start the
# same command again. 128 + 2 is what a shell reports for Ctrl-C.
EXIT_STATUS = {signal.SIGTERM: 42, signal.SIGINT: 130}


class Stopped(Exception):
  """A signal stopped the run after its checkpoint was written.

  Attributes:
    exit_status: for the process: 42 (SIGTERM; start again to resume) or 130.
  """

  def __init__(self, signum: int, step: int):
    """Names the signal and the step of the checkpoint."""
    name = signal.Signals(signum).name
    super().__init__(
      f"stopped by {name} at step {step}; the checkpoint is written. Start the same "
      "command again to resume."
    )
    self.exit_status = EXIT_STATUS[signal.Signals(signum)]


class Interrupted(KeyboardInterrupt):
  """A signal came outside of training, when there is nothing to save.

  Attributes:
    signum: the signal.
    exit_status: for the process, as of `Stopped`.
  """

  def __init__(self, signum: int):
    """Names the signal."""
    self.signum = signum
    name = signal.Signals(signum).name
    super().__init__(f"stopped by {name}. Start the same command again to go on.")
    self.exit_status = EXIT_STATUS[signal.Signals(signum)]


# What `interrupt` has raised. It may be lost: in a callback of C code it is printed and
# dropped, and some libraries make another error of it.
_raised: list[Interrupted] = []


def end(signum: int, frame: object) -> NoReturn:
  """Ends the process; the signal handler until all libraries are imported.

  Nothing is there to be tidied up, and libraries that are only half there may abort.
  """
  del frame
  os.write(2, f"insvp_jax: {Interrupted(signum)}\n".encode())
  os._exit(EXIT_STATUS[signal.Signals(signum)])


def interrupt(signum: int, frame: object) -> NoReturn:
  """Raises `Interrupted`; the signal handler of the time outside of training."""
  del frame
  _raised.append(Interrupted(signum))
  raise _raised[-1]


def handle(handler: Callable[[int, object], NoReturn]) -> None:
  """Has SIGINT and SIGTERM handled by `end` or `interrupt` (main thread only)."""
  _raised.clear()
  for signum in EXIT_STATUS:
    signal.signal(signum, handler)


def report_unraisable(unraisable: Any) -> None:
  """Says what was raised where nobody catches it: the hook of that name in `sys`.

  Not of `Interrupted`, which is heard all the same.
  """
  if not isinstance(unraisable.exc_value, Interrupted):
    sys.__unraisablehook__(unraisable)


def raised() -> Interrupted | None:
  """Returns what `interrupt` raised, whatever became of it; None without a signal."""
  return _raised[0] if _raised else None


def check() -> None:
  """Raises `Interrupted` again if it was lost: what is about to start would not end."""
  if _raised:
    raise _raised[0]


class StopSignal:
  """Remembers the first SIGINT or SIGTERM; a second one acts at once.

  Of several processes all must stop at the same step. SIGTERM is then left to JAX's
  preemption service, which tells the others, and Ctrl-C is made into a SIGTERM.

  Attributes:
    passed_on: the one that the preemption service was told of; None for none.
  """

  def __init__(self):
    """Starts without a signal."""
    self._signum: int | None = None
    self.passed_on: int | None = None

  @property
  def signum(self) -> int | None:
    """The signal that stops this process after its step; None for none."""
    # One that came before, or while nobody listens, may have been lost.
    lost = raised()
    return lost.signum if self._signum is None and lost else self._signum

  @contextlib.contextmanager
  def listen(self, is_single_process: bool = True) -> Iterator["StopSignal"]:
    """Replaces the signal handlers inside the with block (main thread only).

    Args:
      is_single_process: whether nobody else has to stop at the same step.

    Raises:
      Interrupted: a signal came before.
    """
    if threading.current_thread() is not threading.main_thread():
      yield self
      return
    if is_single_process:
      handlers = {signum: self._remember for signum in EXIT_STATUS}
    else:
      handlers = {signal.SIGINT: self._pass_on_as_sigterm}
    previous = {s: signal.signal(s, handler) for s, handler in handlers.items()}
    try:
      # Now there is no moment left in which one could be lost.
      check()
      yield self
    finally:
      for signum, handler in previous.items():
        signal.signal(signum, handler)

  def _remember(self, signum: int, frame: object) -> None:
    del frame
    if self._signum is None:
      self._signum = signum
      return
    # The second one: end as if there was no handler.
    signal.signal(signum, signal.SIG_DFL)
    signal.raise_signal(signum)

  def _pass_on_as_sigterm(self, signum: int, frame: object) -> None:
    del frame
    self.passed_on = signum
    # A second Ctrl-C ends the process.
    signal.signal(signum, signal.SIG_DFL)
    signal.raise_signal(signal.SIGTERM)

"""Ctrl-C and SIGTERM: finish the step, write a checkpoint, say so by exit status."""

from collections.abc import Iterator
import contextlib
import signal
import threading

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
    exit_status: for the process, as of `Stopped`.
  """

  def __init__(self, signum: int):
    """Names the signal."""
    name = signal.Signals(signum).name
    super().__init__(f"stopped by {name}. Start the same command again to go on.")
    self.exit_status = EXIT_STATUS[signal.Signals(signum)]


def interrupt(signum: int, frame: object) -> None:
  """Raises `Interrupted`; the signal handler of the time outside of training."""
  del frame
  raise Interrupted(signum)


class StopSignal:
  """Remembers the first SIGINT or SIGTERM; a second one acts at once.

  Of several processes all must stop at the same step. SIGTERM is then left to JAX's
  preemption service, which tells the others, and Ctrl-C is made into a SIGTERM.

  Attributes:
    signum: the one that stops this process after its step; None for none.
    passed_on: the one that the preemption service was told of; None for none.
  """

  def __init__(self):
    """Starts without a signal."""
    self.signum: int | None = None
    self.passed_on: int | None = None

  @contextlib.contextmanager
  def listen(self, is_single_process: bool = True) -> Iterator["StopSignal"]:
    """Replaces the signal handlers inside the with block (main thread only).

    Args:
      is_single_process: whether nobody else has to stop at the same step.
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
      yield self
    finally:
      for signum, handler in previous.items():
        signal.signal(signum, handler)

  def _remember(self, signum: int, frame: object) -> None:
    del frame
    if self.signum is None:
      self.signum = signum
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

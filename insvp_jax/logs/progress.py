"""How far a run is: a live bar on a terminal, plain lines anywhere else."""

from collections.abc import Sequence
import io
import os
import sys
import time


def create(stream: io.TextIOBase, name: str, total_steps: int) -> "Lines | Bar":
  """Returns what suits the stream.

  Args:
    stream: where progress goes.
    name: of the run.
    total_steps: steps of the whole run.
  """
  # A dumb terminal, such as an editor's, cannot draw over what it shows.
  is_live = stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
  return (Bar if is_live else Lines)(stream, name, total_steps)


class Lines:
  """One line for each call."""

  def __init__(self, stream: io.TextIOBase, name: str, total_steps: int):
    """Shows nothing yet; see `create`."""
    self._stream, self._name, self._total_steps = stream, name, total_steps
    self._clock: tuple[float, int] | None = None  # (time, step) of the first `show`

  def show(self, step: int, shown: Sequence[str]) -> None:
    """Shows how far the run is, and further texts."""
    left = self._seconds_left(step)
    percent = 100 * step // max(self._total_steps, 1)
    head = f"{self._name}  step {step}/{self._total_steps} ({percent}%)".strip()
    time_left = [] if left is None else [f"{duration(left)} left"]
    self.log("  ".join([head, *shown, *time_left]))

  def log(self, text: str) -> None:
    """Shows a text."""
    print(text, file=self._stream, flush=True)

  def close(self) -> None:
    """Leaves everything as it is."""

  def _seconds_left(self, step: int) -> float | int | None:
    """Extrapolates the pace since the first call, which the compilation precedes."""
    now = time.perf_counter()
    if self._clock is None:
      self._clock = (now, step)
    elapsed, steps = now - self._clock[0], step - self._clock[1]
    return (self._total_steps - step) * elapsed / steps if steps > 0 else None


class Bar:
  """One line that is drawn anew by each call; all other text appears above it."""

  def __init__(self, stream: io.TextIOBase, name: str, total_steps: int):
    """Shows nothing yet; see `create`."""
    # Only here: where there is no terminal, nothing needs it.
    from rich import console, progress, table, text

    class Console(console.Console):
      """A console that shows its cursor: a killed process could not bring it back."""

      def show_cursor(self, show: bool = True) -> bool:
        del show
        return False

    class Cut(progress.TextColumn):
      """A text that gives way to the other columns where the terminal is narrow."""

      def render(self, task: progress.Task) -> text.Text:
        column = super().render(task)
        column.no_wrap, column.overflow = True, "ellipsis"
        return column

    plain = {"markup": False, "highlight": False, "emoji": False}
    self._console = Console(file=stream, force_terminal=True, **plain)
    self._progress = progress.Progress(
      Cut("{task.description}", markup=False, table_column=table.Column()),
      progress.BarColumn(min(20, max(5, self._console.width - 95))),
      progress.MofNCompleteColumn(),
      progress.TaskProgressColumn(),
      Cut("{task.fields[shown]}", markup=False, table_column=table.Column()),
      progress.TimeRemainingColumn(compact=True),
      console=self._console,
      auto_refresh=False,  # No thread draws into what others write.
      # The pace since the first call, which the compilation precedes.
      speed_estimate_period=float("inf"),
      # What goes to a file stays there.
      redirect_stdout=sys.stdout.isatty(),
      redirect_stderr=sys.stderr.isatty(),
    )
    self._task = self._progress.add_task(name, total=total_steps, shown="")

  def show(self, step: int, shown: Sequence[str]) -> None:
    """Shows how far the run is, and further texts."""
    self._progress.update(self._task, completed=step, shown="  ".join(shown))
    self._progress.start()
    self._progress.refresh()

  def log(self, text: str) -> None:
    """Shows a text above the bar."""
    self._console.print(text, soft_wrap=True)

  def close(self) -> None:
    """Ends the bar, which stays as it is last shown."""
    self._progress.stop()


def duration(seconds: float | int) -> str:
  """Returns seconds as "m:ss" or "h:mm:ss"."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

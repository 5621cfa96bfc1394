"""How far a run is, and all runs of a search: a live bar on a terminal, else lines."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import io
import os
import sys
import time

# Seconds. Less is over before it is read.
_WORTH_SAYING = 10


class Whole:
  """How far all runs of a search are, and how long they take.

  Attributes:
    num_runs: how many there are.
  """

  def __init__(
    self, num_runs: int, work: float | int, say: Callable[[str], None] | None = None
  ):
    """Starts before the first run.

    Args:
      num_runs: how many there are.
      work: of all of them, in any unit that their times are proportional to.
      say: is told once how long all of them take, as soon as that is known.
    """
    self.num_runs, self._work, self._say = num_runs, work, say
    self._done = self._kept = 0.0  # work of finished runs; of those from before
    # The run under way: its work, how much of that is done, whether it tells the pace.
    self._running, self._share, self._is_typical = 0.0, 0.0, True
    # (time, work done) of the first step that tells the pace.
    self._clock: tuple[float, float] | None = None
    # When all is expected to be done, until steps tell.
    self._expected_end: float | None = None

  def expect(self, seconds: float | int) -> None:
    """Takes how long what is left is expected to take; that has been said."""
    self._expected_end, self._say = time.perf_counter() + seconds, None

  def keep(self, work: float | int) -> None:
    """Counts runs that were finished before."""
    self._done += work
    self._kept += work

  @contextlib.contextmanager
  def run(self, work: float | int, *, is_typical: bool = True) -> Iterator["Whole"]:
    """Yields itself to a run, or several at once, that are finished at the end.

    Args:
      work: of them.
      is_typical: whether the pace of their steps tells that of the others.
    """
    self._running, self._share, self._is_typical = work, 0.0, is_typical
    try:
      yield self
      self._done += work
    finally:
      self._running = 0.0

  def at(self, share: float | int) -> None:
    """Takes into account how much of the run under way is done, in [0, 1]."""
    self._share = share
    if not self._is_typical:
      return
    # Its compilation precedes the first call.
    if self._clock is None:
      self._clock = (time.perf_counter(), self._now_done)
    pace = self._pace()
    if pace is not None and self._say:
      seconds = (self._work - self._kept) * pace
      if seconds >= _WORTH_SAYING:
        self._say(
          f"all runs of this search take about {duration(seconds)} at this pace"
        )
      self._say = None

  @property
  def share(self) -> float:
    """How much of all is done, in [0, 1]."""
    return min(1.0, self._now_done / self._work) if self._work else 0.0

  def seconds_left(self) -> float | None:
    """Returns how long the rest takes at the pace until now; None while unknown.

    Before the first steps that is what was expected.
    """
    pace = self._pace()
    if pace is not None:
      return (self._work - self._now_done) * pace
    if self._expected_end is None:
      return None
    return max(0.0, self._expected_end - time.perf_counter())

  def text(self) -> str:
    """Returns "search 40%, 1:20:00 left"."""
    left = self.seconds_left()
    time_left = "" if left is None else f", {duration(left)} left"
    return f"search {int(100 * self.share)}%{time_left}"

  @property
  def _now_done(self) -> float:
    return self._done + self._share * self._running

  def _pace(self) -> float | None:
    """Returns seconds per unit of work since the first call; None while unknown."""
    if self._clock is None:
      return None
    start, before = self._clock
    done = self._now_done - before
    return (time.perf_counter() - start) / done if done > 0 else None


def create(
  stream: io.TextIOBase, name: str, total_steps: int, whole: Whole | None = None
) -> "Lines | Bar":
  """Returns what suits the stream.

  Args:
    stream: where progress goes.
    name: of the run.
    total_steps: steps of the whole run.
    whole: of the search that the run is a part of.
  """
  # A dumb terminal, such as an editor's, cannot draw over what it shows.
  is_live = stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
  return (Bar if is_live else Lines)(stream, name, total_steps, whole)


class Lines:
  """One line for each call."""

  def __init__(
    self,
    stream: io.TextIOBase,
    name: str,
    total_steps: int,
    whole: Whole | None = None,
  ):
    """Shows nothing yet; see `create`."""
    self._whole = whole
    self._stream, self._name, self._total_steps = stream, name, total_steps
    self._clock: tuple[float, int] | None = None  # (time, step) of the first `show`

  def show(self, step: int, shown: Sequence[str]) -> None:
    """Shows how far the run is, and further texts."""
    left = self._seconds_left(step)
    percent = 100 * step // max(self._total_steps, 1)
    head = f"{self._name}  step {step}/{self._total_steps} ({percent}%)".strip()
    time_left = [] if left is None else [f"{duration(left)} left"]
    if self._whole:
      self._whole.at(step / max(self._total_steps, 1))
      time_left.append(self._whole.text())
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
  """One line that is drawn anew by each call; all other text appears above it.

  Below it is that of the search, as long as the run is under way.
  """

  def __init__(
    self,
    stream: io.TextIOBase,
    name: str,
    total_steps: int,
    whole: Whole | None = None,
  ):
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

    class Steps(progress.MofNCompleteColumn):
      """Steps that are done, of a run."""

      def render(self, task: progress.Task) -> text.Text:
        return super().render(task) if task.fields["left"] is None else text.Text()

    class Left(progress.TimeRemainingColumn):
      """The time left, of a search the one that it says."""

      def render(self, task: progress.Task) -> text.Text:
        left = task.fields["left"]
        if left is None:
          return super().render(task)
        return text.Text(left, style="progress.remaining")

    plain = {"markup": False, "highlight": False, "emoji": False}
    self._console = Console(file=stream, force_terminal=True, **plain)
    self._progress = progress.Progress(
      Cut("{task.description}", markup=False, table_column=table.Column()),
      progress.BarColumn(min(20, max(5, self._console.width - 95))),
      Steps(),
      progress.TaskProgressColumn(),
      Cut("{task.fields[shown]}", markup=False, table_column=table.Column()),
      Left(compact=True),
      console=self._console,
      auto_refresh=False,  # No thread draws into what others write.
      # The pace since the first call, which the compilation precedes.
      speed_estimate_period=float("inf"),
      # What goes to a file stays there.
      redirect_stdout=sys.stdout.isatty(),
      redirect_stderr=sys.stderr.isatty(),
    )
    self._whole, self._total_steps = whole, total_steps
    fields = {"shown": "", "left": None}
    self._task = self._progress.add_task(name, total=total_steps, **fields)
    if whole:
      title = f"all {whole.num_runs} runs" if whole.num_runs > 1 else "search"
      self._all = self._progress.add_task(title, total=1.0, **fields)

  def show(self, step: int, shown: Sequence[str]) -> None:
    """Shows how far the run is, and further texts."""
    self._progress.update(self._task, completed=step, shown="  ".join(shown))
    if self._whole:
      self._whole.at(step / max(self._total_steps, 1))
      left = self._whole.seconds_left()
      self._progress.update(
        self._all,
        completed=self._whole.share,
        left="--:--" if left is None else duration(left),
      )
    self._progress.start()
    self._progress.refresh()

  def log(self, text: str) -> None:
    """Shows a text above the bar."""
    self._console.print(text, soft_wrap=True)

  def close(self) -> None:
    """Ends the bar, which stays as it is last shown; that of the search goes."""
    if self._whole:
      self._progress.update(self._all, visible=False)
    self._progress.stop()


def duration(seconds: float | int) -> str:
  """Returns seconds as "m:ss" or "h:mm:ss"."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

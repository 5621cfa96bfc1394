"""Tables of finished runs, beside what papers printed, in Markdown, LaTeX and CSV.

`paper_table` fills a paper's table, `general_table` has a column for each task that
there is; both give a `Table`, which `markdown`, `latex` and `csv_text` write.

What a cell rests on (seeds, how lr and the like were chosen, images, backbone) is said
once below the table where most cells have it in common, and in a note at the cell where
it has not. A mean is there only if all that it is the mean of is there.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import statistics
from typing import Any

from insvp_jax.data import GROUPS, TASKS
from insvp_jax.errors import printable
from insvp_jax.tools import finished_runs, published
from insvp_jax.tools.finished_runs import LeftOut, Run
from insvp_jax.tools.published import Column, PaperCell, PaperRow, PaperTable
from insvp_jax.train import objectives

PAPER, HERE = "paper", "here"
# Where a cell's runs are: (task, the column's backbone or "" for any).
Slot = tuple[str, str]
Cells = Mapping[Slot, tuple[Run, ...]]


@dataclasses.dataclass(frozen=True)
class _Filled:
  """The runs of one line: those that the seed alone tells apart, by slot."""

  label: str
  method: str
  cells: Cells


@dataclasses.dataclass(frozen=True)
class Cell:
  """One accuracy of a table.

  Attributes:
    accuracy: in percent; of runs the mean over seeds.
    text: the accuracy with the digits that are shown.
    std: over the seeds, in percent points; None for one seed, or of a paper.
    wins: tasks of the column on which full fine-tuning is beaten; None: not known.
    seeds: of the runs; none of a paper.
    notes: what sets this cell apart.
    is_best: of the paper's rows, or of the runs that can be compared.
    facts: what the cell rests on, by name, for CSV.
  """

  accuracy: float
  text: str
  std: float | None = None
  wins: int | None = None
  seeds: tuple[int, ...] = ()
  notes: tuple[str, ...] = ()
  is_best: bool = False
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Line:
  """A row of a table.

  Attributes:
    label: of the method.
    origin: `PAPER` or `HERE`.
    cells: one for each column; None where there is nothing.
    params: of all tasks together, in backbones; None: not known.
    rank: mean rank over the tasks among the runs; None where a task is missing.
    notes: of the whole row.
  """

  label: str
  origin: str
  cells: tuple[Cell | None, ...]
  params: float | None = None
  rank: float | None = None
  notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Table:
  """A table to be written.

  Attributes:
    name: a paper's table, or "report".
    title: what it shows.
    source: where the paper's numbers are from; "" without any.
    columns: of accuracies.
    lines: the rows.
    remarks: sentences below it.
    left_out: runs that are in no cell.
  """

  name: str
  title: str
  source: str
  columns: tuple[Column, ...]
  lines: tuple[Line, ...]
  remarks: tuple[str, ...] = ()
  left_out: tuple[LeftOut, ...] = ()


# --- Making tables.


def general_table(runs: Sequence[Run], left_out: Sequence[LeftOut] = ()) -> Table:
  """Returns the table of all tasks that there are, and of the means over them.

  Args:
    runs: from `finished_runs.find`; at least one.
    left_out: from there, too.
  """
  rows, twice = finished_runs.rows_of(runs)
  found = {run.task for run in runs}
  tasks = [task for task in TASKS if task in found]
  tasks += sorted(found - set(tasks))
  # A task has one metric.
  metrics = {run.task: objectives.title_of(run.metric) for run in runs}
  title = "accuracy"
  if len({*metrics.values()}) == 1:
    (title,) = {*metrics.values()}
  names = {
    task: task if of == title else f"{task} {of}" for task, of in metrics.items()
  }
  columns = [Column(names[task], ((task,),)) for task in tasks]
  groups = [name for name, of in GROUPS.items() if name != "vtab" and found >= {*of}]
  if any(set(GROUPS[name]) < found for name in groups):
    columns += [Column(f"{name} mean", (GROUPS[name],)) for name in groups]
  if found == set(GROUPS["vtab"]):
    # Papers report either, and they differ by points.
    columns.append(Column("mean of groups", tuple(GROUPS[name] for name in groups)))
  if len(tasks) > 1 and len({*metrics.values()}) == 1:
    columns.append(Column("mean", (tuple(tasks),)))
  filled = [
    _Filled(
      row.label, row.method, {(task, ""): cell for task, cell in row.runs.items()}
    )
    for row in rows
  ]
  lines, remarks = _lines(columns, [(None, filled)])
  title = f"Test {title}, %: mean and standard deviation over seeds"
  return Table("report", title, "", tuple(columns), lines, remarks, (*left_out, *twice))


def paper_table(
  table: PaperTable, runs: Sequence[Run], left_out: Sequence[LeftOut] = ()
) -> Table:
  """Returns a paper's table with lines for the runs that fit.

  Args:
    table: from `published.table`, maybe with other backbones (see `with_backbones`).
    runs: from `finished_runs.find`.
    left_out: from there, too.
  """
  not_kept, fitting = list(left_out), []
  for run in runs:
    if reason := _why_not(table, run):
      not_kept.append(LeftOut(run.path, reason))
    else:
      fitting.append(run)
  # By (position in the paper or None, label, method): runs by slot.
  found: dict[tuple[int | None, str, str], dict[Slot, tuple[Run, ...]]] = {}
  for backbone in table.backbones:
    # One by one: where a table has several they are no reason for several lines.
    rows, twice = finished_runs.rows_of([r for r in fitting if r.backbone == backbone])
    not_kept += twice
    for row in rows:
      run = next(iter(row.runs.values()))[0]
      key = _paper_row(table, run), row.label, row.method
      cells = {(task, backbone): cell for task, cell in row.runs.items()}
      found.setdefault(key, {}).update(cells)
  blocks: list[tuple[PaperRow | None, list[_Filled]]]
  blocks = [(row, []) for row in table.rows] + [(None, [])]
  for (position, label, method), cells in found.items():
    if not any(cells.keys() >= {*_slots(column)} for column in table.columns):
      reason = f"{label} has not all tasks of any column of {table.name}"
      not_kept += [LeftOut(run.path, reason) for c in cells.values() for run in c]
      continue
    blocks[-1 if position is None else position][1].append(
      _Filled(label, method, cells)
    )
  lines, remarks = _lines(table.columns, blocks, table)
  return Table(
    table.name,
    f"{table.title}; test accuracy, %",
    table.source,
    table.columns,
    lines,
    remarks,
    tuple(not_kept),
  )


def with_backbones(table: PaperTable, backbones: Sequence[str]) -> PaperTable:
  """Returns a paper's table for runs of other backbones.

  Args:
    table: from `published.table`.
    backbones: ids, one for each of the table's, in their order.

  Raises:
    ValueError: there are more or fewer.
  """
  if len(backbones) != len(table.backbones):
    raise ValueError(
      f"--backbone has {len(backbones)} backbones, but {table.name} has runs of "
      f"{len(table.backbones)}: {', '.join(table.backbones)}. Name one for each, with "
      "commas between them."
    )
  others = dict(zip(table.backbones, backbones, strict=True))
  columns = tuple(
    dataclasses.replace(column, backbone=others[column.backbone])
    for column in table.columns
  )
  return dataclasses.replace(table, columns=columns)


def _paper_row(table: PaperTable, run: Run) -> int | None:
  """Returns which row of a paper a run is of: its method, with its fields."""
  for i, row in enumerate(table.rows):
    if run.method == row.method and all(
      run.value_of(field) == value for field, value in row.fields.items()
    ):
      return i
  return None


def _why_not(table: PaperTable, run: Run) -> str:
  """Returns why a run does not belong into a paper's table; "" where it does."""
  wanted = [column.backbone for column in table.columns if run.task in column.tasks]
  if not wanted:
    return f"the task {run.task} is not in {table.name}"
  if run.backbone not in wanted:
    return (
      f"the backbone is {run.backbone}, that of {table.name} is "
      f"{' or '.join(dict.fromkeys(wanted))}; see --backbone"
    )
  if run.num_test != TASKS[run.task].num_test:
    return (
      f"tested on {run.num_test:,} images, {run.task} has {TASKS[run.task].num_test:,}"
    )
  if not table.takes_others and _paper_row(table, run) is None:
    return f"{run.label} is no row of {table.name}"
  return ""


def _lines(
  columns: Sequence[Column],
  blocks: Sequence[tuple[PaperRow | None, Sequence[_Filled]]],
  table: PaperTable | None = None,
) -> tuple[tuple[Line, ...], tuple[str, ...]]:
  """Returns the lines and remarks of a table.

  Args:
    columns: of accuracies.
    blocks: rows of a paper, each with the runs that belong to it.
    table: the paper's; None without one.
  """
  filled = [each for _, members in blocks for each in members]
  usual = _Usual([each.cells for each in filled])
  slots = list(dict.fromkeys(slot for column in columns for slot in _slots(column)))
  full = [each.cells for each in filled if each.method == "full"]
  counts_wins = bool(table and table.counts_wins)
  baseline = full[0] if counts_wins and len(full) == 1 else {}
  mean_ranks = iter(_mean_ranks([each.cells for each in filled], slots, usual))
  lines: list[Line] = []
  for paper_row, members in blocks:
    if paper_row is not None:
      lines.append(_paper_line(paper_row))
    for each in members:
      counts_params = bool(table and table.counts_params)
      lines.append(
        Line(
          each.label,
          HERE,
          tuple(_cell(column, each.cells, usual, baseline) for column in columns),
          _total_params(each.cells, slots) if counts_params else None,
          next(mean_ranks),
          _fields_note(each),
        )
      )
  remarks = list(filter(None, usual.remarks(columns)))
  if counts_wins and len(full) > 1:
    remarks.append(
      f"No wins are counted: full fine-tuning has {len(full)} rows, name runs of one."
    )
  return _with_best(lines), tuple(remarks)


def _slots(column: Column) -> list[Slot]:
  return [(task, column.backbone) for task in column.tasks]


def _paper_line(row: PaperRow) -> Line:
  """Returns what a paper printed."""

  def cell(printed: PaperCell | None) -> Cell | None:
    if printed is None:
      return None
    return Cell(printed.accuracy, printed.text, wins=printed.wins, notes=printed.notes)

  return Line(
    row.label, PAPER, tuple(map(cell, row.cells)), row.params, notes=row.notes
  )


def _fields_note(filled: _Filled) -> tuple[str, ...]:
  """Returns the fields of its method that were set, in a note; () for none."""
  prefix, texts = f"{filled.method}.", {}
  for cell in filled.cells.values():
    run = cell[0]
    fields = {
      name.removeprefix(prefix): value
      for name, value in run.own.items()
      if "." in name and not name.startswith("data.")
    }
    shown = (
      f"{name} {_short(value)}"
      for name, value in fields.items()
      if _short(value) != _short(run.default_of(name))
    )
    # Labels that tell rows apart have some of them.
    texts[", ".join(text for text in shown if text not in filled.label)] = None
  # Several where a table has several backbones.
  return (printable(" or ".join(texts)),) if any(texts) else ()


def _short(value: Any) -> str:
  if isinstance(value, list | tuple):
    return f"({', '.join(map(_short, value))})"
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  return f"{value:g}" if is_number else str(value)


# --- Cells.


def _facts(cell: Sequence[Run]) -> dict[str, str]:
  """Returns what the accuracy of runs that differ in the seed rests on."""
  run, number = cell[0], len(cell)
  trained = "an unknown number of"
  if run.num_train is not None:
    trained = f"{run.num_train:,}"
  few = ""
  if shots := run.settings.get("data.shots"):
    few = f" ({shots} of each class)"
  elif isinstance(share := run.settings.get("data.fraction"), float) and share != 1:
    few = f" ({100 * share:g}% of each class)"
  plural = "" if number == 1 else "s"
  return {
    "seeds": f"{number} seed{plural}",
    "selection": run.selection,
    "backbone": f"backbone {run.backbone}",
    "train": f"{trained} training images{few}",
    "test": f"{run.num_test:,} test images",
  }


class _Usual:
  """What most cells of a table have in common, so that notes say only what differs."""

  _OF_TABLE, _OF_SLOT = ("seeds", "selection"), ("train", "test")

  def __init__(self, rows: Sequence[Cells]):
    """Counts over all cells of a table."""
    counts: dict[Any, Counter] = {}
    for slot, cell in (item for cells in rows for item in cells.items()):
      for key, name in self._keys(slot).items():
        counts.setdefault(key, Counter())[_facts(cell)[name]] += 1
    # The first of those that are there most often; where all differ, none is usual.
    self._usual = {
      key: None if len(count) == count.total() > 1 else count.most_common(1)[0][0]
      for key, count in counts.items()
    }

  def _keys(self, slot: Slot) -> dict[tuple, str]:
    """Returns {what a fact is compared with the others of: its name}."""
    keys: dict[tuple, str] = {(name,): name for name in self._OF_TABLE}
    keys["backbone", slot[1]] = "backbone"
    return keys | {(name, slot): name for name in self._OF_SLOT}

  def notes(self, slot: Slot, cell: Sequence[Run]) -> tuple[str, ...]:
    """Returns what sets the runs of a cell apart, in one note or none."""
    facts, keys = _facts(cell), self._keys(slot)
    texts = {
      name: facts[name] for key, name in keys.items() if facts[name] != self._usual[key]
    }
    expected, number = published.num_train(slot[0]), cell[0].num_train
    if expected and number not in expected:
      wanted = " or ".join(f"{each:,}" for each in sorted(expected))
      texts["train"] = f"{facts['train']}, the published protocol has {wanted}"
    return ("; ".join(texts.values()),) if texts else ()

  def is_comparable(self, slot: Slot, cell: Sequence[Run]) -> bool:
    """Returns whether a cell has the images and the backbone of most others."""
    facts = _facts(cell)
    return all(
      facts[name] == self._usual[key]
      for key, name in self._keys(slot).items()
      if name not in self._OF_TABLE
    )

  def remarks(self, columns: Sequence[Column]) -> tuple[str, ...]:
    """Returns what all cells without a note have in common, in sentences."""
    if not self._usual:
      return ()
    titles = {_slots(c)[0]: c.title for c in columns if len(c.tasks) == 1}
    order = [slot for column in columns for slot in _slots(column)]
    found = {key[1] for key in self._usual if key[0] == "train"}
    slots = sorted(found, key=order.index)
    common = [
      text for (name, *_), text in self._usual.items() if name not in self._OF_SLOT
    ]

    def listed(name: str) -> str:
      """Returns the numbers of images, and of which tasks they are."""
      tasks: dict[str, list[str]] = {}
      for slot in slots:
        if number := self._usual[name, slot]:
          of_number = tasks.setdefault(number, [])
          title = titles.get(slot, slot[0])
          of_number.extend([title] * (title not in of_number))
      if len(tasks) == 1 and len(slots) > 1:
        return f"{next(iter(tasks))} for each task"
      return ", ".join(f"{number} of {', '.join(of)}" for number, of in tasks.items())

    images = "; ".join(filter(None, map(listed, self._OF_SLOT)))
    return (
      "Runs, where no note says otherwise: "
      f"{'; '.join(filter(None, common))}. ± is the standard deviation over seeds.",
      f"Images: {images}." if images else "",
    )


def _cell(column: Column, cells: Cells, usual: _Usual, full: Cells) -> Cell | None:
  """Returns the cell of runs in a column; None where a task is missing.

  Args:
    column: whose tasks are looked for.
    cells: runs by slot.
    usual: of the table.
    full: those of full fine-tuning, to count wins over; {} for not at all.
  """
  slots = _slots(column)
  if any(slot not in cells for slot in slots):
    return None
  found = [cells[slot] for slot in slots]

  def mean(accuracies: Sequence[float]) -> float:
    by_task = dict(zip(column.tasks, accuracies, strict=True))
    return 100 * statistics.mean(
      statistics.mean(by_task[task] for task in part) for part in column.parts
    )

  # The std of a mean over tasks is that of the means by seed.
  seeds = {tuple(run.seed for run in cell) for cell in found}
  same, std = seeds.pop() if len(seeds) == 1 else (), None
  if len(same) > 1:
    each = [mean([cell[i].accuracy for cell in found]) for i in range(len(same))]
    std = statistics.stdev(each)
  accuracy = mean([_mean(cell) for cell in found])

  def joined(values: Iterable[Any]) -> str:
    return "; ".join(map(str, dict.fromkeys(values)))

  return Cell(
    accuracy,
    f"{accuracy:.2f}",
    std,
    _wins(slots, cells, full),
    same,
    _joined_notes({slot[0]: usual.notes(slot, cells[slot]) for slot in slots}),
    facts={
      "num_train": joined(
        "" if c[0].num_train is None else c[0].num_train for c in found
      ),
      "num_test": joined(cell[0].num_test for cell in found),
      "selection": joined(cell[0].selection for cell in found),
      "backbone": joined(cell[0].backbone for cell in found),
    },
  )


def _mean(cell: Sequence[Run]) -> float:
  return statistics.mean(run.accuracy for run in cell)


def _joined_notes(by_task: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
  """Returns the notes of a mean: what some of its tasks rest on, and others do not."""
  notes = list(by_task.values())
  if len(set(notes)) == 1:
    return notes[0]
  tasks_of: dict[str, list[str]] = {}
  for task, texts in by_task.items():
    for text in texts:
      tasks_of.setdefault(text, []).append(task)
  parts = [f"{', '.join(tasks)}: {text}" for text, tasks in tasks_of.items()]
  return (f"a mean over different protocols: {'; '.join(parts)}",)


def _wins(slots: Sequence[Slot], cells: Cells, full: Cells) -> int | None:
  """Returns on how many tasks runs beat full fine-tuning.

  None where that was not trained on all of them, or on other images or backbones.
  """

  def basis(cell: Sequence[Run]) -> tuple:
    return cell[0].num_train, cell[0].num_test, cell[0].backbone

  if cells is full or any(
    slot not in full or basis(full[slot]) != basis(cells[slot]) for slot in slots
  ):
    return None
  return sum(_mean(cells[slot]) > _mean(full[slot]) for slot in slots)


def _total_params(cells: Cells, slots: Sequence[Slot]) -> float | None:
  """Returns what all tasks need together, in backbones; None where one is missing.

  That is the sum of what was trained, and one backbone where it is shared: VPT's
  "total params", 24.02 of full fine-tuning on 24 tasks.
  """
  if any(slot not in cells for slot in slots):
    return None
  runs = [cells[slot][0] for slot in slots]
  sizes = {run.backbone_params for run in runs}
  size = sizes.pop()
  if sizes or not size:
    return None
  is_shared = any(run.trainable_params < size for run in runs)
  return is_shared + sum(run.trainable_params for run in runs) / size


def ranks(values: Sequence[float]) -> list[float]:
  """Returns the rank of each value, 1 for the highest; ties share their mean rank."""
  return [
    1 + sum(other > value for other in values) + (values.count(value) - 1) / 2
    for value in map(float, values)
  ]


def _mean_ranks(
  rows: Sequence[Cells], slots: Sequence[Slot], usual: _Usual
) -> list[float | None]:
  """Returns the mean over the tasks of each row's rank.

  Ranked are the rows that have all tasks, on the same images and backbone; others have
  None, and so has a row that is the only one.
  """
  whole = [
    i
    for i, cells in enumerate(rows)
    if all(s in cells and usual.is_comparable(s, cells[s]) for s in slots)
  ]
  found: list[float | None] = [None] * len(rows)
  if len(whole) < 2:
    return found
  by_slot = [ranks([_mean(rows[i][slot]) for i in whole]) for slot in slots]
  for position, i in enumerate(whole):
    found[i] = statistics.mean(of_slot[position] for of_slot in by_slot)
  return found


def _with_best(lines: Sequence[Line]) -> tuple[Line, ...]:
  """Marks the best cells of each column, of papers and of runs.

  A cell with a note is compared with no other: it rests on something else.
  """

  def comparable(line: Line) -> Iterable[tuple[tuple[str, int], float]]:
    for j, cell in enumerate(line.cells):
      is_printed = line.origin == PAPER and line.notes
      if cell and not cell.notes and not is_printed:
        # As they are shown: equal digits are a tie.
        yield (line.origin, j), float(cell.text)

  values: dict[tuple[str, int], list[float]] = {}
  for key, value in (item for line in lines for item in comparable(line)):
    values.setdefault(key, []).append(value)

  def marked(line: Line) -> Line:
    of_line = dict(comparable(line))
    best = {
      j
      for (origin, j), value in of_line.items()
      if len(values[origin, j]) > 1 and value == max(values[origin, j])
    }
    cells = (
      cell and dataclasses.replace(cell, is_best=j in best)
      for j, cell in enumerate(line.cells)
    )
    return dataclasses.replace(line, cells=tuple(cells))

  return tuple(map(marked, lines))

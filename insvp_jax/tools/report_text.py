"""A table of `report_table` as Markdown, as LaTeX with booktabs, or as CSV."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import string
from typing import Any

from insvp_jax.errors import printable
from insvp_jax.search import tables
from insvp_jax.tools.finished_runs import LeftOut
from insvp_jax.tools.report_table import Cell, Line, Table

# The most runs that are named for one reason.
_MOST_LISTED = 20
# What LaTeX reads otherwise, or what its oldest fonts lack.
_LATEX = {
  **{c: f"\\{c}" for c in "&%$#_{}"},
  "\\": r"\textbackslash{}",
  "~": r"\textasciitilde{}",
  "^": r"\textasciicircum{}",
  "<": r"\textless{}",
  ">": r"\textgreater{}",
  "|": r"\textbar{}",
  "±": r"$\pm$",
  "²": r"\textsuperscript{2}",
  "×": r"$\times$",
}


def _letters(number: int) -> str:
  """Returns a, b, ..., z, aa, ab, ...: the mark of the note with a number."""
  letters = string.ascii_lowercase
  return (
    letters[number]
    if number < 26
    else _letters(number // 26 - 1) + letters[number % 26]
  )


def _marks(table: Table) -> dict[str, str]:
  """Returns {note: its mark}, in the order of reading."""
  notes: dict[str, None] = {}
  for line in table.lines:
    for note in (*line.notes, *(n for c in line.cells if c for n in c.notes)):
      notes.setdefault(note)
  return {note: _letters(i) for i, note in enumerate(notes)}


def _grid(
  table: Table,
  text: Callable[[str], str],
  bold: Callable[[str], str],
  mark: Callable[[str], str],
) -> tuple[list[str], list[list[str]]]:
  """Returns titles and rows of what is shown.

  Args:
    table: the table.
    text: escapes a text.
    bold: makes a text bold.
    mark: makes a mark of a note, or of several, from their letters.
  """
  marks = _marks(table)
  has_origin = len({line.origin for line in table.lines}) > 1 or bool(table.source)
  has_params = any(line.params is not None for line in table.lines)
  has_rank = any(line.rank is not None for line in table.lines)

  def marked(shown: str, notes: Iterable[str]) -> str:
    letters = ",".join(marks[note] for note in notes)
    return shown + (mark(letters) if letters else "")

  def cell(each: Cell | None) -> str:
    if each is None:
      return ""
    shown = bold(each.text) if each.is_best else each.text
    shown += text(f" ± {each.std:.2f}") if each.std is not None else ""
    shown += f" ({each.wins})" if each.wins is not None else ""
    return marked(shown, each.notes)

  def row(line: Line) -> list[str]:
    cells = [marked(text(line.label), line.notes)]
    cells += [line.origin] * has_origin
    cells += map(cell, line.cells)
    params = "" if line.params is None else text(f"{line.params:.2f}×")
    rank = "" if line.rank is None else f"{line.rank:.2f}"
    return cells + [params] * has_params + [rank] * has_rank

  titles = ["method", *["from"] * has_origin, *(c.title for c in table.columns)]
  titles += ["total params"] * has_params + ["mean rank"] * has_rank
  return [text(title) for title in titles], [row(line) for line in table.lines]


def left_out_lines(left_out: Sequence[LeftOut]) -> list[str]:
  """Returns a line for each reason for which runs are in no cell, with the runs."""
  by_reason: dict[str, list[str]] = {}
  for each in left_out:
    by_reason.setdefault(each.reason, []).append(str(each.path))
  lines = []
  for reason, paths in by_reason.items():
    more = len(paths) - _MOST_LISTED
    named = ", ".join(paths[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")
    lines.append(printable(f"left out: {named}: {reason}"))
  return lines


def markdown(table: Table) -> str:
  """Returns the table as Markdown, with notes, remarks and what was left out."""

  def text(raw: str) -> str:
    # Else a name could open a tag, or make its neighbours italic.
    return "".join(f"\\{c}" if c in "\\`*<>[]" else c for c in raw)

  titles, rows = _grid(table, text, lambda t: f"**{t}**", lambda m: f" [{m}]")
  head = text(table.title) + (f". {text(table.source)}" if table.source else "")
  parts = [f"{head}.", tables.markdown(rows, titles).rstrip("\n")]
  notes = [f"[{mark}] {text(note)}" for note, mark in _marks(table).items()]
  # Two spaces end a line.
  parts += ["  \n".join(notes)] * bool(notes)
  parts += [text(remark) for remark in table.remarks]
  lines = [f"- {text(line)}" for line in left_out_lines(table.left_out)]
  parts += ["\n".join(lines)] * bool(lines)
  return "\n\n".join(parts) + "\n"


def latex(table: Table) -> str:
  r"""Returns the table as LaTeX, for a text with \usepackage{booktabs}."""
  titles, rows = _grid(
    table, escape_latex, lambda t: rf"\textbf{{{t}}}", lambda m: _superscript(m)
  )
  num_words = titles.index(escape_latex(table.columns[0].title))
  columns = "l" * num_words + "r" * (len(titles) - num_words)
  source = f". The lines “paper” are from {table.source}" if table.source else ""
  caption = escape_latex(f"{table.title}{source}.")
  notes = [
    rf"{_superscript(mark)} {escape_latex(note)}."
    for note, mark in _marks(table).items()
  ]
  below = [*notes, *map(escape_latex, table.remarks)]
  lines = [
    *(f"% {line}" for line in left_out_lines(table.left_out)),
    r"\begin{table}",
    r"  \centering",
    rf"  \caption{{{caption}}}",
    rf"  \label{{tab:{table.name}}}",
    rf"  \begin{{tabular}}{{{columns}}}",
    r"    \toprule",
    rf"    {' & '.join(titles)} \\",
    r"    \midrule",
    *(rf"    {' & '.join(row)} \\" for row in rows),
    r"    \bottomrule",
    r"  \end{tabular}",
    *([r"  \par\smallskip", r"  \begin{minipage}{\linewidth}\footnotesize"]),
    *(rf"    {line}\par" for line in below),
    r"  \end{minipage}",
    r"\end{table}",
  ]
  return "\n".join(lines) + "\n"


def escape_latex(text: str) -> str:
  """Returns a text that LaTeX sets as it stands."""
  return "".join(_LATEX.get(c, c) for c in text)


def _superscript(mark: str) -> str:
  return rf"\textsuperscript{{{mark}}}"


CSV_TITLES = (
  *("table", "method", "from", "column", "unit", "value", "std", "wins_over_full"),
  *("num_seeds", "seeds", "num_train", "num_test", "selection", "backbone", "notes"),
)


def csv_text(table: Table) -> str:
  """Returns the table as CSV with `CSV_TITLES`: a line for each cell, whole numbers.

  The unit is "%", "backbones" of total parameters, or "rank".
  """
  rows: list[tuple] = [CSV_TITLES]
  for line in table.lines:
    start = (table.name, line.label, line.origin)
    for column, cell in zip(table.columns, line.cells, strict=True):
      if cell is not None:
        rows.append((*start, column.title, *_csv_cell(line, cell)))
    for title, unit, value in (
      ("total params", "backbones", line.params),
      ("mean rank", "rank", line.rank),
    ):
      if value is not None:
        rows.append((*start, title, unit, value, *[""] * (len(CSV_TITLES) - 6)))
  return tables.csv_text(rows)


def _csv_cell(line: Line, cell: Cell) -> tuple[Any, ...]:
  """Returns the values of a cell from its unit on."""
  facts: Mapping[str, Any] = cell.facts
  return (
    "%",
    float(cell.text) if not facts else cell.accuracy,
    "" if cell.std is None else cell.std,
    "" if cell.wins is None else cell.wins,
    len(cell.seeds) or "",
    " ".join(map(str, cell.seeds)),
    *(facts.get(name, "") for name in ("num_train", "num_test", "selection")),
    facts.get("backbone", ""),
    "; ".join((*line.notes, *cell.notes)),
  )


FORMATS = {"markdown": markdown, "latex": latex, "csv": csv_text}
# By the ending of a file.
ENDINGS = {".md": "markdown", ".tex": "latex", ".csv": "csv"}

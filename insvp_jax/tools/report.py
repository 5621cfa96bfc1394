"""Makes tables of finished runs, and of papers beside them.

insvp report runs/vtab --table=insvp_2
insvp report runs/hta runs/more --table=insvp_1 --output=table.tex
insvp report runs --format=csv

Takes any number of runs, searches, groups of tasks, and folders of these at any depth.
With --table their accuracies stand below those that the paper printed; without it there
is a column for each task. Mean and standard deviation are over the runs that differ in
nothing but the seed; others become rows of their own, whose labels say in what they
differ. A cell that rests on something else than most (seeds, choice of lr, images,
backbone) has a note. What fits nowhere is listed with the reason.

Without the command `insvp` it is python -m insvp_jax.tools.report.
"""

from collections.abc import Sequence
import os
from pathlib import Path
import sys

from insvp_jax import tools
from insvp_jax.logs.writers import write_text
from insvp_jax.tools import finished_runs, published, report_table, report_text


def make_table(
  paths: Sequence[str | os.PathLike], name: str = "", backbones: Sequence[str] = ()
) -> report_table.Table:
  """Returns the table of the runs below some folders.

  Args:
    paths: of runs, searches, groups of tasks, or folders of these; none shows what a
      paper printed.
    name: of a paper's table, from `published.tables`; "" for a column for each task.
    backbones: whose runs fill it, by their ids, in place of the paper's; without a
      paper's table, the backbones whose runs are taken.

  Raises:
    FileNotFoundError, ValueError: there is no such folder or table, no run in it, or
      none that can stand in a table; see the message.
  """
  paper = published.table(name) if name else None
  if paper and backbones:
    paper = report_table.with_backbones(paper, backbones)
  if not paths and not paper:
    raise ValueError(
      "expected the folders of runs, e.g. insvp report runs, or a paper's table: "
      f"--table={'|'.join(published.tables())}."
    )
  runs, left_out = finished_runs.find(paths)
  if paper:
    return report_table.paper_table(paper, runs, left_out)
  if backbones:
    left_out += [
      finished_runs.LeftOut(r.path, f"the backbone is {r.backbone}")
      for r in runs
      if r.backbone not in backbones
    ]
    runs = [run for run in runs if run.backbone in backbones]
  if not runs:
    error = ValueError(f"none of {len(left_out)} runs can stand in a table.")
    for line in report_text.left_out_lines(left_out):
      error.add_note(line)
    raise error
  return report_table.general_table(runs, left_out)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
  """Runs the tool; returns its exit status: 0, or 2 after bad input.

  Args:
    argv: the arguments; None for those of the process.
    prog: the command that was typed; see `tools.argument_parser`.
  """
  parser = tools.argument_parser(__doc__, "report", prog)
  parser.add_argument(
    "runs", nargs="*", help="runs, searches, groups of tasks, or folders of these"
  )
  parser.add_argument(
    "--table",
    default="",
    help=f"a paper's table: {', '.join(published.tables())}; without it, all tasks",
  )
  parser.add_argument(
    "--backbone",
    default="",
    help="ids of the backbones whose runs are taken, with commas; the paper's without",
  )
  parser.add_argument(
    "--format",
    choices=tuple(report_text.FORMATS),
    help="by default as the ending of --output, or markdown",
  )
  parser.add_argument("--output", help="a file (.md, .tex, .csv) in place of printing")
  # Folders may stand between the flags.
  args = parser.parse_intermixed_args(argv)

  def work() -> None:
    ending = Path(args.output or "").suffix.lower()
    form = args.format or report_text.ENDINGS.get(ending, "markdown")
    backbones = [name for name in args.backbone.split(",") if name]
    table = make_table(args.runs, args.table, backbones)
    text = report_text.FORMATS[form](table)
    if form != "markdown":  # which has them itself
      for line in report_text.left_out_lines(table.left_out):
        print(f"insvp_jax: {line}", file=sys.stderr)
    if args.output:
      write_text(args.output, text)
      print(f"wrote {args.output}")
    else:
      print(text, end="")

  return tools.run_tool(work)


if __name__ == "__main__":
  sys.exit(main())

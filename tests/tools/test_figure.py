"""The figure of a search: its points are those of the summary, whatever its size."""

import csv
import json
import sys

import numpy as np
import pytest

from insvp_jax.tools import figure, plots


def row(number, std=0.02, diverged=True):
  """Returns a row of a summary: lr 0.01 is best, lr 0.1 may have diverged."""
  accuracies = {0.001: 0.5, 0.01: 0.6 + number / 100, 0.1: None if diverged else 0.4}
  trials = [{"lr": lr, "wd": 0.1, "val_accuracy": a} for lr, a in accuracies.items()]
  return {
    **{"method": "vpt_deep", "mean": 0.55 + number / 100, "std": std, "seeds": [3]},
    **{"lr": 0.01, "wd": 0.1, "searched": ["lr", "wd"], "trials": trials},
  }


def write(workdir, number_of_rows=3):
  """Writes a search: its summary, and the metrics of each first final run."""
  summary = {f"$row$ {i}": row(i) for i in range(number_of_rows)}
  (workdir / "summary.json").write_text(json.dumps(summary))
  for i in range(number_of_rows):
    run = workdir / f"row_{i}" / "seed3"
    run.mkdir(parents=True)
    lines = [{"step": s, "loss": 2.0 / s + i, "lr": 0.1} for s in range(1, 101)]
    lines.append({"step": 100, "val_accuracy": 0.5, "val_loss": 1.5})
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
  return summary


def points(axis, marker):
  """Returns the (x, y) of all markers of a kind."""
  lines = [line for line in axis.lines if line.get_marker() == marker]
  return [tuple(map(float, xy)) for line in lines for xy in line.get_xydata()]


def test_the_figure_has_all_trials_the_choice_the_tests_and_the_losses(tmp_path):
  summary = write(tmp_path)
  losses = {
    label: figure.read_losses(tmp_path / f"row_{i}" / "seed3")
    for i, label in enumerate(summary)
  }
  left, right = figure.search_figure(summary, losses, "$a").axes
  assert [text.get_text() for text in left.get_yticklabels()] == list(summary)
  val = points(left, "o")
  assert sorted(x for x, _ in val) == pytest.approx([50, 50, 50, 60, 61, 62])
  assert [round(y) for _, y in val] == [0, 0, 1, 1, 2, 2]
  ringed = [x for x in left.lines if x.get_markeredgewidth() > 1.2]
  chosen = [x.get_xdata()[0] for x in ringed if x.get_marker() == "o"]
  assert chosen == pytest.approx([60, 61, 62])
  assert len(points(left, "x")) == 3
  assert [x for x, _ in points(left, "D")] == pytest.approx([55, 56, 57])
  texts = [text.get_text() for text in left.get_legend().get_texts()]
  assert texts == [
    *("val, lr 0.001", "val, lr 0.01", "val, lr 0.1"),
    *("chosen", "diverged", "test, mean ± std"),
  ]
  curves = [line for line in right.lines if line.get_marker() == "None"]
  assert len(curves) == 3
  for i, line in enumerate(curves):
    assert len(line.get_xdata()) == plots.NUM_POINTS
    # Each point is the mean of two or three steps.
    expected = np.mean([2.0 / s + i for s in (1, 2, 3)])
    assert line.get_ydata()[0] == pytest.approx(expected)
  assert points(right, "o") == [(100.0, 1.5)] * 3
  assert "on val with points" in right.get_title()


def test_one_row_and_sixteen_are_drawn_and_what_is_missing_is_left_out(tmp_path):
  # One seed, nothing tried, no test split.
  bare = {**row(0, std=None), "mean": None, "trials": [], "searched": []}
  (axis,) = figure.search_figure({"linear": bare}, {"linear": {}}, "x").axes
  assert not points(axis, "o") and not points(axis, "D")
  summary = write(tmp_path, 16)
  flags = [f"--output={tmp_path / 'x.png'}", f"--data={tmp_path / 'x.csv'}"]
  assert figure.main([f"--run={tmp_path}", *flags]) == 0
  assert (tmp_path / "x.png").stat().st_size > 10_000
  with (tmp_path / "x.csv").open() as file:
    titles, *rows = csv.reader(file)
  assert titles == ["row", "what", "x", "value", "std"]
  first = [row[1:] for row in rows if row[0] == "$row$ 0"]
  assert first[:4] == [
    ["val_accuracy", "0.001", "0.5", ""],
    ["val_accuracy", "0.01", "0.6", ""],
    ["val_accuracy", "0.1", "", ""],
    ["test_accuracy", "", "0.55", "0.02"],
  ]
  losses = [row for row in first if row[0] == "loss"]
  assert len(losses) == plots.NUM_POINTS
  assert float(losses[0][2]) == pytest.approx(np.mean([2.0 / s for s in (1, 2, 3)]))
  assert first[-1] == ["val_loss", "100.0", "1.5", ""]
  drawn = figure.search_figure(summary, {k: {} for k in summary}, "x")
  assert len(drawn.axes) == 1 and len(points(drawn.axes[0], "D")) == 16


def test_what_cannot_be_drawn_is_one_line(tmp_path, capsys, monkeypatch):
  def error(*flags):
    assert figure.main([f"--run={tmp_path}", *flags]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text

  assert "wants the workdir of a search" in error()
  (tmp_path / "svhn").mkdir()
  write(tmp_path / "svhn")
  (tmp_path / "suite.json").write_text("{}")
  assert "searches of several tasks; name the folder of one of svhn" in error()
  (tmp_path / "suite.json").unlink()
  (tmp_path / "summary.json").write_text("{")
  assert "summary.json cannot be read" in error()
  assert "its name has to end with" in error("--output=x.txt")
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  assert "drawing needs matplotlib" in error()

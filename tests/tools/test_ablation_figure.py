"""The figure of an ablation: curves over numbers, bars for all else, and its data."""

import csv
import importlib.util
import io
import json
import sys

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from insvp_jax import config as config_lib
from insvp_jax.tools import ablation_figure, figure


def summary_of(rows):
  """Returns the summary of a search: row i has (50 + i)% on test, 1 more on val."""
  return {
    label: {
      **{"method": method, "changes": config_lib.to_dict(dict(changes))},
      **{"mean": 0.5 + 0.01 * i, "std": 0.02, "seeds": [0, 1]},
      **{"test_accuracies": [0.49 + 0.01 * i, 0.51 + 0.01 * i]},
      **{"val_accuracy": 0.51 + 0.01 * i, "searched": [], "trials": []},
    }
    for i, (label, method, changes) in enumerate(rows)
  }


def lr_rows(*values, method="linear"):
  return [(f"lr {value:g}", method, (("optim.lr", value),)) for value in values]


def draw(rows):
  return ablation_figure.ablation_figure(summary_of(rows), "$a", figure.COLORS).axes[0]


# What is on the x axis of each ablation of configs/ablation.py, and how many curves.
AXES = {
  **{"fig7_length": ("prompt_length", 1), "fig7_depth": ("prompted_blocks", 1)},
  **{"lr": ("optim.lr", 1), "warmup": ("optim.warmup_epochs", 1)},
  **{"epochs": ("total_epochs", 1), "wd": ("optim.wd", 1), "dropout": ("dropout", 1)},
  **{"depth": ("prompted_blocks", 2), "fig7_beta": ("beta_I, beta_F", 2)},
  **{"length": ("prompt_length", 1), "scale": ("data.fraction", 1)},
  **{"shots": ("data.shots", 1)},
}


@pytest.fixture(scope="module")
def ablations(root):
  """The rows of each of configs/ablation.py."""
  path = root / "configs" / "ablation.py"
  spec = importlib.util.spec_from_file_location("ablation", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return {
    name: module.get_config(f"{name},task=digits").tune.variants
    for name in module.ABLATIONS
  }


def test_each_ablation_has_the_figure_that_fits(ablations):
  assert set(ablations) - set(AXES) == {"table5", "presets", "location", "pool"}
  for name, rows in ablations.items():
    summary = summary_of(rows)
    points = ablation_figure.points_of(summary)
    assert ablation_figure.is_ablation(summary)
    axis = draw(rows)
    if name not in AXES:
      assert [p.value for p in points] == [None] * len(rows), name
      assert [patch.get_width() for patch in axis.patches] == pytest.approx(
        [50 + i for i in range(len(rows))]
      )
      labels = [text.get_text() for text in axis.get_yticklabels()]
      assert labels == [label for label, _, _ in rows]
      assert "50.00 ± 2.00" in [text.get_text() for text in axis.texts]
      continue
    label, curves = AXES[name]
    assert axis.get_xlabel() == label
    assert len({point.series for point in points}) == curves
    # Every row is somewhere, and its value is among those that it changes.
    assert {point.label for point in points} == set(summary)


def test_a_curve_has_the_accuracies_over_the_value_and_a_tick_for_each():
  axis = draw(lr_rows(0.1, 0.001, 0.01))
  assert axis.get_xscale() == "log"
  curves = {line.get_marker(): line.get_xydata() for line in axis.lines[:1]}
  np.testing.assert_allclose(curves["D"], [(0.001, 51), (0.01, 52), (0.1, 50)])
  (val,) = [line for line in axis.lines if line.get_linestyle() == "--"]
  np.testing.assert_allclose(val.get_xydata(), [(0.001, 52), (0.01, 53), (0.1, 51)])
  assert [t.get_text() for t in axis.get_xticklabels()] == ["0.001", "0.01", "0.1"]
  # Half the height of a bar of deviation is the deviation.
  (bars,) = [c for c in axis.collections if hasattr(c, "get_segments")]
  assert bars.get_segments()[0][:, 1] == pytest.approx([49, 53])
  texts = [text.get_text() for text in axis.get_legend().get_texts()]
  assert sorted(texts) == ["test, mean ± std", "val"]


@pytest.mark.parametrize(
  ("values", "scale"),
  [
    ((1.0, 2.0, 5.0), "linear"),
    ((1.0, 10.0), "log"),
    ((0.0, 1e-4, 1.0), "symlog"),
    ((0.0, 0.1, 0.5), "linear"),
    ((-1.0, 1.0, 100.0), "linear"),
  ],
)
def test_the_axis_is_logarithmic_where_values_lie_far_apart(values, scale):
  assert draw(lr_rows(*values)).get_xscale() == scale


def test_rows_without_the_number_are_lines_across_and_methods_are_curves():
  rows = [
    ("all", "insvp", ()),
    *lr_rows(0.1, 0.2, method="lora"),
    *((f"b{x}", "linear", (("optim.lr", x),)) for x in (0.1, 0.3)),
  ]
  points = ablation_figure.points_of(summary_of(rows))
  assert [(p.series, p.value) for p in points[1:]] == [
    *(("lora", 0.1), ("lora", 0.2), ("linear", 0.1), ("linear", 0.3))
  ]
  axis = draw(rows)
  (across,) = [line for line in axis.lines if line.get_linestyle() == ":"]
  assert across.get_label() == "all: test" and set(across.get_ydata()) == {50.0}


def test_what_is_missing_is_left_out():
  summary = summary_of(lr_rows(0.1, 0.2)) | summary_of([("x", "linear", ())])
  for row in summary.values():
    row |= {"mean": None, "std": None, "test_accuracies": []}
  one = {**summary["lr 0.1"], "val_accuracy": None}
  colors = figure.COLORS
  for each in (summary, {**summary, "lr 0.1": one}, {"lr 0.1": one, "x": one}):
    (axis,) = ablation_figure.ablation_figure(each, "x", colors).axes
    assert not axis.patches and not axis.collections
  titles, *rows = ablation_figure.data(summary)
  columns = [titles.index(name) for name in ("value", "test_mean", "test_std")]
  assert [[row[i] for i in columns] for row in rows] == [
    *([0.1, None, None], [0.2, None, None], [None, None, None])
  ]


def test_without_any_test_the_bars_are_those_of_val():
  summary = summary_of([("a", "linear", ()), ("b", "vpt_deep", ())])
  for row in summary.values():
    row |= {"mean": None, "std": None, "test_accuracies": []}
  (axis,) = ablation_figure.ablation_figure(summary, "x", figure.COLORS).axes
  assert [patch.get_width() for patch in axis.patches] == pytest.approx([51, 52])
  assert [text.get_text() for text in axis.texts] == ["51.00", "52.00"]
  (label,) = [text.get_text() for text in axis.get_legend().get_texts()]
  assert label == "val of the choice"


@given(
  st.dictionaries(
    st.sampled_from(["optim.lr", "linear.x", "loss.mixup_alpha"]),
    st.lists(st.sampled_from([0.1, 0.2, True, "a", None]), min_size=3, max_size=3),
  )
)
def test_any_rows_can_be_drawn(changes):
  rows = [
    (f"r {i}x", "linear", [(k, v[i]) for k, v in changes.items() if v[i] is not None])
    for i in range(3)
  ]
  points = ablation_figure.points_of(summary_of(rows))
  assert [point.label for point in points] == [label for label, _, _ in rows]
  draw(rows)


def test_the_tool_draws_an_ablation_and_writes_its_data(tmp_path, capsys, monkeypatch):
  summary = summary_of(lr_rows(0.1, 0.2))
  (tmp_path / "summary.json").write_text(json.dumps(summary))
  picture, data = tmp_path / "x.png", tmp_path / "x.csv"
  flags = [f"--run={tmp_path}", f"--output={picture}"]
  drawn = []
  monkeypatch.setattr(figure, "search_figure", lambda *a, **k: drawn.append(a))
  monkeypatch.setattr(figure.visualize, "save_figure", lambda f, *args: f)
  assert figure.main([*flags, "--trials"]) == 0 and len(drawn) == 1
  monkeypatch.undo()
  assert figure.main([*flags, f"--data={data}"]) == 0
  assert capsys.readouterr().out.endswith(f"wrote {picture} and {data}\n")
  assert picture.stat().st_size > 10_000
  written = data.read_text()
  (first, _) = csv.DictReader(io.StringIO(written))
  assert first == {
    **{"label": "lr 0.1", "method": "linear", "series": "", "parameter": "optim.lr"},
    **{"value": "0.1", "test_mean": "0.5", "test_std": "0.02", "num_seeds": "2"},
    **{"test_accuracies": "0.49 0.51", "val_accuracy": "0.51"},
  }
  # The data alone need no matplotlib.
  data.unlink()
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  assert figure.main([f"--run={tmp_path}", f"--output={data}"]) == 0
  assert data.read_text() == written
  assert figure.main(flags) == 2
  assert "drawing needs matplotlib" in capsys.readouterr().err

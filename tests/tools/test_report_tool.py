"""The papers' tables from runs: cells, notes, what is left out, the three formats."""

import csv
import io
import json
import re
import shlex
import statistics

from hypothesis import given
from hypothesis import strategies as st
from markdown_table import cells
import numpy as np
import pytest
from report_runs import BACKBONE_PARAMS, row, write_run, write_search
from scipy.stats import rankdata
from tiny_runs import make_run

from insvp_jax import cli
from insvp_jax.data import GROUPS, TASKS
from insvp_jax.methods import METHODS, method_fields
from insvp_jax.tools import published, report, report_table, report_text
from insvp_jax.tools.report_table import HERE, PAPER

GROUP_NAMES = ("natural", "specialized", "structured")


def line_of(table, label, origin=HERE):
  (line,) = [x for x in table.lines if (x.label, x.origin) == (label, origin)]
  return line


def accuracies(line):
  return [None if cell is None else round(cell.accuracy, 6) for cell in line.cells]


def reasons(table):
  return {each.path.name: each.reason for each in table.left_out}


# --- What the papers printed.


@pytest.mark.parametrize("name", published.tables())
def test_a_published_table_is_whole(name):
  table = published.table(name)
  for column in table.columns:
    assert set(column.tasks) <= set(TASKS) and column.backbone
  for each in table.rows:
    assert len(each.cells) == len(table.columns)
    assert set(each.fields) <= set(method_fields(each.method))
    assert (each.params is not None) == table.counts_params
    assert all(0 < cell.accuracy < 100 for cell in each.cells if cell)


def test_printed_numbers_agree_with_each_other():
  def rows_of(name):
    rows = published.table(name).rows
    return {r.label: [c and c.accuracy for c in r.cells] for r in rows}

  first, second = rows_of("insvp_1"), rows_of("insvp_2")
  for label, (*of_tasks, mean) in first.items():
    if label != "LION":
      assert statistics.mean(of_tasks) == pytest.approx(mean, abs=0.0501), label
  vpt, by_task = rows_of("vpt_1"), rows_of("vpt_tasks")
  for label in ("VPT-Shallow", "VPT-Deep"):
    found = by_task[label]
    means = [statistics.mean(x) for x in (found[:7], found[7:11], found[11:])]
    assert means == pytest.approx(vpt[label][1:], abs=0.03)
  for ours, theirs in {"Full": "Full", "Bias": "Bias", "VPT": "VPT-Deep"}.items():
    assert second[ours] == pytest.approx(vpt[theirs][1:], abs=0.051)
  # The marked cells are VPT's on VTAB-1k: C100, DTD and SVHN of three rows.
  marked = {
    (r.label, column.title)
    for r in published.table("insvp_1").rows
    for column, cell in zip(published.table("insvp_1").columns, r.cells, strict=True)
    if cell and published.NOTES["*"] in cell.notes
  }
  assert marked == {
    (label, title)
    for label in ("Full", "Linear", "VPT")
    for title in ("DTD", "C100", "SVHN")
  }
  tasks = [c.title for c in published.table("vpt_tasks").columns]
  of_vpt = dict(zip(tasks, by_task["VPT-Deep"], strict=True))
  assert [first["VPT"][i] for i in (0, 6, 9)] == [
    of_vpt[task] for task in ("dtd", "cifar100", "svhn")
  ]
  # The last row of table 5 is table 1's, but for one digit.
  assert rows_of("insvp_5")["+ specific"] == [89.3, 84.6, 91.2, 96.1]
  assert [first["InsVP"][i] for i in (1, 2, 6, 9)] == [89.3, 84.6, 91.3, 96.1]


def test_a_table_without_runs_is_what_was_printed(capsys):
  assert report.main(["--table=lion"]) == 0
  titles, lion = cells(capsys.readouterr().out)
  assert titles == ["method", "from", "Dogs", "Flowers", "C100", "C10"]
  assert lion == ["LION [a]", "paper", "83.6", "90.5", "65.4", "90.8"]


# --- Cells.


@pytest.fixture(scope="module")
def vtab(tmp_path_factory):
  """Searches of VTAB's 19 tasks: (folder, {label: accuracies [task, seed]})."""
  folder = tmp_path_factory.mktemp("vtab")
  rng = np.random.default_rng(0)
  labels = {"full": 3, "vpt_deep": 3, "insvp": 3, "lora": 1}
  drawn = {label: rng.uniform(0.2, 0.9, (19, n)) for label, n in labels.items()}
  for i, task in enumerate(GROUPS["vtab"]):
    rows = {row(label): tuple(map(float, drawn[label][i])) for label in labels}
    write_search(folder / task, task, rows)
  (folder / "suite.json").write_text("{}")
  return folder, drawn


def test_cells_are_means_and_deviations_over_seeds(vtab):
  folder, drawn = vtab
  table = report.make_table([folder], "insvp_2")
  assert not table.left_out
  groups = [[GROUPS["vtab"].index(t) for t in GROUPS[name]] for name in GROUP_NAMES]
  for label in ("full", "vpt_deep", "insvp"):
    for cell, tasks in zip(line_of(table, label).cells, groups, strict=True):
      by_seed = 100 * drawn[label][tasks].mean(0)
      assert cell.accuracy == pytest.approx(by_seed.mean())
      assert cell.std == pytest.approx(by_seed.std(ddof=1))
      assert cell.seeds == (0, 1, 2) and not cell.notes
  # Each stands below the paper's row, others at the end.
  order = [(line.label, line.origin) for line in table.lines]
  assert order.index(("vpt_deep", HERE)) == order.index(("VPT", PAPER)) + 1
  assert order[-3:] == [("InsVP", PAPER), ("insvp", HERE), ("lora", HERE)]
  lora = line_of(table, "lora")
  assert [cell.std for cell in lora.cells] == [None] * 3
  assert {cell.notes for cell in lora.cells} == {("1 seed",)}
  remark, images = table.remarks
  assert "3 seeds; lr, wd chosen on val among 2 trials; backbone vit_b16_i21k" in remark
  assert "Images: 1,000 training images for each task" in images
  # The best of the runs that rest on the same, and the best of the paper.
  best = {
    (x.label, j) for x in table.lines for j, c in enumerate(x.cells) if c and c.is_best
  }
  assert {(label, j) for label, j in best if label == "InsVP"} == {
    ("InsVP", j) for j in range(3)
  }
  for j in range(3):
    values = {
      n: line_of(table, n).cells[j].accuracy for n in ("full", "vpt_deep", "insvp")
    }
    assert (max(values, key=values.get), j) in best


def test_ranks_are_over_tasks_and_wins_over_full_fine_tuning(vtab, tmp_path):
  folder, drawn = vtab
  table = report.make_table([folder], "insvp_2")
  means = np.array([drawn[label].mean(1) for label in drawn])
  expected = rankdata(-means, axis=0).mean(1)
  for label, rank in zip(drawn, expected, strict=True):
    assert line_of(table, label).rank == pytest.approx(rank)
  for i, task in enumerate(GROUPS["fgvc"]):
    for label, accuracy in {"full": 0.5, "vpt_deep": 0.5 + 0.01 * (i - 2)}.items():
      write_run(tmp_path / task / label, task, label, accuracy)
  table = report.make_table([folder, tmp_path], "vpt_1")
  wins = [cell.wins for cell in line_of(table, "vpt_deep").cells]
  better = drawn["vpt_deep"].mean(1) > drawn["full"].mean(1)
  groups = [[GROUPS["vtab"].index(t) for t in GROUPS[name]] for name in GROUP_NAMES]
  # A tie is no win.
  assert wins == [2, *(int(better[tasks].sum()) for tasks in groups)]
  assert [cell.wins for cell in line_of(table, "full").cells] == [None] * 4
  assert [cell.wins for cell in line_of(table, "Bias", PAPER).cells] == [3, 3, 0, 2]
  # Where full fine-tuning saw other images there is nothing to count.
  write_run(tmp_path / "fgvc_cub/full", "fgvc_cub", "full", 0.5, num_train_examples=99)
  table = report.make_table([folder, tmp_path], "vpt_1")
  assert line_of(table, "vpt_deep").cells[0].wins is None
  assert line_of(table, "vpt_deep").cells[1].wins == wins[1]
  # Nor where there are two of it.
  for task in GROUPS["fgvc"]:
    settings = {"optim.lr": 0.5}
    write_run(tmp_path / task / "full2", task, "full", 0.1, settings=settings)
  table = report.make_table([folder, tmp_path], "vpt_1")
  assert [cell and cell.wins for cell in line_of(table, "vpt_deep").cells] == [None] * 4
  assert table.remarks[-1].startswith("No wins are counted: full fine-tuning has ")


def test_total_params_are_those_of_vpt(tmp_path):
  trained = {
    "full": BACKBONE_PARAMS,
    "linear": 0,
    "partial": 7_089_408,
    "bias": 102_912,
  }
  for task in (*GROUPS["fgvc"], *GROUPS["vtab"]):
    head = 769 * TASKS[task].num_classes
    for method, number in trained.items():
      where = tmp_path / task / method
      write_run(where, task, method, 0.5, trainable_params=number + head)
  table = report.make_table([tmp_path], "vpt_1")
  for label, printed in {
    "full": "Full",
    "linear": "Linear",
    "partial": "Partial-1",
    "bias": "Bias",
  }.items():
    line = line_of(table, printed, PAPER)
    assert line_of(table, label).params == pytest.approx(line.params, abs=0.0051)
  # All tied: every win is none, every rank the mean.
  assert {line.rank for line in table.lines if line.origin == HERE} == {2.5}


@given(st.lists(st.sampled_from([0.1, 0.2, 0.2, 0.5]), min_size=1, max_size=8))
def test_ranks_with_ties_are_those_of_scipy(values):
  assert report_table.ranks(values) == rankdata([-value for value in values]).tolist()


@given(
  st.dictionaries(
    st.sampled_from(["linear", "mlp", "lora"]),
    st.lists(
      st.one_of(st.none(), st.sampled_from([0.25, 0.5, 0.75])), min_size=3, max_size=3
    ),
    min_size=1,
  ).filter(lambda grid: any(x is not None for values in grid.values() for x in values))
)
def test_means_and_ranks_need_all_tasks(tmp_path_factory, grid):
  folder = tmp_path_factory.mktemp("grid")
  for method, values in grid.items():
    for task, value in zip("abc", values, strict=True):
      if value is not None:
        write_run(folder / method / task, task, method, value)
  table = report.make_table([folder])
  tasks = [
    t for i, t in enumerate("abc") if any(v[i] is not None for v in grid.values())
  ]
  titles = [column.title for column in table.columns]
  assert titles == [*tasks, *["mean"] * (len(tasks) > 1)]
  found = {m: [v["abc".index(t)] for t in tasks] for m, v in grid.items()}
  whole = {m: v for m, v in found.items() if None not in v}
  for line in table.lines:
    values = found[line.label]
    shown = accuracies(line)
    assert shown[: len(tasks)] == [None if v is None else 100 * v for v in values]
    if len(tasks) > 1:
      mean = 100 * statistics.mean(values) if line.label in whole else None
      assert shown[-1] == (None if mean is None else pytest.approx(mean))
    if len(whole) > 1 and line.label in whole:
      columns = -np.array(list(whole.values()))
      expected = rankdata(columns, axis=0).mean(1)[list(whole).index(line.label)]
      assert line.rank == pytest.approx(expected)
    else:
      assert line.rank is None


def test_table_5_has_the_components_and_nothing_else(tmp_path):
  off = {f"insvp.use_{part}": False for part in ("global", "common", "specific")}
  write_search(
    tmp_path,
    "hta_cub",
    {
      row("linear", "none"): (0.5,),
      row("insvp", "patch", **off): (0.6,),
      row("insvp", "all"): (0.7,),
      row("insvp", "global", **{"insvp.use_patch": False}): (0.1,),
    },
  )
  write_run(tmp_path / "vpt", "hta_cub", "vpt_deep", 0.9)
  table = report.make_table([tmp_path], "insvp_5")
  order = [(line.label, line.origin) for line in table.lines]
  assert order[:4] == [
    ("no prompts", PAPER),
    ("none", HERE),
    ("patch", PAPER),
    ("patch", HERE),
  ]
  assert order[-2:] == [("+ specific", PAPER), ("all", HERE)]
  assert accuracies(line_of(table, "patch")) == [60.0, None, None, None]
  assert line_of(table, "patch").notes == (
    "use_common False, use_global False, use_specific False",
  )
  assert {each.reason for each in table.left_out} == {
    "vpt_deep is no row of insvp_5",
    "global is no row of insvp_5",
  }


def test_one_line_has_the_columns_of_two_backbones(tmp_path):
  for backbone, accuracy in {published.MAE: 0.4, published.MOCO: 0.6}.items():
    for task in GROUPS["specialized"]:
      where = tmp_path / backbone / task
      write_run(where, task, "linear", accuracy, backbone=backbone)
  table = report.make_table([tmp_path], "vpt_4")
  assert accuracies(line_of(table, "linear")) == [None, 40.0, None, None, 60.0, None]
  assert not any(cell.notes for cell in line_of(table, "linear").cells if cell)
  others = report.make_table([tmp_path], "vpt_4", ["x", published.MAE])
  assert accuracies(line_of(others, "linear")) == [None] * 4 + [40.0, None]
  # Without a paper's columns they are two rows.
  labels = [line.label for line in report.make_table([tmp_path]).lines]
  assert labels == [f"linear: backbone {b}" for b in (published.MAE, published.MOCO)]


# --- What is not averaged, and what is left out.


def test_only_runs_that_differ_in_the_seed_are_averaged(tmp_path):
  def run(name, **options):
    write_run(tmp_path / name, "svhn", "insvp", 0.5, **options)

  run("a", seed=0)
  run("b", seed=1)
  run("release", settings={"insvp.preset": "release"})
  run("lr", seed=2, settings={"optim.lr": 0.5})
  run("shots", seed=2, settings={"data.shots": 4}, num_train_examples=40)
  run("images", seed=2, data_sha256="f" * 64)
  run("test", seed=2, num_test_examples=10)
  run("backbone", seed=2, backbone="boxed")
  table = report.make_table([tmp_path])
  averaged = [line for line in table.lines if len(line.cells[0].seeds) > 1]
  (line,) = averaged
  assert line.cells[0].seeds == (0, 1) and len(table.lines) == 7
  assert len({line.label for line in table.lines}) == 7
  labels = "\n".join(line.label for line in table.lines)
  for text in (
    "preset release",
    "lr 0.5",
    "data.shots 4",
    "data ffffffff",
    "test images 10",
    "backbone boxed",
  ):
    assert text in labels
  # In a paper's table, too, but for what does not belong there at all.
  table = report.make_table([tmp_path], "vpt_tasks")
  assert len([line for line in table.lines if line.origin == HERE]) == 5
  assert reasons(table) == {
    "test": "tested on 10 images, svhn has 26,032",
    "backbone": "the backbone is boxed, that of vpt_tasks is vit_b16_i21k; see "
    "--backbone",
  }
  few = next(x for x in table.lines if "data.shots 4" in x.label)
  (note,) = few.cells[5].notes
  assert (
    "40 training images (4 of each class), the published protocol has 1,000" in note
  )


def test_a_search_and_a_run_by_hand_are_two_rows(tmp_path):
  write_search(tmp_path / "search", "svhn", {row("linear"): (0.5, 0.7)}, lr=0.001)
  write_run(tmp_path / "hand", "svhn", "linear", 0.9, seed=2)
  first, second = report.make_table([tmp_path]).lines
  assert {first.label, second.label} == {
    "linear: lr, wd chosen on val among 2 trials",
    "linear: hyper-parameters as given",
  }
  # What val chose may differ from task to task, and the row is one.
  write_search(tmp_path / "more", "dtd", {row("linear"): (0.5, 0.5)}, lr=0.01)
  table = report.make_table([tmp_path / "search", tmp_path / "more"])
  (line,) = table.lines
  assert [c.title for c in table.columns] == ["dtd", "svhn", "mean"]
  assert accuracies(line) == [50.0, 60.0, 55.0]


def test_where_all_cells_differ_each_says_what_it_rests_on(tmp_path):
  for number in (4, 8):
    settings = {"data.shots": number}
    where = tmp_path / str(number)
    write_run(where, "a", "linear", 0.5, settings=settings, num_train_examples=number)
  table = report.make_table([tmp_path])
  assert [(line.label, line.cells[0].notes, line.rank) for line in table.lines] == [
    (f"linear: data.shots {n}", (f"{n} training images ({n} of each class)",), None)
    for n in (4, 8)
  ]
  assert table.remarks[1] == "Images: 50 test images of a."


def test_a_mean_over_different_protocols_has_a_note(tmp_path):
  for i, task in enumerate(GROUPS["specialized"]):
    number = 800 if task == "eurosat" else 1000
    write_run(tmp_path / task, task, "linear", 0.1 * i, num_train_examples=number)
  (line,) = [
    x for x in report.make_table([tmp_path], "insvp_2").lines if x.origin == HERE
  ]
  assert line.cells[1].notes == (
    "a mean over different protocols: eurosat: 800 training images, the published "
    "protocol has 1,000",
  )
  assert not line.cells[1].is_best and line.rank is None


def test_a_task_is_shown_by_its_own_metric_and_no_mean_mixes_two(tmp_path):
  masks = {"metric": "miou", "test_miou": 0.25}
  write_run(tmp_path / "a", "segment_folder", "linear", None, **masks)
  table = report.make_table([tmp_path])
  assert table.title.startswith("Test mIoU, %: ")
  assert [column.title for column in table.columns] == ["segment_folder"]
  assert table.lines[0].cells[0].accuracy == 25.0
  write_run(tmp_path / "b", "folder", "linear", 0.75)
  table = report.make_table([tmp_path])
  assert table.title.startswith("Test accuracy, %: ")
  assert [column.title for column in table.columns] == ["folder", "segment_folder mIoU"]


def test_what_is_no_finished_run_is_left_out_with_the_reason(tmp_path):
  write_run(tmp_path / "good", "svhn", "linear", 0.5)
  write_run(tmp_path / "untested", "svhn", "linear", None)
  write_run(tmp_path / "again", "svhn", "linear", 0.5)
  write_run(tmp_path / "other", "svhn", "linear", 0.25)
  (write_run(tmp_path / "lacking", "svhn", "mlp", 0.5) / "result.json").write_text("{}")
  write_run(tmp_path / "percent", "svhn", "linear", 50.0)
  (write_run(tmp_path / "damaged", "svhn", "mlp", 0.5) / "result.json").write_text("{")
  (write_run(tmp_path / "begun", "svhn", "mlp", 0.5) / "result.json").unlink()
  (tmp_path / "begun/checkpoints").mkdir()
  search = write_search(tmp_path / "search", "svhn", {row("lora"): (0.5,)})
  (search / "lora/seed0/result.json").unlink()
  table = report.make_table([tmp_path, tmp_path / "good"])
  (line,) = table.lines
  # In the order of their names the first of equal runs is kept.
  assert (line.label, accuracies(line)) == ("linear", [50.0])
  found = reasons(table)
  assert found.pop("damaged").startswith("result.json cannot be read: ")
  assert found == {
    "good": f"it is the same run as {tmp_path / 'again'}",
    "other": f"it has settings and seed of {tmp_path / 'again'}, but another result",
    "untested": "it was not evaluated on a test split",
    "lacking": "its result.json has task = None, expected str",
    "percent": "its test_accuracy is 50.0, expected a number in [0, 1]",
    "begun": "it has not ended: no result.json yet",
    "lora": "summary.json has a result of it, but its runs are not there",
  }


JSON = st.recursive(
  st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)),
  lambda each: st.one_of(
    st.lists(each, max_size=2), st.dictionaries(st.text(max_size=3), each, max_size=2)
  ),
  max_leaves=3,
)


@given(
  file=st.sampled_from(["result.json", "config.json", "../../summary.json"]),
  position=st.integers(0, 40),
  value=JSON,
)
def test_whatever_files_hold_a_table_or_one_line_comes_of_it(
  tmp_path_factory, file, position, value
):
  folder = tmp_path_factory.mktemp("fuzz")
  rows = {row("insvp"): (0.5,), row("linear"): (0.5,)}
  write_search(folder, "svhn", rows)
  path = folder / "insvp/seed0" / file
  content = json.loads(path.read_text())
  section = content["insvp"] if file == "../../summary.json" else content
  section[list(section)[position % len(section)]] = value
  path.write_text(json.dumps(content))
  table = report.make_table([folder])
  assert all("linear" in form(table) for form in report_text.FORMATS.values())


def test_a_run_without_its_config_or_of_before_is_read(tmp_path):
  meta = {"train_count": [5, 4, 2]}
  make_run(tmp_path / "old", "linear", meta=meta)
  old = {"num_train_examples": None, "backbone_params": None}
  write_run(tmp_path / "old", "insects", "linear", 0.5, **old)
  write_run(tmp_path / "older", "insects", "mlp", 0.5, **old)
  (tmp_path / "older/config.json").unlink()
  table = report.make_table([tmp_path])
  facts = {line.label: line.cells[0].facts["num_train"] for line in table.lines}
  assert facts == {"linear": "11", "mlp": ""}
  text = report_text.markdown(table)
  assert "an unknown number of training images" in text


# --- Formats.

NASTY = r"a_b%&#$~^\{}|*<x> é"


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
  """Runs whose task and labels have what LaTeX and Markdown read otherwise."""
  folder = tmp_path_factory.mktemp("nasty")
  rows = {row("linear", "50% & more_"): (0.5, 0.6), row("mlp"): (0.25,)}
  write_search(folder / "one", NASTY, rows)
  write_search(folder / "two", "two", rows)
  return report.make_table([folder])


def unescaped(text):
  """Returns the text that LaTeX would set."""
  for raw, escape in report_text._LATEX.items():
    if raw != "\\" and len(escape) > 2:
      text = text.replace(escape, raw)
  text = text.replace(r"\textbackslash{}", "\0")
  return re.sub(r"\\([&%$#_{}])", r"\1", text).replace("\0", "\\")


@given(st.text(st.sampled_from(r"\{}%&_#$~^<>|ab ±²×"), max_size=12))
def test_escaped_text_is_set_as_it_stands(text):
  escaped = report_text.escape_latex(text)
  assert unescaped(escaped) == text
  assert not re.search(r"(?<!\\)[&#%_]", escaped)
  bare = re.sub(r"\\[{}]", "", escaped)
  assert bare.count("{") == bare.count("}")


def latex_rows(text):
  """Returns the cells of a tabular, after checking that environments are balanced."""
  stack = []
  for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
    if kind == "begin":
      stack.append(name)
    else:
      assert stack.pop() == name
  assert not stack
  bare = re.sub(r"\\[{}]", "", text)
  assert bare.count("{") == bare.count("}")
  body = re.search(r"\\toprule(.*)\\bottomrule", text, re.S)[1]
  columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", text)[1]
  lines = [x.strip() for x in body.replace(r"\midrule", "").splitlines() if x.strip()]
  assert all(line.endswith(r" \\") for line in lines)
  rows = [re.split(r"(?<!\\)&", line.removesuffix(r" \\")) for line in lines]
  assert {len(each) for each in rows} == {len(columns)}
  return [[cell.strip() for cell in each] for each in rows]


def test_latex_is_balanced_and_escaped(nasty):
  titles, linear, mlp = latex_rows(report_text.latex(nasty))
  assert [unescaped(title) for title in titles[1:3]] == [NASTY, "two"]
  assert titles[3:] == ["mean", "mean rank"]
  assert linear[0] == r"50\% \& more\_"
  assert linear[1] == r"55.00 $\pm$ 7.07"
  assert mlp[1] == r"25.00\textsuperscript{a}"
  assert (linear[-1], mlp[-1]) == ("1.00", "2.00")


@pytest.mark.parametrize("name", published.tables())
def test_every_paper_table_is_latex_and_markdown(name):
  table = report.make_table([], name)
  printed = latex_rows(report_text.latex(table))
  shown = cells(report_text.markdown(table).split("\n\n")[1])
  assert len(printed) == len(shown) == len(published.table(name).rows) + 1
  assert {len(each) for each in shown} == {len(printed[0])}


def test_markdown_shows_names_as_they_are(nasty):
  text = report_text.markdown(nasty)
  assert r"a_b%&#$~^\\{}\|\*\<x\> é" in text.splitlines()[2]
  assert "| 50% & more_ |" in text


def test_csv_has_all_of_the_table(vtab, nasty):
  for table in (report.make_table([vtab[0]], "insvp_2"), nasty):
    rows = list(csv.DictReader(io.StringIO(report_text.csv_text(table))))
    expected = []
    for line in table.lines:
      for column, cell in zip(table.columns, line.cells, strict=True):
        if cell:
          expected.append(
            (line.label, line.origin, column.title, cell.accuracy, cell.std, cell.seeds)
          )
      if line.rank is not None:
        expected.append((line.label, line.origin, "mean rank", line.rank, None, ()))
    found = [
      (
        *(r["method"], r["from"], r["column"], float(r["value"])),
        float(r["std"]) if r["std"] else None,
        tuple(map(int, r["seeds"].split())),
      )
      for r in rows
    ]
    assert found == expected
    assert {r["table"] for r in rows} == {table.name}
    here = [r for r in rows if r["from"] == HERE and r["unit"] == "%"]
    assert {r["selection"] for r in here} == {"lr, wd chosen on val among 2 trials"}


def test_a_file_has_the_format_of_its_ending(vtab, tmp_path, capsys):
  write_run(tmp_path / "digits", "digits", "linear", 0.5)
  starts = {"t.md": "VTAB-1k", "t.tex": r"\begin{table}", "t.csv": "table,method"}
  for name, start in starts.items():
    flags = [str(vtab[0]), "--table=insvp_2", f"--output={tmp_path / name}"]
    assert cli.main(["report", *flags, str(tmp_path / "digits")]) == 0
    out, err = capsys.readouterr()
    assert out == f"wrote {tmp_path / name}\n"
    # Where the text has no place for it, it is said.
    reason = "digits: the task digits is not in insvp_2"
    text = (tmp_path / name).read_text()
    assert text.lstrip("% ").startswith(start) or text.startswith("% left out: ")
    assert (reason in err) == (name != "t.md") and (reason in text) == (name != "t.csv")
  assert report.main([str(vtab[0]), "--format=csv"]) == 0
  assert capsys.readouterr().out.startswith("table,method,from,")


def test_bad_input_is_one_line(vtab, tmp_path, capsys):
  def error(*flags):
    assert report.main([*map(str, flags)]) == 2
    text = capsys.readouterr().err
    assert text.startswith("insvp_jax: ")
    return text

  write_run(tmp_path / "untested", "svhn", "linear", None)
  (tmp_path / "empty").mkdir()
  for flags, message in (
    ([], "expected the folders of runs, e.g. insvp report runs, or a paper's table"),
    ([tmp_path / "no"], f"there is no run or folder of runs {tmp_path / 'no'}."),
    ([tmp_path / "empty"], "there is no result.json in"),
    ([vtab[0], "--table=insvp2"], "unknown table 'insvp2'. Did you mean 'insvp_2'?"),
    (
      ["--table=vpt_4", "--backbone=x"],
      "--backbone has 1 backbones, but vpt_4 has runs of 2",
    ),
    ([vtab[0], f"--output={tmp_path}"], "is a folder, expected a file"),
  ):
    text = error(*flags)
    assert message in text and text.count("\n") == 1
  text = error(tmp_path / "untested")
  assert "none of 1 runs can stand in a table.\nleft out: " in text
  text = error(vtab[0], "--backbone=x")
  assert "the backbone is vit_b16_i21k" in text and "and 170 more" in text


def test_the_commands_of_the_document_run(root, vtab, tmp_path, monkeypatch, capsys):
  (tmp_path / "runs").mkdir()
  (tmp_path / "runs/vtab").symlink_to(vtab[0])
  for task in GROUPS["fgvc"]:
    write_run(tmp_path / "runs/fgvc" / task, task, "linear", 0.5)
  rows = {
    row("vpt_deep", f"fraction {x}", **{"data.fraction": x}): (x, x) for x in (0.1, 0.2)
  }
  write_search(tmp_path / "runs/scale", "photos", rows, backbone="boxed")
  monkeypatch.chdir(tmp_path)
  text = (root / "docs/report.md").read_text()
  blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
  commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
  names = [name for _, name, *_ in commands]
  assert names == [
    "train",
    "report",
    "report",
    "report",
    "report",
    "train",
    "report",
    "figure",
  ]
  for _, name, *flags in commands:
    if name != "train":  # their configs have tests of their own
      assert cli.main([name, *flags]) == 0, flags
  assert {p.name for p in tmp_path.iterdir()} == {
    "runs",
    "vpt_1.tex",
    "all.csv",
    "scale.png",
    "scale.csv",
  }
  assert "| insvp " in capsys.readouterr().out
  documented = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| `.*?\|", text, re.M)))
  assert set(published.tables()) <= set(documented)
  assert set(METHODS) > {r.method for t in published.tables().values() for r in t.rows}
  assert json.loads((tmp_path / "runs/scale/summary.json").read_text())

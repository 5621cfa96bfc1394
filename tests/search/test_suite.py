"""Groups of tasks: one run each, one table, all data looked at first."""

import csv
import json

from markdown_table import cells
import numpy as np
from PIL import Image
import pytest
from test_config import load
from tiny_commands import BACKBONE
from tiny_runs import make_params
from tiny_training import SIZE, tiny_config, write_images

from insvp_jax.data import GROUPS, TASKS, tasks
from insvp_jax.methods import METHODS
from insvp_jax.models.classifier import create_model
from insvp_jax.models.weights import save_backbone
from insvp_jax.search import outlook, suite
from insvp_jax.tools.report import make_table

# None of this is about devices, and for one all compiles sooner.
pytestmark = pytest.mark.usefixtures("one_device")

NAMES = ("cifar100", "svhn", "eurosat")
SIZES = {"train800": 16, "val200": 6, "test": 5}


def write_noah(root, task, number_of_classes=3):
  """Writes a few images in NOAH's form."""
  folder = root / TASKS[task].folder_name
  rng = np.random.default_rng(0)
  lines = {}
  for name, number in SIZES.items():
    lines[name] = []
    for i in range(number):
      path = folder / "images" / f"{name}_{i}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      pixels = rng.integers(0, 255, (16, 16, 3), np.uint8)
      Image.fromarray(pixels).save(path)
      lines[name].append(f"images/{path.name} {i % number_of_classes}")
  lines["train800val200"] = lines["train800"] + lines["val200"]
  for name, rows in lines.items():
    (folder / f"{name}.txt").write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
  """The file of a backbone, whose features are computed once for all seeds."""
  model = create_model(
    "mu/4", "linear", num_classes=3, image_size=SIZE, backbone_kwargs=BACKBONE
  )
  path = tmp_path_factory.mktemp("backbone") / "backbone.npz"
  save_backbone(make_params(model)["backbone"], path)
  return path


@pytest.fixture
def group(monkeypatch, tmp_path):
  """A group of three tasks with images on disk; returns their root."""
  monkeypatch.setitem(tasks.GROUPS, "natural", NAMES)
  for name in NAMES:
    write_noah(tmp_path / "vtab", name)
  return tmp_path / "vtab"


def _config(root, backbone):
  sizes = {f"backbone__{name}": size for name, size in BACKBONE.items()}
  config = tiny_config("linear", total_epochs=1.0, **sizes)
  config.task, config.backbone.weights = "natural", str(backbone)
  config.data.root = str(root)
  config.tune.lr, config.tune.seeds = (0.01, 0.1), (0, 1)
  return config


def test_the_comparison_of_methods_on_a_folder_makes_a_table(root, backbone, tmp_path):
  images = write_images(tmp_path / "photos")
  config = load(root, "methods", f"root={images}")
  assert set(config.tune.methods) < set(METHODS)
  # As the config says, but for what takes long.
  config.tune.methods, config.tune.seeds = ("linear", "mlp"), (0,)
  config.total_epochs, config.data.cache_dir, config.tensorboard = 2.0, "off", False
  config.backbone.name, config.backbone.weights = "mu/4", str(backbone)
  config.backbone.update(BACKBONE)
  config.image_size, config.tune.population = SIZE, 1
  found = suite.run(config, tmp_path / "run")
  titles, *table = cells((tmp_path / "run/table.md").read_text())
  assert titles[:2] == ["photos", "test accuracy, %"]
  assert [row[0] for row in table] == ["linear", "mlp"]
  for name, row in zip(("linear", "mlp"), table, strict=True):
    result = json.loads((tmp_path / f"run/{name}/seed0/result.json").read_text())
    assert row[1:3] == [f"{100 * result['test_accuracy']:.2f}", "1"]
    assert (result["train_split"], result["num_test_examples"]) == ("train_val", 13)
    assert found[name]["lr"] in (1e-3, 1e-2) and len(found[name]["trials"]) == 2
    assert row[-2] == f"{result['trainable_params']:,}"


def test_a_group_gives_a_result_per_task_and_one_table(
  group, backbone, tmp_path, capsys, monkeypatch
):
  config = _config(group, backbone)
  monkeypatch.setattr(outlook, "_WORTH_MEASURING", 1.0)
  found = suite.run(config, tmp_path / "run")
  assert list(found) == list(NAMES)
  stored = json.loads((tmp_path / "run/suite.json").read_text())
  for name in NAMES:
    summary = json.loads((tmp_path / "run" / name / "summary.json").read_text())
    assert stored[name]["linear"]["mean"] == summary["linear"]["mean"]
    # Chosen on val, trained on both, every test image counted.
    result = json.loads(
      (tmp_path / "run" / name / "linear/seed1/result.json").read_text()
    )
    assert (result["task"], result["train_split"]) == (name, "train_val")
    assert result["num_test_examples"] == SIZES["test"]
  table = (tmp_path / "run/table.md").read_text()
  header = cells(table)[0]
  assert header == [
    "test accuracy, %",
    *NAMES,
    "natural mean",
    "specialized mean",
    "mean",
  ]
  printed = capsys.readouterr().out
  assert "\nsvhn (2 of 3)\n" in printed
  # Before each task, how long it takes, and how long all that are left.
  lines = [x for x in printed.splitlines() if x.startswith("search: about ")]
  assert ["tasks that are left" in line for line in lines] == [True, True, False]
  assert "the 3 tasks that are left about " in lines[0]
  best = suite.best_run(config, tmp_path / "run", "auto", found)
  assert best == tmp_path / "run" / NAMES[0] / "linear/seed0"
  with (tmp_path / "run/table.csv").open() as file:
    rows = {row["label"]: row for row in csv.DictReader(file)}
  means = [100 * stored[name]["linear"]["mean"] for name in NAMES]
  assert float(rows["linear"]["mean"]) == pytest.approx(np.mean(means), abs=0.005)
  # The papers' tables read the same runs.
  report = make_table([tmp_path / "run"])
  (line,) = report.lines
  assert [column.title for column in report.columns] == [*NAMES, "mean"]
  shown = [cell.accuracy for cell in line.cells]
  assert shown == pytest.approx([*means, np.mean(means)])
  assert {cell.seeds for cell in line.cells} == {(0, 1)} and not report.left_out
  assert {cell.facts["selection"] for cell in line.cells} == {
    "lr, wd chosen on val among 2 trials"
  }
  sizes = {cell.facts["num_train"] for cell in line.cells}
  assert sizes == {str(SIZES["train800"] + SIZES["val200"])}
  natural = float(rows["linear"]["natural mean"])
  assert natural == pytest.approx(np.mean(means[:2]), abs=0.005)
  # The same command again repeats nothing.
  before = (tmp_path / "run/svhn/linear/seed0/result.json").stat().st_mtime_ns
  assert suite.run(config, tmp_path / "run").keys() == found.keys()
  after = (tmp_path / "run/svhn/linear/seed0/result.json").stat().st_mtime_ns
  assert before == after


def test_missing_data_of_the_last_task_show_before_the_first_trains(
  group, backbone, tmp_path
):
  (group / "eurosat" / "images" / "test_3.png").unlink()
  with pytest.raises(FileNotFoundError, match="eurosat/images/test_3.png"):
    suite.run(_config(group, backbone), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_single_runs_make_a_table_too(group, backbone, tmp_path, monkeypatch):
  monkeypatch.setitem(tasks.GROUPS, "natural", NAMES[:2])
  config = _config(group, backbone)
  config.tune.lr = config.tune.seeds = ()
  found = suite.run(config, tmp_path / "run")
  table = suite.accuracies(found)
  assert set(table) == {"linear"} and set(table["linear"]) == set(NAMES[:2])
  result = json.loads((tmp_path / "run/svhn/result.json").read_text())
  assert table["linear"]["svhn"] == result["test_accuracy"]


def test_a_single_task_goes_straight_to_its_workdir(tmp_path):
  config = tiny_config("linear")
  assert suite.members(config, "runs/x") == [(config, suite.Path("runs/x"))]
  config.task = "vtab"
  members = suite.members(config, "runs/x")
  assert [where.name for _, where in members] == list(GROUPS["vtab"])
  assert [single.task for single, _ in members] == list(GROUPS["vtab"])


def test_a_mean_needs_all_of_its_tasks():
  table = {"insvp": {"cifar100": 0.5, "svhn": 0.25}, "vpt": {"cifar100": None}}
  _, insvp, vpt = cells(suite.format_table(table, NAMES))
  assert insvp == ["insvp", "50.00", "25.00", "", "37.50", "", ""]
  assert vpt == ["vpt", *[""] * 6]
  assert cells(suite.format_table(table, NAMES[:2]))[0][-2:] == ["svhn", "mean"]


def test_long_tails_have_error_rates_and_groups(tmp_path):
  names = GROUPS["cifar100_lt"]
  groups = [{"many": 0.8, "medium": 0.6}, {"many": 0.9, "medium": 0.5, "few": 0.25}]
  results = {
    names[0]: {"vpt_deep": {"mean": 0.75, "group_means": groups[0]}},
    # A single run has no means.
    names[2]: {
      "method": "vpt_deep",
      "test_accuracy": 0.5,
      "test_by_class": {"groups": {n: {"accuracy": a} for n, a in groups[1].items()}},
    },
  }
  suite._write(tmp_path, results, names)
  errors, by_group = (tmp_path / "table.md").read_text().split("\n\n")
  assert cells(errors) == [
    ["test error, %", *names, "mean"],
    ["vpt_deep", "25.00", "", "50.00", ""],
  ]
  titles, row = cells(by_group)
  assert titles[1:] == [
    *("cifar100_lt10 many", "cifar100_lt10 medium"),
    *(f"cifar100_lt100 {name}" for name in ("many", "medium", "few")),
  ]
  assert row == ["vpt_deep", "80.00", "60.00", "90.00", "50.00", "25.00"]
  with (tmp_path / "table.csv").open() as file:
    (stored,) = csv.DictReader(file)
  assert (stored["cifar100_lt10 error"], stored["cifar100_lt100 few"]) == (
    "25.00",
    "25.00",
  )


def test_the_groups_of_the_benchmarks():
  sizes = {name: len(members) for name, members in GROUPS.items()}
  assert sizes == {
    "natural": 7,
    "specialized": 4,
    "structured": 8,
    "fgvc": 5,
    "hta": 10,
    "cifar100_lt": 3,
    "vtab": 19,
  }

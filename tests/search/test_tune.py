"""The protocol: choose on val, retrain on train + val, report test over seeds."""

import csv
import json
import shutil
import statistics
import sys
import types

from hypothesis import given
from hypothesis import strategies as st
import jax
from markdown_table import cells
import pytest
from tiny_commands import make_place
from tiny_training import make_data, tiny_config, write_images

from insvp_jax import config as config_lib
from insvp_jax import config_checks, config_variants
from insvp_jax.data import ArraySplit
from insvp_jax.search import tables, trials, tune
from insvp_jax.train import report, steps, trainer
from insvp_jax.train.trainer import Diverged

pytestmark = pytest.mark.usefixtures("one_device")


def search_config(method="linear", **changes):
  lists = {"lr": (0.1, 0.01, 0.001), "wd": (0.0, 0.1), "seeds": (0, 1, 2)}
  changes = {f"tune__{name}": values for name, values in lists.items()} | changes
  return tiny_config(method, backbone__depth=1, **changes)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
  """The file of a backbone of one block: to draw one is the dearest program of all."""
  return str(make_place(tmp_path_factory.mktemp("place")) / "backbone0.npz")


class FakeTrainer:
  """Stands for `trainer.train` and `tune.train_trials`; takes no time.

  Attributes:
    runs: (config, workdir, prepared, test) of single runs.
    trials: (config, prepared) of the searches' trials.
    chunks: how many trials trained together, of each call.
  """

  def __init__(self, val_accuracy, test_accuracy=lambda config: 0.5):
    self.val_accuracy = val_accuracy
    self.test_accuracy = test_accuracy
    self.runs, self.trials, self.chunks = [], [], []

  def train_trials(self, configs, prepared, params, workdir, name, whole=None):
    self.chunks.append(len(configs))
    self.trials += [(config, prepared) for config in configs]
    return [self.trial(config) for config in configs]

  def trial(self, config):
    trial = {"val_accuracy": None, "val_loss": None, "diverged": None}
    try:
      trial["val_accuracy"] = self.val_accuracy(config)
    except Diverged as error:
      trial["diverged"] = str(error)
    return {**trial, "train_seconds": 2.0, "images_per_second": 8.0}

  def __call__(
    self, config, workdir, *, prepared=None, test=True, whole=None, read=None
  ):
    self.runs.append((config, workdir, prepared, test))
    on_train = config.data.train_split == "train"
    splits = prepared.data.splits if prepared else ("val", "test")
    val = self.val_accuracy(config) if on_train and "val" in splits else None
    result = {
      "task": "insects",
      "method": config.method,
      "seed": config.seed,
      "lr": config.optim.lr,
      "val_accuracy": val,
      "test_accuracy": self.test_accuracy(config) if test else None,
      "trainable_params": 51,
      "prompter_params": 0,
      "total_params": 1000,
      "train_seconds": 2.0,
      "images_per_second": 8.0,
      "backbone": {**prepared.backbone, "seed": config.seed} if prepared else {},
      "data_sha256": report.data_digest(config, prepared.data, test)
      if prepared
      else "",
    }
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "result.json").write_text(json.dumps(result))
    (workdir / "config.json").write_text(json.dumps(config_lib.to_dict(config)))
    return result


@pytest.fixture
def install(monkeypatch):
  """Puts a `FakeTrainer` and images from memory in place; returns the former."""

  def install(*args, without=()):
    fake = FakeTrainer(*args)
    monkeypatch.setattr(trainer, "train", fake)
    monkeypatch.setattr(tune, "train_trials", fake.train_trials)
    monkeypatch.setattr(trainer.Prepared, "first_params", lambda *_: {})
    monkeypatch.setattr(trainer, "load_data", lambda *_: make_data(without))
    return fake

  return install


def best_at(lr, wd=0.1):
  def accuracy(config):
    return 0.9 if (config.optim.lr, config.optim.wd) == (lr, wd) else 0.4

  return accuracy


def test_lr_and_wd_are_chosen_on_val_and_the_rest_is_final(install, tmp_path):
  fake = install(best_at(0.01), lambda config: 0.5 + 0.1 * config.seed)
  summary = tune.run(search_config(), tmp_path)["linear"]
  search, final = fake.trials, fake.runs
  pairs = [(c.optim.lr, c.optim.wd) for c, *_ in search]
  assert pairs == [(lr, wd) for wd in (0.0, 0.1) for lr in (0.1, 0.01, 0.001)]
  # The search trains on no single image of val.
  assert {c.data.train_split for c, *_ in search} == {"train"}
  assert {c.seed for c, *_ in search} == {0}
  assert [c.seed for c, *_ in final] == [0, 1, 2]
  for config, _, prepared, test in final:
    assert test and config.data.train_split == "train_val"
    assert (config.optim.lr, config.optim.wd) == (0.01, 0.1)
    assert prepared.program.steps_per_epoch == 34 // 8
  workdirs = [workdir for _, workdir, *_ in fake.runs]
  assert workdirs == [tmp_path / "linear" / f"seed{s}" for s in (0, 1, 2)]
  assert (summary["lr"], summary["wd"]) == (0.01, 0.1)
  assert summary["seeds"] == [0, 1, 2]
  assert summary["test_accuracies"] == [0.5, 0.6, 0.7]
  assert summary["mean"] == pytest.approx(0.6)
  assert summary["std"] == pytest.approx(0.1)
  assert len(summary["trials"]) == 6
  assert {"lr": 0.01, "wd": 0.1, "val_accuracy": 0.9} in summary["trials"]


def test_one_program_serves_all_trials_and_one_all_final_runs(install, tmp_path):
  fake = install(best_at(0.01))
  tune.run(search_config(), tmp_path)
  assert len({id(p.program) for _, p in fake.trials}) == 1
  assert len({id(p.program) for _, _, p, _ in fake.runs}) == 1
  everything = [p for _, p in fake.trials] + [p for _, _, p, _ in fake.runs]
  assert len({id(p.data) for p in everything}) == 1


def test_a_config_that_trains_on_train_val_still_searches_on_train(install, tmp_path):
  fake = install(best_at(0.01))
  tune.run(search_config(data__train_split="train_val"), tmp_path)
  for config, prepared in fake.trials:
    assert config.data.train_split == "train"
    assert prepared.program.steps_per_epoch == 24 // 8
  assert {c.data.train_split for c, *_ in fake.runs} == {"train_val"}


accuracies = st.sampled_from([0.0, 0.25, 0.5, 1.0])
rates = st.sampled_from([0.0, 1e-4, 1e-3, 0.1, 3.0])
trial_lists = st.lists(
  st.fixed_dictionaries(
    {"lr": rates, "wd": rates, "val_accuracy": st.none() | accuracies}
  ),
  min_size=1,
)


@given(trial_lists)
def test_choose_takes_the_best_and_of_equals_the_smallest(found):
  finished = [t for t in found if t["val_accuracy"] is not None]
  if not finished:
    with pytest.raises(ValueError, match="every run of the search diverged"):
      trials.choose(found)
    return
  chosen = trials.choose(found)
  best = max(t["val_accuracy"] for t in finished)
  equals = [(t["lr"], t["wd"]) for t in finished if t["val_accuracy"] == best]
  assert (chosen["lr"], chosen["wd"]) == min(equals)
  assert chosen == trials.choose(found[::-1])


def test_finished_runs_are_not_repeated(install, tmp_path):
  install(best_at(0.01))
  first = tune.run(search_config(), tmp_path)
  fake = install(best_at(0.001))  # would choose otherwise, if it were asked
  assert tune.run(search_config(), tmp_path) == first
  # What does not shape a result may change; another lr is one more run.
  config = search_config(
    log_every_steps=3, tune__lr=(0.1, 0.01, 0.001, 0.02), tune__seeds=(0, 1, 2, 3)
  )
  again = tune.run(config, tmp_path)["linear"]
  assert [c.optim.lr for c, _ in fake.trials] == [0.02, 0.02]
  assert [(c.optim.lr, c.seed) for c, *_ in fake.runs] == [(0.01, 3)]
  assert (again["lr"], again["seeds"]) == (0.01, [0, 1, 2, 3])


_OTHER = ("config", "backbone", "data", "interrupted")
_DAMAGED = ("result.json", "config.json", "half a result", "other types")


@pytest.mark.parametrize("what", [*_OTHER, *_DAMAGED])
def test_a_run_of_something_else_is_not_taken_for_finished(install, tmp_path, what):
  config = search_config(tune__lr=(), tune__wd=(), tune__seeds=(0,))
  install(best_at(0.01))
  tune.run(config, tmp_path)
  result = tmp_path / "linear" / "seed0" / "result.json"
  if what == "config":
    config.total_epochs = 3.0
  elif what == "backbone":
    found = json.loads(result.read_text())
    found["backbone"]["id"] = "another"
    result.write_text(json.dumps(found))
  elif what == "data":
    found = json.loads(result.read_text())
    found["data_sha256"] = "of other images"
    result.write_text(json.dumps(found))
  elif what.endswith(".json"):
    result.with_name(what).write_text("")
  elif what in _DAMAGED:
    found = json.loads(result.read_text())
    found["train_seconds"] = None
    if what == "half a result":
      del found["val_accuracy"]
    result.write_text(json.dumps(found))
  else:
    result.unlink()
  fake = install(best_at(0.01))
  tune.run(config, tmp_path)
  assert len(fake.runs) == 1


def test_one_candidate_needs_no_search_and_no_val(install, tmp_path):
  fake = install(best_at(0.01), without=("val", "train_val"))
  config = search_config(tune__lr=(0.02,), tune__wd=(), tune__seeds=(5,))
  summary = tune.run(config, tmp_path)["linear"]
  assert len(fake.runs) == 1
  assert fake.runs[0][0].data.train_split == "train"
  assert (summary["lr"], summary["std"], summary["trials"]) == (0.02, None, [])


def test_a_search_without_val_says_so_before_anything_trains(install, tmp_path):
  fake = install(best_at(0.01), without=("val", "train_val"))
  message = "'insects' has no val split to choose lr and wd on.*test split never"
  with pytest.raises(ValueError, match=message):
    tune.run(search_config(), tmp_path / "run")
  assert not fake.trials and not (tmp_path / "run").exists()


def test_a_task_without_test_is_trained_all_the_same(install, tmp_path):
  install(best_at(0.01), lambda config: None, without=("test",))
  summary = tune.run(search_config(), tmp_path)["linear"]
  assert (summary["mean"], summary["std"], summary["test_accuracies"]) == (
    None,
    None,
    [],
  )
  _, row = cells((tmp_path / "table.md").read_text())
  assert row[:5] == ["linear", "-", "3", "0.01", "0.1"]


def test_a_diverged_candidate_loses_and_the_search_goes_on(install, tmp_path, capsys):
  def accuracy(config):
    if config.optim.lr == 0.1:
      raise Diverged("the loss is nan at step 2.")
    return 0.5

  install(accuracy)
  summary = tune.run(search_config(tune__wd=(), optim__wd=0.0), tmp_path)["linear"]
  assert summary["lr"] == 0.001
  assert summary["trials"][0] == {"lr": 0.1, "wd": 0.0, "val_accuracy": None}
  assert "lr 0.1, wd 0: the loss is nan at step 2." in capsys.readouterr().out


def test_combined_methods_are_searched_like_any(install, tmp_path):
  fake = install(best_at(0.01), lambda config: config.lora.dropout)
  methods = ("vpt_deep+lora", "linear")
  config = search_config(tune__methods=methods)
  config.tune.wd, config.tune.seeds = (0.1,), (0,)
  config.tune.grid.dropout = (0.1, 0.3)
  summary = tune.run(config, tmp_path)
  chosen = summary["vpt_deep+lora"]
  assert (chosen["lr"], chosen["dropout"]) == (0.01, 0.1)
  # A field that both have is set in both.
  assert {(c.vpt_deep.dropout, c.lora.dropout) for c, *_ in fake.trials[:6]} == {
    (0.1, 0.1),
    (0.3, 0.3),
  }
  assert chosen["test_accuracies"] == [0.1]
  assert (tmp_path / "vpt_deep+lora" / "seed0" / "result.json").exists()


def test_methods_side_by_side_make_a_table(install, tmp_path, capsys):
  install(best_at(0.01), lambda c: 0.5 + 0.1 * c.seed + 0.2 * (c.method == "insvp"))
  methods = ("insvp", "linear")
  summary = tune.run(search_config(tune__methods=methods), tmp_path)
  assert tuple(summary) == methods
  assert json.loads((tmp_path / "summary.json").read_text()) == summary
  table = (tmp_path / "table.md").read_text()
  assert table == tables.format_table("insects", summary)
  rows = cells(table)
  assert rows[0][:2] == ["insects", "test accuracy, %"]
  assert rows[1] == ["insvp", "80.00 ± 10.00", "3", "0.01", "0.1", "51", "2"]
  assert rows[2][:2] == ["linear", "60.00 ± 10.00"]
  printed = capsys.readouterr()
  assert printed.out.splitlines()[0] == (
    "18 runs: insvp 6 trials of 6 steps (3 lr x 2 wd) and 3 final of 8, linear "
    "6 trials of 6 steps (3 lr x 2 wd) and 3 final of 8; those that are finished are "
    "kept"
  )
  # What they share is said once, what trains once a method.
  assert printed.err.count("insects: 3 classes") == 1
  assert printed.err.count("head, trainable") == 2
  with (tmp_path / "table.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert [row["method"] for row in rows] == list(methods)
  assert float(rows[0]["mean"]) == summary["insvp"]["mean"]
  assert rows[0]["seeds"] == "0 1 2" and float(rows[0]["val_accuracy"]) == 0.9
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {*methods, "summary.json", "table.md", "table.csv"}


def test_a_wrong_field_of_the_last_method_shows_before_the_first_trains(
  install, tmp_path
):
  fake = install(best_at(0.01))
  methods = {"tune__methods": ("linear", "vpt_deep"), "vpt_deep__prompt_length": -1}
  with pytest.raises(ValueError, match="prompt_length is -1"):
    tune.run(search_config(**methods), tmp_path)
  with pytest.raises(ValueError, match="'vpt_dep'.* vpt_deep|'vpt_dep'.*'vpt_deep'"):
    tune.run(search_config(tune__methods=("linear", "vpt_dep")), tmp_path)
  assert not fake.runs and not fake.trials


def test_without_lists_it_is_one_run(install, tmp_path, capsys):
  fake = install(best_at(0.01))
  result = tune.run(tiny_config("linear"), tmp_path)
  ((config, workdir, _, test),) = fake.runs
  assert (config.method, workdir, test) == ("linear", tmp_path, True)
  assert result["test_accuracy"] == 0.5
  assert capsys.readouterr().out == (
    "insects linear: val 40.00%, test 50.00%; 51 trainable parameters (5.10%), 2.0 s, "
    "8 images/s\n"
  )


def test_first_runs_are_where_the_first_final_runs_lie(tmp_path):
  assert tune.first_runs(tiny_config("linear"), tmp_path) == {"linear": tmp_path}
  config = search_config(tune__methods=("insvp", "linear"), tune__seeds=(7, 8))
  expected = {name: tmp_path / name / "seed7" for name in ("insvp", "linear")}
  assert tune.first_runs(config, tmp_path) == expected


@pytest.mark.parametrize("population, together_", [(0, 4), (1, 1), (2, 2)])
def test_a_real_search_compiles_the_step_once_and_repeats_nothing(
  monkeypatch, backbone, tmp_path, capsys, population, together_
):
  traced = []
  original = steps.create_train_step

  def create_train_step(*args, **kwargs):
    step = original(*args, **kwargs)

    def train_step(state, batch):
      traced.append({name: leaf.shape for name, leaf in batch.items()})
      return step(state, batch)

    return train_step

  monkeypatch.setattr(steps, "create_train_step", create_train_step)
  monkeypatch.setattr(trainer, "load_data", lambda *_: make_data())
  lists = {"tune__lr": (0.0, 0.05), "tune__wd": (0.0, 0.1), "tune__seeds": (0, 1)}
  lists |= {"tune__population": population, "backbone__weights": backbone}
  config = search_config(total_epochs=4.0, log_every_steps=100, **lists)
  summary = tune.run(config, tmp_path)["linear"]
  # One program for all four trials, one for both seeds on train_val.
  labels = {"labels": (8,)}
  features = {"features": (8, 16), **labels}
  assert traced == [features, features]
  results = [
    json.loads((tmp_path / "linear" / f"seed{s}" / "result.json").read_text())
    for s in (0, 1)
  ]
  assert summary["mean"] == statistics.mean(r["test_accuracy"] for r in results)
  assert all(r["train_split"] == "train_val" for r in results)
  assert [r["lr"] for r in results] == [summary["lr"]] * 2
  lines = (tmp_path / "linear" / "trials.jsonl").read_text().splitlines()
  assert [json.loads(line)["together"] for line in lines] == [together_] * 4
  capsys.readouterr()
  monkeypatch.setattr(trainer, "train", pytest.fail)
  monkeypatch.setattr(tune, "train_trials", pytest.fail)
  assert tune.run(config, tmp_path)["linear"] == summary


# Modes, grids, interruptions.


def test_mode_train_is_one_run_whatever_the_lists_say(install, tmp_path):
  fake = install(best_at(0.01))
  result = tune.run(search_config(), tmp_path, "train")
  ((config, workdir, *_),) = fake.runs
  assert (config.optim.lr, workdir) == (0.01, tmp_path) and not fake.trials
  assert result["seed"] == 0
  assert tune.first_runs(search_config(), tmp_path, "train") == {"linear": tmp_path}
  with pytest.raises(ValueError, match="mode is 'tuned', expected one of auto, train"):
    tune.run(search_config(), tmp_path, "tuned")


def test_mode_tune_takes_the_method_s_own_grid_where_there_is_no_list(
  install, tmp_path
):
  fake = install(best_at(0.5, 1e-3))
  config = tiny_config("linear", optim__name="sgd")
  summary = tune.run(config, tmp_path, "tune")["linear"]
  assert len(fake.trials) == 40
  assert {c.optim.lr_scale_by_batch for c, _ in fake.trials} == {256}
  ((final, workdir, *_),) = fake.runs
  assert (final.optim.lr, final.optim.lr_scale_by_batch) == (0.5, 256)
  assert workdir == tmp_path / "linear" / "seed0"
  assert summary["seeds"] == [0] and len(summary["trials"]) == 40
  assert tune.first_runs(config, tmp_path, "tune") == {"linear": workdir}


def test_a_grid_that_is_empty_or_of_no_method_is_one_line(install, tmp_path):
  fake = install(best_at(0.01))
  with pytest.raises(ValueError, match="the grid is empty"):
    tune.run(tiny_config("bias", optim__name="sgd"), tmp_path, "tune")
  config = search_config()
  config.tune.grid.dropout = (0.1, 0.2)
  with pytest.raises(ValueError, match="grid.dropout is no hparam of linear"):
    tune.run(config, tmp_path)
  config = search_config("vpt_deep")
  config.tune.grid.dropout = (0.1, 1.5)
  with pytest.raises(ValueError, match="dropout is 1.5, expected a dropout rate"):
    tune.run(config, tmp_path)
  assert not fake.trials and not list(tmp_path.iterdir())


def test_a_name_makes_no_cells_of_its_own():
  table = tables.markdown([["a|b\x1b[2J", "1"]], ["x", "y"])
  assert r"| a\|b\x1b[2J |" in table


def test_unequal_and_ordered_classes_have_columns_of_their_own():
  def result(seed, **by_class):
    return {
      **{"seed": seed, "test_accuracy": 0.75, "images_per_second": None},
      **{"trainable_params": 51, "prompter_params": 0, "train_seconds": 2.0},
      "test_by_class": {"imbalance": 2.0, "balanced_accuracy": 0.5, **by_class},
    }

  def row(*results):
    return {**tune._of_runs(results), "lr": 0.1, "wd": 0.0, "searched": []}

  new = {"macro_f1": 0.25, "quadratic_kappa": 0.125}
  summary = {"linear": row(result(0, **new), result(1, **{**new, "macro_f1": 0.75}))}
  titles, values = cells(tables.format_table("insects", summary))
  shown = dict(zip(titles, values, strict=True))
  assert shown["balanced, %"] == "50.00" and shown["macro-F1, %"] == "50.00"
  assert shown["quadratic kappa"] == "0.125"
  header, line = csv.reader(tables.format_csv("insects", summary).splitlines())
  numbers = dict(zip(header, line, strict=True))
  assert (numbers["macro_f1_mean"], numbers["kappa_mean"]) == ("0.5", "0.125")
  # Of classes of one size, and of runs of before.
  equal = {"linear": row(result(0, imbalance=1.2, macro_f1=0.25))}
  assert "macro" not in tables.format_table("insects", equal)
  before = row(result(0), result(1, **new))
  assert (before["balanced_mean"], before["macro_f1_mean"]) == (0.5, None)


def test_further_hparams_are_searched_for_and_stand_in_the_tables(install, tmp_path):
  def accuracy(config):
    return 0.9 if config.insvp.image_fusion == (1.0, 2.0) else 0.4

  fake = install(accuracy)
  config = search_config("insvp", tune__wd=(), tune__methods=("insvp", "linear"))
  config.tune.grid.image_fusion = ((0.3, 0.7), (1.0, 2.0))
  summary = tune.run(config, tmp_path)
  hparams = [(c.method, p.program.hparams) for c, p in fake.trials]
  assert hparams == [("insvp", ("image_fusion",))] * 6 + [("linear", ())] * 3
  assert summary["insvp"]["image_fusion"] == [1.0, 2.0]
  finals = [c for c, *_ in fake.runs if c.method == "insvp"]
  assert {c.insvp.image_fusion for c in finals} == {(1.0, 2.0)}
  # What is chosen is compiled in, as in a run of one's own.
  assert {p.program.hparams for *_, p, _ in fake.runs} == {()}
  head, insvp, linear = cells((tmp_path / "table.md").read_text())
  assert head[4:7] == ["wd", "image_fusion", "prompter + head"]
  assert insvp[4:6] == ["0.0001", "1, 2"] and linear[4:6] == ["0.0001", ""]
  with (tmp_path / "table.csv").open() as file:
    assert [row["image_fusion"] for row in csv.DictReader(file)] == ["1.0 2.0", ""]


@pytest.mark.parametrize(
  "population, chunks", [(1, [1] * 6), (4, [3, 3]), (5, [3, 3]), (0, [6])]
)
def test_as_many_trials_train_together_as_asked(install, tmp_path, population, chunks):
  fake = install(best_at(0.01))
  tune.run(search_config(tune__population=population), tmp_path)
  assert fake.chunks == chunks
  lines = (tmp_path / "linear" / "trials.jsonl").read_text().splitlines()
  assert len(lines) == 6
  assert {json.loads(line)["together"] for line in lines} == {chunks[0]}


def test_the_last_chunk_is_filled_up_and_counts_once(install, tmp_path):
  fake = install(best_at(0.01))
  lrs = (0.1, 0.01, 0.001, 0.002, 0.003)
  config = search_config(tune__population=3, tune__lr=lrs, tune__wd=())
  summary = tune.run(config, tmp_path)["linear"]
  assert fake.chunks == [3, 3]
  assert [c.optim.lr for c, _ in fake.trials] == [*lrs, 0.003]
  assert [trial["lr"] for trial in summary["trials"]] == list(lrs)


def test_an_interrupted_search_goes_on_with_the_missing_trials(install, tmp_path):
  def accuracy(config):
    if (config.optim.lr, config.optim.wd) == (0.01, 0.1):
      raise KeyboardInterrupt
    return 0.5

  install(accuracy)
  config = search_config(tune__population=2)
  with pytest.raises(KeyboardInterrupt):
    tune.run(config, tmp_path)
  lines = (tmp_path / "linear" / "trials.jsonl").read_text().splitlines()
  done = [(json.loads(x)["lr"], json.loads(x)["wd"]) for x in lines]
  assert done == [(0.1, 0.0), (0.01, 0.0), (0.001, 0.0), (0.1, 0.1)]
  fake = install(best_at(0.01))
  summary = tune.run(config, tmp_path)["linear"]
  assert [(c.optim.lr, c.optim.wd) for c, _ in fake.trials] == [
    (0.01, 0.1),
    (0.001, 0.1),
  ]
  assert (summary["lr"], summary["wd"]) == (0.01, 0.1)
  assert len(summary["trials"]) == 6


def test_trials_of_other_settings_are_not_taken(install, tmp_path):
  install(best_at(0.01))
  tune.run(search_config(), tmp_path)
  fake = install(best_at(0.01))
  tune.run(search_config(batch_size=4), tmp_path)
  assert len(fake.trials) == 6
  # They stay beside each other.
  fake = install(best_at(0.01))
  tune.run(search_config(), tmp_path)
  assert not fake.trials


def test_all_diverged_is_one_line(install, tmp_path):
  def accuracy(config):
    raise Diverged("the loss is nan at step 2.")

  fake = install(accuracy)
  with pytest.raises(ValueError, match="every run of the search diverged; lower conf"):
    tune.run(search_config(), tmp_path)
  assert not fake.runs


def test_too_many_trials_for_the_memory_become_fewer(
  install, monkeypatch, tmp_path, capsys
):
  fake = install(best_at(0.01))

  def train_trials(configs, *args):
    if len(configs) > 2:
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    return fake.train_trials(configs, *args)

  monkeypatch.setattr(tune, "train_trials", train_trials)
  tune.run(search_config(), tmp_path)
  assert fake.chunks == [1] * 6 and "now 3 at a time" in capsys.readouterr().out


def test_the_search_never_touches_the_test_split(monkeypatch, backbone, tmp_path):
  class Sealed(ArraySplit):
    def __len__(self):
      return 13

    def __getattribute__(self, name):
      if name in ("images", "labels", "read", "digest") and Sealed.sealed:
        raise AssertionError(f"the test split was touched: {name}")
      return super().__getattribute__(name)

  Sealed.sealed = False
  data = make_data()
  test = data.splits["test"]
  data.splits["test"] = Sealed(test.images, test.labels)
  monkeypatch.setattr(trainer, "load_data", lambda *_: data)
  # How many images of a class there are is printed, and decides nothing.
  monkeypatch.setattr(type(data), "summary", lambda data: "")
  Sealed.sealed = True
  # The final run is what trips over it, with the search behind it.
  with pytest.raises(AssertionError, match="the test split was touched"):
    tune.run(search_config(backbone__weights=backbone), tmp_path)
  lines = (tmp_path / "linear" / "trials.jsonl").read_text().splitlines()
  assert len(lines) == 6


def test_fields_make_programs_of_their_own_and_are_chosen_on_val(install, tmp_path):
  def accuracy(config):
    return 0.1 * config.mlp.hidden_layers + (config.optim.lr == 0.01) * 0.05

  config = search_config("mlp", tune__lr=(0.1, 0.01), tune__wd=())
  config.tune.fields = (("mlp.hidden_layers", (1, 2)), ("mlp.dropout", (0.0, 0.5)))

  class Killed(BaseException):
    pass

  def killed(config):
    if (config.mlp.hidden_layers, config.mlp.dropout) == (2, 0.5):
      raise Killed
    return accuracy(config)

  fake = install(killed)
  with pytest.raises(Killed):
    tune.run(config, tmp_path)
  path = tmp_path / "mlp" / "trials.jsonl"
  before = path.read_text()
  assert before.count("\n") == 6
  fake = install(accuracy)
  summary = tune.run(config, tmp_path)["mlp"]
  # What was finished is kept; only the missing ones were tried.
  assert path.read_text().startswith(before) and path.read_text().count("\n") == 8
  assert [c.mlp.dropout for c, _ in fake.trials] == [0.5, 0.5]
  assert [c.mlp.hidden_layers for c, _ in fake.trials] == [2, 2]
  # Equal trials go to the smaller value.
  chosen = {"lr": 0.01, "mlp.hidden_layers": 2, "mlp.dropout": 0.0}
  assert {name: summary[name] for name in chosen} == chosen
  assert summary["searched"] == ["lr", "wd", "mlp.hidden_layers", "mlp.dropout"]
  for run, _, prepared, _ in fake.runs:
    assert (run.mlp.hidden_layers, run.mlp.dropout) == (2, 0.0)
    assert prepared.program.model.head.hidden_layers == 2
  assert "mlp.dropout" in (tmp_path / "table.md").read_text()
  fake = install(accuracy)
  assert tune.run(config, tmp_path)["mlp"] == summary
  assert not fake.trials and not fake.runs

  # From the start: one program for the two lrs of each pair of fields.
  fake = install(accuracy)
  tune.run(config, tmp_path / "whole")
  programs = [id(prepared.program) for _, prepared in fake.trials]
  layers = [prepared.program.model.head.hidden_layers for _, prepared in fake.trials]
  assert layers == [1] * 4 + [2] * 4 and len(set(programs)) == 4
  assert programs[::2] == programs[1::2]
  assert len({id(prepared.data) for _, prepared in fake.trials}) == 1


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (("mlp.dropout", (0.1,)), "has 'mlp.dropout', expected pairs of a method's field"),
    ((("mlp.droput", (0.1,)),), "no field of a method.*Did you mean 'mlp.dropout'"),
    ((("mlp.dropout", ()),), r"has the values \(\), expected one or more"),
    ((("mlp.dropout", (0.1, 0.1)),), "each once"),
    ((("mlp.dropout", (0.1,)), ("mlp.dropout", (0.2,))), "is there twice"),
    ((("mlp.dropout", ("much",)),), "mlp.dropout is 'much', expected a number"),
    ((("mlp.dropout", (0.1, 1.5)),), "dropout is 1.5, expected a dropout rate"),
    ((("vp.location", ("padding",)),), "has vp.location, but the search is over mlp"),
  ],
)
def test_wrong_fields_are_named_before_data_are_read(
  install, monkeypatch, tmp_path, fields, message
):
  install(best_at(0.1))
  monkeypatch.setattr(trainer, "load_data", lambda *_: pytest.fail("data were read"))
  config = search_config("mlp", tune__fields=fields)
  with pytest.raises(ValueError, match=message) as info:
    tune.run(config, tmp_path)
  assert "\n" not in str(info.value)


def test_what_a_later_trial_lacks_shows_before_the_first_one_trains(install, tmp_path):
  fake = install(best_at(0.1))
  config = search_config("vp")
  config.tune.fields = (("vp.classifier", ("trained", "source")),)
  with pytest.raises(ValueError, match="its head is not kept: set head_classes"):
    tune.run(config, tmp_path)
  assert not fake.trials


def test_a_field_on_the_command_line_is_not_searched():
  config = search_config("mlp")
  config.tune.fields = (("mlp.dropout", (0.1, 0.2)), ("mlp.hidden_layers", (1, 2)))
  config.mlp.dropout = 0.3
  config_lib.apply_overrides(config, {"mlp.dropout"}, tunes=True)
  assert config.tune.fields == (("mlp.hidden_layers", (1, 2)),)
  # A comma is missing: said later, in one line.
  wrong = search_config("mlp", tune__fields=("mlp.dropout", (0.1, 0.2)))
  config_lib.apply_overrides(wrong, {"tune.fields"}, tunes=True)
  keys = {"mlp.hidden_layers", "tune.fields"}
  with pytest.raises(ValueError, match=r"both --config.mlp.hidden_layers and"):
    config_lib.apply_overrides(config, keys, tunes=True)


# Variants.

ROWS = (
  ("one layer", "mlp", ()),
  ("two, 3 epochs", "mlp", (("mlp.hidden_layers", 2), ("total_epochs", 3.0))),
  ("linear, lr 0.5", "linear", (("optim.lr", 0.5), ("batch_size", 8))),
)


def variants_config(rows=ROWS, **changes):
  lists = {"tune__lr": (0.1, 0.01), "tune__wd": (), "tune__seeds": (0, 1)}
  return search_config("insvp", tune__variants=rows, **(lists | changes))


def test_variants_are_rows_with_a_choice_a_folder_and_a_line_each(install, tmp_path):
  def accuracy(config):
    layers = config.mlp.hidden_layers if config.method == "mlp" else 0
    return 0.9 if config.optim.lr == {2: 0.1}.get(layers, 0.01) else 0.4

  fake = install(accuracy)
  # The first row's batches of 8 are not what 0 stands for in the others.
  config = variants_config(ROWS[::-1], batch_size=0)
  summary = tune.run(config, tmp_path)
  assert list(summary) == ["linear, lr 0.5", "two, 3 epochs", "one layer"]
  tried = [(c.method, c.optim.lr, c.total_epochs, c.batch_size) for c, _ in fake.trials]
  # A row with nothing to choose is compared on val all the same.
  assert tried == [
    ("linear", 0.5, 2.0, 8),
    *[("mlp", lr, 3.0, 4) for lr in (0.1, 0.01)],
    *[("mlp", lr, 2.0, 4) for lr in (0.1, 0.01)],
  ]
  finals = {workdir.relative_to(tmp_path).as_posix(): c for c, workdir, *_ in fake.runs}
  folders = ("linear_lr_0_5", "two_3_epochs", "one_layer")
  assert list(finals) == [f"{name}/seed{seed}" for name in folders for seed in (0, 1)]
  assert finals["two_3_epochs/seed1"].mlp.hidden_layers == 2
  assert [row["lr"] for row in summary.values()] == [0.5, 0.1, 0.01]
  assert [row["val_accuracy"] for row in summary.values()] == [0.4, 0.9, 0.9]
  row = summary["two, 3 epochs"]
  assert row["method"] == "mlp"
  assert row["changes"] == {"mlp.hidden_layers": 2, "total_epochs": 3.0}
  assert json.loads((tmp_path / "summary.json").read_text()) == summary
  table = cells((tmp_path / "table.md").read_text())
  assert [line[0] for line in table[1:]] == list(summary)
  with (tmp_path / "table.csv").open() as file:
    rows = [(row["label"], row["method"]) for row in csv.DictReader(file)]
  assert rows == [(label, row["method"]) for label, row in summary.items()]
  assert tune.first_runs(config, tmp_path)["one layer"] == tmp_path / "one_layer/seed0"

  # Started again nothing is repeated but the trials of a row that has changed.
  fake = install(accuracy)
  label, method, (layers, _) = ROWS[1]
  changed = (label, method, (layers, ("total_epochs", 1.0)))
  tune.run(variants_config((ROWS[2], changed, ROWS[0]), batch_size=0), tmp_path)
  assert {(c.total_epochs, c.mlp.hidden_layers) for c, _ in fake.trials} == {(1.0, 2)}
  assert {workdir.parent.name for _, workdir, *_ in fake.runs} == {"two_3_epochs"}


def test_without_val_rows_with_nothing_to_choose_have_no_trials(install, tmp_path):
  fake = install(best_at(0.01), without=("val", "train_val"))
  summary = tune.run(variants_config(tune__lr=(0.1,)), tmp_path)
  assert not fake.trials and [row["trials"] for row in summary.values()] == [[]] * 3


def test_what_a_row_changes_is_not_searched_for_in_it():
  config = search_config("insvp")
  config.tune.grid.dropout = (0.0, 0.1)
  config.tune.fields = (("mlp.hidden_layers", (1, 2)), ("vp.location", ("pad",)))
  changes = {"optim.wd": 0.5, "mlp.dropout": 0.3, "mlp.hidden_layers": 3}
  row = config_variants.Variant("x", "mlp", changes).config(config)
  grid = trials.grid_of(row, default=False)
  assert grid == {"wd": (0.5,), "lr": (0.1, 0.01, 0.001)}
  assert (row.method, row.mlp.dropout, row.mlp.hidden_layers) == ("mlp", 0.3, 3)
  assert config.tune.grid.dropout == (0.0, 0.1) and config.method == "insvp"
  # With the method's own grid, too, of which the rest is tried.
  own = config_variants.Variant("x", "mlp", {"optim.lr": 0.5})
  assert trials.grid_of(own.config(tiny_config(), tunes=True), True)["lr"] == (0.5,)


def test_rows_may_differ_in_the_share_of_the_training_images(backbone, tmp_path):
  write_images(tmp_path / "images")
  rows = tuple(
    (f"{title} {value:g}", "linear", ((f"data.{title}", value),))
    for title, value in (("fraction", 0.25), ("shots", 5))
  )
  config = variants_config(rows, tune__lr=(0.1,), tune__seeds=(0,))
  config.task, config.data.root = "folder", str(tmp_path / "images")
  config.batch_size, config.total_epochs = 0, 1.0
  config.backbone.weights = backbone
  summary = tune.run(config, tmp_path / "run")
  finals = tune.first_runs(config, tmp_path / "run")
  results = {
    label: json.loads((where / "result.json").read_text())
    for label, where in finals.items()
  }
  assert [r["num_train_examples"] for r in results.values()] == [6, 15]
  for label, result in results.items():
    # Val chose, test was whole, and no final run saw more images than its trials.
    assert result["train_split"] == "train" and result["num_test_examples"] == 13
    assert summary[label]["trials"][0]["val_accuracy"] is not None
  assert len({result["data_sha256"] for result in results.values()}) == 2


def one_row(*changes, label="x", method="mlp"):
  return ((label, method, changes),)


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    (("mlp", "linear"), "has 'mlp', expected rows of .label, method, "),
    (one_row("mlp.dropout"), "expected rows of .label, method, ..key, value."),
    (one_row(("mlp.dropout", 0.1), ("mlp.dropout", 0.2)), "changes one key twice"),
    (one_row(label="|"), "'|' is no label, expected up to 64"),
    (one_row(label="\u03b2"), "is no label"),
    (one_row(label="x" * 65), "is no label"),
    (one_row() + one_row(), "'x' and 'x' would have one folder"),
    (one_row(label="A b") + one_row(label="a_B"), "'a_B' and 'A b' would have one"),
    (one_row(method="mpl"), "unknown method 'mpl'"),
    (one_row(("mlp.droput", 0.1)), "no key of the config. Did you mean 'mlp.dropout'"),
    (one_row(("lora.rank", 4)), "'x' changes lora.rank, but its method is mlp"),
    (one_row(("mlp.dropout", "much")), "'x': config.mlp.dropout is 'much', expected a"),
    (one_row(("total_epochs", -1.0)), "'x': config.total_epochs is -1.0, expected at"),
    (one_row(("mlp.dropout", 1.5)), "dropout is 1.5, expected a dropout rate"),
    (one_row(("data.fraction", 0.0)), "'x': config.data.fraction is 0.0, expected in"),
    (
      one_row(("data.fraction", 0.5), ("data.shots", 2)),
      "'x': both config.data.shots = 2 and config.data.fraction = 0.5 were given",
    ),
    *(
      (one_row((key, value)), f"changes {key}, which all rows share")
      for key, value in {
        **{"task": "svhn", "method": "linear", "seed": 1, "image_size": 8},
        **{"data.preset": "vpt", "backbone.depth": 1, "tune.lr": (0.1,)},
        **{"plan.num_train": 1, "log_every_steps": 2, "tensorboard": True},
        **{"data.root": "x", "data.split_seed": 1, "data.val_fraction": 0.2},
      }.items()
    ),
  ],
)
def test_wrong_variants_are_named_before_data_are_read(
  install, monkeypatch, tmp_path, rows, message
):
  install(best_at(0.1))
  monkeypatch.setattr(trainer, "load_data", lambda *_: pytest.fail("data were read"))
  with pytest.raises(ValueError, match=message) as info:
    tune.run(variants_config(rows), tmp_path)
  assert "\n" not in str(info.value)


def test_lists_and_lengths_that_contradict_variants_are_one_line():
  with pytest.raises(ValueError, match="both config.tune.methods and config.tune.var"):
    config_checks.validate(variants_config(tune__methods=("linear",)))
  with pytest.raises(ValueError, match="3 epochs' changes total_epochs, which has no"):
    config_checks.validate(variants_config(total_steps=5))


def test_a_flag_that_no_row_would_look_at_is_one_line():
  rows = [(str(lr), "mlp", (("optim.lr", lr),)) for lr in (0.1, 0.2)]
  config = variants_config(tuple(rows))
  config_variants.check_overrides(config, {"total_epochs", "tune.wd", "optim.wd"})
  for key in ("method", "optim.lr", "tune.lr"):
    with pytest.raises(ValueError, match=f"--config.{key} was given, but each row"):
      config_variants.check_overrides(config, {"seed", key})
  # One row has it from the config.
  config.tune.variants = (*config.tune.variants, ("as it is", "mlp", ()))
  config_variants.check_overrides(config, {"optim.lr", "tune.lr"})
  config_variants.check_overrides(search_config(), {"method"})


def hparams_tab(logdir, monkeypatch):
  """Returns the rows of TensorBoard's tab HPARAMS: (hparams, metrics, status)."""
  # So that TensorBoard does not import TensorFlow, which takes long.
  monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", types.ModuleType("notf"))
  from tensorboard.backend.event_processing import (
    data_provider,
    plugin_event_multiplexer,
  )
  from tensorboard.context import RequestContext
  from tensorboard.plugins.hparams import (
    api_pb2,
    backend_context,
    list_session_groups,
  )

  runs = plugin_event_multiplexer.EventMultiplexer()
  runs.AddRunsFromDirectory(str(logdir))
  runs.Reload()
  provider = data_provider.MultiplexerDataProvider(runs, str(logdir))
  shown = backend_context.Context(types.SimpleNamespace(data_provider=provider))
  columns = [
    api_pb2.ColParams(metric=api_pb2.MetricName(tag=tag))
    for tag in ("val_accuracy", "val_loss")
  ]
  statuses = {value: name for name, value in api_pb2.Status.items()}
  request = api_pb2.ListSessionGroupsRequest(
    start_index=0, slice_size=100, col_params=columns, allowed_statuses=list(statuses)
  )
  handler = list_session_groups.Handler(RequestContext(), shown, "", request)
  rows = []
  for group in handler.run().session_groups:
    hparams = {k: v.number_value or v.string_value for k, v in group.hparams.items()}
    metrics = {each.name.tag: each.value for each in group.metric_values}
    rows.append((hparams, metrics, statuses[group.sessions[0].status]))
  return sorted(rows, key=lambda row: (row[0]["wd"] or 0, -row[0]["lr"]))


def test_tensorboard_shows_each_trial_with_its_hparams(install, tmp_path, monkeypatch):
  def accuracy(config):
    if config.optim.lr > 0.05:
      raise Diverged("the loss is nan")
    return 0.5 + config.optim.wd

  install(accuracy)
  config = search_config(tensorboard=True, tune__lr=(0.1, 0.01), tune__wd=(0.25, 0.125))
  tune.run(config, tmp_path)
  rows = hparams_tab(tmp_path, monkeypatch)
  assert [(row["lr"], row["wd"], row["method"]) for row, *_ in rows] == [
    (lr, wd, "linear") for wd in (0.125, 0.25) for lr in (0.1, 0.01)
  ]
  assert [(metrics, status) for _, metrics, status in rows] == [
    ({}, "STATUS_FAILURE"),
    ({"val_accuracy": 0.625}, "STATUS_SUCCESS"),
    ({}, "STATUS_FAILURE"),
    ({"val_accuracy": 0.75}, "STATUS_SUCCESS"),
  ]
  # Started again, it adds what is missing and nothing twice.
  folder = tmp_path / "linear" / "search" / "hparams"
  removed = sorted(folder.iterdir())[0]
  assert removed.name.startswith("lr 0.01, wd 0.125 ")
  shutil.rmtree(removed)
  tune.run(config, tmp_path)
  assert (
    hparams_tab(tmp_path, monkeypatch) == rows
    and len(list(folder.rglob("events.*"))) == 4
  )


def test_without_tensorboard_no_trial_is_shown(install, tmp_path):
  install(best_at(0.01))
  tune.run(search_config(), tmp_path)
  assert not list(tmp_path.rglob("events.*"))

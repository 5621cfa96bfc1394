"""The protocol: choose on val, retrain on train + val, report test over seeds."""

import json
import statistics

from hypothesis import given
from hypothesis import strategies as st
import pytest
from tiny_training import make_data, tiny_config

from insvp_jax import config as config_lib
from insvp_jax import steps, trainer, tune
from insvp_jax.trainer import Diverged


def search_config(method="linear", **changes):
  lists = {"lr": (0.1, 0.01, 0.001), "wd": (0.0, 0.1), "seeds": (0, 1, 2)}
  changes = {f"tune__{name}": values for name, values in lists.items()} | changes
  return tiny_config(method, **changes)


class FakeTrainer:
  """Stands for `trainer.train`: remembers the runs, takes no time."""

  def __init__(self, val_accuracy, test_accuracy=lambda config: 0.5):
    self.val_accuracy = val_accuracy
    self.test_accuracy = test_accuracy
    self.runs = []

  def __call__(self, config, workdir, *, prepared=None, test=True):
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
      "data_sha256": trainer.data_digest(config, prepared.data, test)
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
  search, final = fake.runs[:6], fake.runs[6:]
  pairs = {(c.optim.lr, c.optim.wd) for c, *_ in search}
  assert pairs == {(lr, wd) for lr in (0.1, 0.01, 0.001) for wd in (0.0, 0.1)}
  # The search sees neither the test split nor a single image of val in training.
  assert all(not test for *_, test in search)
  assert {c.data.train_split for c, *_ in search} == {"train"}
  assert {c.seed for c, *_ in search} == {0}
  assert [c.seed for c, *_ in final] == [0, 1, 2]
  for config, _, prepared, test in final:
    assert test and config.data.train_split == "train_val"
    assert (config.optim.lr, config.optim.wd) == (0.01, 0.1)
    assert prepared.program.steps_per_epoch == 34 // 8
  workdirs = [workdir for _, workdir, *_ in fake.runs]
  assert len(set(workdirs)) == 9
  assert workdirs[0] == tmp_path / "linear" / "search" / "lr0.1_wd0"
  assert workdirs[-1] == tmp_path / "linear" / "seed2"
  assert (summary["lr"], summary["wd"]) == (0.01, 0.1)
  assert summary["seeds"] == [0, 1, 2]
  assert summary["test_accuracies"] == [0.5, 0.6, 0.7]
  assert summary["mean"] == pytest.approx(0.6)
  assert summary["std"] == pytest.approx(0.1)
  assert len(summary["trials"]) == 6
  assert {"lr": 0.01, "wd": 0.1, "val_accuracy": 0.9} in summary["trials"]


def test_the_compiled_step_is_shared_by_all_lrs_of_a_wd(install, tmp_path):
  fake = install(best_at(0.01))
  tune.run(search_config(), tmp_path)
  steps = {}
  for config, _, prepared, _ in fake.runs[:6]:
    steps.setdefault(config.optim.wd, set()).add(id(prepared.program.train_step))
  assert {wd: len(ids) for wd, ids in steps.items()} == {0.0: 1, 0.1: 1}
  assert len({id(p.program.train_step) for _, _, p, _ in fake.runs[6:]}) == 1
  assert len({id(p.data) for _, _, p, _ in fake.runs}) == 1


def test_a_config_that_trains_on_train_val_still_searches_on_train(install, tmp_path):
  fake = install(best_at(0.01))
  tune.run(search_config(data__train_split="train_val"), tmp_path)
  for config, _, prepared, _ in fake.runs[:6]:
    assert config.data.train_split == "train"
    assert prepared.program.steps_per_epoch == 24 // 8
  assert len({id(p.program) for _, _, p, _ in fake.runs[:6]}) == 2


accuracies = st.sampled_from([0.0, 0.25, 0.5, 1.0])
rates = st.sampled_from([0.0, 1e-4, 1e-3, 0.1, 3.0])
trial_lists = st.lists(
  st.fixed_dictionaries(
    {"lr": rates, "wd": rates, "val_accuracy": st.none() | accuracies}
  ),
  min_size=1,
)


@given(trial_lists)
def test_choose_takes_the_best_and_of_equals_the_smallest(trials):
  finished = [t for t in trials if t["val_accuracy"] is not None]
  if not finished:
    with pytest.raises(ValueError, match="every run of the search diverged"):
      tune.choose(trials)
    return
  chosen = tune.choose(trials)
  best = max(t["val_accuracy"] for t in finished)
  equals = [(t["lr"], t["wd"]) for t in finished if t["val_accuracy"] == best]
  assert (chosen["lr"], chosen["wd"]) == min(equals)
  assert chosen == tune.choose(trials[::-1])


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
  assert [(c.optim.lr, c.seed) for c, *_ in fake.runs] == [
    (0.02, 0),
    (0.02, 0),
    (0.01, 3),
  ]
  assert (again["lr"], again["seeds"]) == (0.01, [0, 1, 2, 3])


@pytest.mark.parametrize("what", ["config", "backbone", "data", "interrupted"])
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
  assert not fake.runs and not (tmp_path / "run").exists()


def test_a_task_without_test_is_trained_all_the_same(install, tmp_path):
  install(best_at(0.01), lambda config: None, without=("test",))
  summary = tune.run(search_config(), tmp_path)["linear"]
  assert (summary["mean"], summary["std"], summary["test_accuracies"]) == (
    None,
    None,
    [],
  )
  assert "| linear | - | 3 | 0.01 | 0.1 |" in (tmp_path / "table.md").read_text()


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


def test_methods_side_by_side_make_a_table(install, tmp_path, capsys):
  install(best_at(0.01), lambda c: 0.5 + 0.1 * c.seed + 0.2 * (c.method == "insvp"))
  methods = ("insvp", "linear")
  summary = tune.run(search_config(tune__methods=methods), tmp_path)
  assert tuple(summary) == methods
  assert json.loads((tmp_path / "summary.json").read_text()) == summary
  table = (tmp_path / "table.md").read_text()
  assert table == tune.format_table("insects", summary)
  rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.split("\n")]
  assert rows[0][:2] == ["insects", "test accuracy"]
  assert rows[2] == ["insvp", "80.00 ± 10.00", "3", "0.01", "0.1", "51", "2"]
  assert rows[3][:2] == ["linear", "60.00 ± 10.00"]
  assert capsys.readouterr().out.endswith(f"\n{table}\n")
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {*methods, "summary.json", "table.md"}


def test_a_wrong_field_of_the_last_method_shows_before_the_first_trains(
  install, tmp_path
):
  fake = install(best_at(0.01))
  methods = {"tune__methods": ("linear", "vpt_deep"), "vpt_deep__prompt_length": -1}
  with pytest.raises(ValueError, match="prompt_length is -1"):
    tune.run(search_config(**methods), tmp_path)
  with pytest.raises(ValueError, match="'vpt_dep'. Did you mean 'vpt_deep'"):
    tune.run(search_config(tune__methods=("linear", "vpt_dep")), tmp_path)
  assert not fake.runs


def test_without_lists_it_is_one_run(install, tmp_path, capsys):
  fake = install(best_at(0.01))
  result = tune.run(tiny_config("linear"), tmp_path)
  ((config, workdir, _, test),) = fake.runs
  assert (config.method, workdir, test) == ("linear", tmp_path, True)
  assert result["test_accuracy"] == 0.5
  assert capsys.readouterr().out == (
    "insects linear: val 40.00%, test 50.00%; 51 trainable parameters (5.10%), 2 s, "
    "8 images/s\n"
  )


def test_first_run_is_where_the_first_final_run_lies(tmp_path):
  assert tune.first_run(tiny_config("linear"), tmp_path, "linear") == tmp_path
  assert tune.first_run(tiny_config("linear"), tmp_path, "insvp") is None
  config = search_config(tune__methods=("insvp", "linear"), tune__seeds=(7, 8))
  assert tune.first_run(config, tmp_path, "linear") == tmp_path / "linear" / "seed7"


def test_a_real_search_compiles_the_step_once_and_repeats_nothing(
  monkeypatch, tmp_path, capsys
):
  traced = []
  original = steps.create_train_step

  def create_train_step(*args, **kwargs):
    step = original(*args, **kwargs)

    def train_step(state, batch):
      traced.append(batch["images"].shape)
      return step(state, batch)

    return train_step

  monkeypatch.setattr(steps, "create_train_step", create_train_step)
  monkeypatch.setattr(trainer, "load_data", lambda *_: make_data())
  lists = {"tune__lr": (0.0, 0.05), "tune__wd": (), "tune__seeds": (0, 1)}
  config = search_config(total_epochs=4.0, log_every_steps=100, **lists)
  summary = tune.run(config, tmp_path)["linear"]
  # One program for both lrs of the search, one for both seeds on train_val.
  assert traced == [(8, 16, 16, 3)] * 2
  results = [
    json.loads((tmp_path / "linear" / f"seed{s}" / "result.json").read_text())
    for s in (0, 1)
  ]
  assert summary["mean"] == statistics.mean(r["test_accuracy"] for r in results)
  assert all(r["train_split"] == "train_val" for r in results)
  assert [r["lr"] for r in results] == [summary["lr"]] * 2
  for path in (tmp_path / "linear" / "search").iterdir():
    found = json.loads((path / "result.json").read_text())
    assert found["test_accuracy"] is None and found["val_accuracy"] is not None
    assert "test_accuracy" not in (path / "metrics.jsonl").read_text()
  capsys.readouterr()
  monkeypatch.setattr(trainer, "train", pytest.fail)
  assert tune.run(config, tmp_path)["linear"] == summary

"""Grids, trial files that survive a kill, and the choice."""

import json

import pytest
from tiny_training import tiny_config

from insvp_jax import config as config_lib
from insvp_jax import config_checks, trees
from insvp_jax.methods import METHODS
from insvp_jax.search import trials
from insvp_jax.search.grids import GRIDS
from insvp_jax.train import optim


def grid_config(method="insvp", **changes):
  config = tiny_config(method)
  for name, values in changes.items():
    section = config.tune if name in config.tune else config.tune.grid
    section[name] = values
  return config


def test_a_point_has_each_number_and_the_lr_varies_first():
  config = grid_config(lr=(0.1, 0.2), wd=(0, 1), image_fusion=((1.0, 2.0), (1.0, 1.0)))
  points = trials.points(trials.grid_of(config, default=False))
  assert len(points) == 8
  assert list(points[0]) == ["lr", "wd", "image_fusion"]
  assert [(p["lr"], p["wd"]) for p in points[:4]] == [
    (0.1, 0.0),
    (0.2, 0.0),
    (0.1, 1.0),
    (0.2, 1.0),
  ]
  assert [p["image_fusion"] for p in points] == [(1.0, 2.0)] * 4 + [(1.0, 1.0)] * 4
  assert trials.point_text(points[0]) == "lr 0.1, wd 0, image_fusion (1.0, 2.0)"


def test_what_the_grid_leaves_out_is_the_config_s():
  config = grid_config("linear", wd=(0.5,))
  assert trials.grid_of(config, default=False) == {"wd": (0.5,), "lr": (0.01,)}


@pytest.mark.parametrize("method, name", GRIDS)
def test_a_method_s_own_grid_is_valid(method, name):
  config = grid_config(method)
  config.optim.name = name
  grid = GRIDS[method, name]
  assert trials.grid_of(config, default=True) == {"wd": grid.wd, "lr": grid.lr}
  assert METHODS[method] and name in optim.OPTIMIZERS
  for values in (grid.lr, grid.wd):
    assert list(values) == sorted(set(values)) and min(values) >= 0
  scaled = trials.scaled(config, default=True)
  assert scaled.optim.lr_scale_by_batch == grid.lr_scale_by_batch
  assert scaled.optim.head_lr == grid.head_lr
  if grid.head_lr:
    # One of the config's own stays.
    config.optim.head_lr = 0.5
    assert trials.scaled(config, default=True).optim.head_lr == 0.5
  # Only where it is asked for, and the config has none.
  config.optim.lr_scale_by_batch = 7
  assert trials.scaled(config, default=False) is config
  config.tune.lr = (0.1,)
  assert trials.grid_of(config, default=True)["lr"] == (0.1,)
  assert trials.scaled(config, default=True) is config


def test_every_method_has_a_grid_for_adamw():
  assert {method for method, name in GRIDS if name == "adamw"} == set(METHODS)
  # Several methods together have the first one's.
  both = trials.grid_of(grid_config("lora+insvp"), default=True)
  assert both == trials.grid_of(grid_config("lora"), default=True)


def test_vpt_s_own_grid_has_forty_points():
  config = grid_config("vpt_deep")
  config.optim.name = "sgd"
  assert len(trials.points(trials.grid_of(config, default=True))) == 40


def test_no_grid_at_all_is_one_line():
  config = grid_config("bias")
  config.optim.name = "sgd"
  message = r"the grid is empty: .*'bias' has no grid.*'sgd'. Give one, e.g. --config"
  with pytest.raises(ValueError, match=message):
    trials.grid_of(config, default=True)
  config.tune.wd = (0.1, 0.2)
  assert trials.grid_of(config, default=True)["lr"] == (0.01,)


def test_every_number_of_a_method_can_be_searched_for():
  numbers = {name for method in METHODS.values() for name in method.HPARAMS}
  assert numbers == set(config_lib.defaults().tune.grid)
  for name, method in METHODS.items():
    fields = config_lib.defaults().get(name, {})
    assert set(method.HPARAMS) <= set(fields)


def test_a_number_that_no_method_has_is_named_with_the_nearest():
  trials.check_keys(grid_config("insvp", image_fusion=((1.0, 1.0),)))
  several = grid_config("insvp", methods=("linear", "vpt_deep"), dropout=(0.1,))
  trials.check_keys(several)
  # Those that do not have it are searched without it.
  assert "dropout" not in trials.grid_of(trials.at(several, method="linear"), False)
  with pytest.raises(ValueError, match="grid.prompt_dropout .*Did you mean 'dropout'"):
    trials.check_keys(grid_config("vpt_deep", prompt_dropout=(0.1,)))
  with pytest.raises(ValueError, match="no hparam of linear. There are none."):
    trials.check_keys(grid_config("linear", dropout=(0.1,)))


@pytest.mark.parametrize(
  "key, value, message",
  [
    ("grid.dropout", ("high",), "config.tune.grid.dropout has 'high', expected num"),
    ("grid.dropout", (0.1, 0.1), "config.tune.grid.dropout.*twice"),
    ("select", "test", "config.tune.select is 'test', expected 'val'. The test split"),
    ("population", -1, "config.tune.population is -1"),
  ],
)
def test_wrong_values_are_named(key, value, message):
  config = tiny_config()
  section, _, field = key.rpartition(".")
  (config.tune[section] if section else config.tune)[field] = value
  with pytest.raises(ValueError, match=message):
    config_checks.validate(config)


def test_at_sets_a_point_s_numbers_where_they_belong():
  config = trials.at(
    tiny_config("linear"),
    method="insvp",
    lr=0.5,
    wd=0.25,
    seed=3,
    train_split="train_val",
    dropout=0.4,
    feature_fusion=[1.0, 2.0],
  )
  assert (config.method, config.seed) == ("insvp", 3)
  assert (config.optim.lr, config.optim.wd) == (0.5, 0.25)
  assert config.data.train_split == "train_val"
  assert config.insvp.dropout == 0.4 and config.insvp.feature_fusion == (1.0, 2.0)


def digest(config, names=("lr", "wd"), backbone=("id", "x"), data="d"):
  return trials.settings(config, names, dict([backbone]), data)


def test_the_settings_of_trials_are_what_shapes_them_but_their_points():
  base = digest(tiny_config())
  same = {
    "optim__lr": 0.5,
    "optim__wd": 0.5,
    "log_every_steps": 7,
    "eval_batch_size": 4,
  }
  same |= {"vpt_deep__prompt_length": 7, "tune__lr": (0.1,), "tune__seeds": (1,)}
  assert digest(tiny_config(**same)) == base
  others = {"seed": 1, "total_epochs": 3.0, "insvp__dropout": 0.3, "batch_size": 4}
  for name, value in others.items():
    assert digest(tiny_config(**{name: value})) != base, name
  assert digest(tiny_config(), backbone=("id", "y")) != base
  assert digest(tiny_config(), data="e") != base
  names = ("lr", "wd", "dropout")
  assert digest(tiny_config(insvp__dropout=0.3), names) == digest(tiny_config(), names)


def test_lines_are_found_again_and_half_a_line_costs_only_itself(tmp_path):
  path = tmp_path / "linear" / "trials.jsonl"
  assert trials.read(path, "s") == []
  first = {"lr": 0.1, "wd": 1e-4, "image_fusion": [1.0, 2.0], "settings": "s"}
  first["val_accuracy"] = 0.5
  trials.append(path, first)
  trials.append(path, {**first, "settings": "another"})
  whole = path.read_bytes()
  line = json.dumps({**first, "lr": 0.2}).encode() + b"\n"
  for length in (1, len(line) // 2, len(line) - 1):
    path.write_bytes(whole + line[:length])
    assert trials.read(path, "s") == [first] or length == len(line) - 1
    trials.append(path, {**first, "lr": 0.3})
    assert path.read_bytes().startswith(whole)
    found = trials.read(path, "s")
    assert [trial["lr"] for trial in found] == [0.1, 0.3]
    assert len(path.read_text().splitlines()) == 3
  point = {"lr": 0.1, "wd": 1e-4, "image_fusion": (1.0, 2.0)}
  assert trials.find(found, point) == first
  assert trials.find(found, {**point, "lr": 0.4}) is None
  assert trials.find(found, {**point, "dropout": 0.4}) is None


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
  (tmp_path / "file").write_text("kept")
  with pytest.raises(OSError, match="trials.jsonl could not be written"):
    trials.append(tmp_path / "file" / "trials.jsonl", {"lr": 0.1})


def test_equals_are_chosen_by_lr_then_wd_then_the_others():
  def trial(lr, wd, fusion, accuracy=0.5):
    return {"lr": lr, "wd": wd, "fusion": fusion, "val_accuracy": accuracy}

  names = ("lr", "wd", "fusion")
  found = [
    trial(0.2, 0.0, [1.0, 0.0]),
    trial(0.1, 0.2, [0.0, 0.0]),
    trial(0.1, 0.1, [1.0, 2.0]),
    trial(0.1, 0.1, [1.0, 1.0]),
    trial(0.0, 0.0, [0.0, 0.0], 0.4),
  ]
  assert trials.choose(found, names) == {"lr": 0.1, "wd": 0.1, "fusion": [1.0, 1.0]}
  assert trees.flatten({"a": trials.choose(found[:1], names)})["a/lr"] == 0.2


@pytest.mark.parametrize(
  "line", ['{"settings": "a"}', '{"settings": "a", "val_accuracy": "x"}', "[]", "3", ""]
)
def test_lines_that_are_no_trials_are_passed_over(tmp_path, line):
  path = tmp_path / trials.FILE
  trial = {"lr": 0.1, "val_accuracy": None, "settings": "a"}
  path.write_text(f"{line}\n{json.dumps(trial)}\n")
  assert trials.read(path, "a") == [trial]

"""Heads that train on cached features end as they would on images."""

import dataclasses
import json
import signal

import numpy as np
import pytest
from tiny_training import (
  SPLITS,
  assert_same,
  at_step,
  make_data,
  metrics,
  run_to_state,
  stop_by,
  stored,
  streamed,
  tiny_config,
  with_step,
)
from tiny_training import prepare as prepare_tiny

from insvp_jax import trees
from insvp_jax.checkpoints.files import find_steps, read_arrays
from insvp_jax.distributed.stopping import Stopped
from insvp_jax.methods import METHODS
from insvp_jax.methods.linear import Linear
from insvp_jax.search import population, trials, tune
from insvp_jax.train import features, trainer
from insvp_jax.train import program as program_lib
from insvp_jax.train.features import FeatureCache
from insvp_jax.train.trainer import prepare

CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(autouse=True)
def _data(monkeypatch):
  monkeypatch.setattr(trainer, "load_data", lambda *_: make_data())


def config_of(**changes):
  own = {"optim__eps": 1e-4, "eval_every_epochs": 1.0, "backbone__depth": 1}
  changes = {**own, **changes}
  return tiny_config("linear", **changes)


@pytest.fixture(scope="module")
def compiled():
  """Data and compiled steps, for cached features and for images."""
  return prepare_tiny(config_of())


@pytest.fixture
def fresh(compiled):
  """(the same without any features yet, sizes of the batches that it computes)."""
  return counted(compiled)


def counted(prepared):
  """Returns `prepared` without features, and a list of what it passes on."""
  sizes, step = [], prepared.program.feature_step

  def feature_step(params, batch):
    sizes.append(len(batch["labels"]))
    return step(params, batch)

  prepared = with_step(prepared, feature_step=feature_step)
  return dataclasses.replace(prepared, cache=FeatureCache()), sizes


def finished(config, workdir, prepared, monkeypatch):
  """Returns (parameters, metrics by line, result) of a run."""
  with monkeypatch.context() as patch:
    _, params = run_to_state(patch, config, workdir, prepared)
  result = json.loads((workdir / "result.json").read_text())
  return params, metrics(workdir), result


def load_arrays(workdir, item):
  return read_arrays(find_steps(workdir)[0], item)


def assert_alike(mine, theirs):
  """Asserts that two finished runs are the same, up to rounding."""
  for name, leaf in theirs[0].items():
    np.testing.assert_allclose(mine[0][name], leaf, err_msg=name, **CLOSE)
  for here, there in zip(mine[1], theirs[1], strict=True):
    assert here == pytest.approx(there, rel=1e-4, abs=1e-6)
  for name in ("val_accuracy", "test_accuracy", "num_test_examples", "steps"):
    assert mine[2][name] == theirs[2][name]


def test_cached_features_train_as_images_do(fresh, monkeypatch, tmp_path, capsys):
  prepared, sizes = fresh
  off = config_of(cache_features=False)
  plain = finished(off, tmp_path / "plain", prepared, monkeypatch)
  assert sizes == [] and "are computed once" not in capsys.readouterr().err
  cached = finished(config_of(), tmp_path / "cached", prepared, monkeypatch)
  assert_alike(cached, plain)
  said = capsys.readouterr().err
  assert "features of the 24 training images are computed once" in said
  # Once over each split, though val is evaluated after each epoch.
  assert len(sizes) == sum(-(-n // 8) for n in SPLITS.values())
  prepared = dataclasses.replace(
    prepared, data=streamed(make_data()), cache=FeatureCache()
  )
  stream = finished(config_of(), tmp_path / "stream", prepared, monkeypatch)
  assert_alike(stream, plain)
  mask = trees.flatten(prepared.program.mask)
  assert [n for n, chosen in mask.items() if chosen] == ["head/bias", "head/kernel"]
  assert np.abs(plain[0]["head/bias"]).max() > 1e-2


def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(
  fresh, monkeypatch, tmp_path
):
  prepared, sizes = fresh
  config = config_of(checkpoint_every_epochs=1.0, log_every_steps=2)
  trainer.train(config, tmp_path / "whole", prepared=prepared)
  with monkeypatch.context() as patch:
    at_step(patch, 4, stop_by(signal.SIGTERM))
    with pytest.raises(Stopped, match="SIGTERM at step 4"):
      trainer.train(config, tmp_path / "stopped", prepared=prepared)
  # A new process computes the features again.
  before = len(sizes)
  prepared = dataclasses.replace(prepared, cache=FeatureCache())
  trainer.train(config, tmp_path / "stopped", prepared=prepared)
  assert len(sizes) == 2 * before
  assert_same(stored(tmp_path / "stopped"), stored(tmp_path / "whole"))
  assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")


def test_too_many_features_are_computed_in_each_step(
  fresh, monkeypatch, tmp_path, capsys
):
  prepared, sizes = fresh
  config = config_of(data__resident_mb=0)
  assert features.are_constant(config, prepared.program)
  finished(config, tmp_path, prepared, monkeypatch)
  assert sizes == []
  assert "more than config.data.resident_mb = 0" in capsys.readouterr().err


class Tinted(Linear):
  """Has nothing to train but the head, and yet changes the images."""

  def prompt_image(self, images, *, train=False):
    return images + 0.1


@pytest.mark.parametrize(
  "method, changes, constant",
  [
    ("linear", {}, True),
    ("linear", {"data__preset": "insvp_release"}, False),
    ("linear", {"data__preset": "cifar"}, False),
    ("linear", {"loss__mixup_alpha": 0.1}, False),
    ("linear", {"loss__cutmix_alpha": 1.0}, False),
    ("bias", {}, False),
    ("full", {}, False),
    ("vpt_deep", {}, False),
    ("tinted", {}, False),
  ],
)
def test_features_are_constant_where_nothing_before_the_head_can_change(
  monkeypatch, method, changes, constant
):
  monkeypatch.setitem(METHODS, "tinted", Tinted)
  config = tiny_config(method, **changes)
  assert features.are_constant(config, prepare(config).program) == constant


def off(config):
  """Returns the config with nothing cached."""
  config = config.copy_and_resolve_references()
  config.cache_features = False
  return config


def test_all_trials_and_seeds_of_a_search_share_one_pass(
  compiled, monkeypatch, tmp_path
):
  config = config_of()
  params = compiled.first_params(trials.at(config, seed=7))
  # As if they had been loaded.
  identity = {"id": "test", "sha256": "7"}
  prepared, sizes = counted(
    dataclasses.replace(compiled, weights=params["backbone"], backbone=identity)
  )
  configs = [trials.at(config, lr=lr) for lr in (0.01, 0.05)]
  program = population.stack_program(prepared.program)
  program.__dict__["feature_step"] = prepared.program.feature_step
  stacked = dataclasses.replace(prepared, program=program)
  for _ in range(2):
    tune.train_trials(configs, stacked, params, tmp_path / "search", "test")
  passes = sum(-(-SPLITS[name] // 8) for name in ("train", "val"))
  assert len(sizes) == passes
  for seed in (3, 4):
    member = trials.at(config, seed=seed)
    result = trainer.train(member, tmp_path / str(seed), prepared=prepared)
  assert len(sizes) == passes + -(-SPLITS["test"] // 8)
  params, _, expected = finished(
    off(member), tmp_path / "images", prepared, monkeypatch
  )
  assert result["test_accuracy"] == expected["test_accuracy"]
  head = load_arrays(tmp_path / "4", "adapter")
  for name in ("head/kernel", "head/bias"):
    np.testing.assert_allclose(head[name], params[name], **CLOSE)


def test_backbones_of_their_own_are_not_mistaken_for_each_other(
  fresh, monkeypatch, tmp_path
):
  prepared, sizes = fresh
  configs = [trials.at(config_of(), seed=seed) for seed in (0, 1)]
  for each in configs:
    workdir = tmp_path / str(each.seed)
    cached = finished(each, workdir, prepared, monkeypatch)
  assert len(sizes) == 2 * sum(-(-n // 8) for n in SPLITS.values())
  plain = finished(off(configs[1]), tmp_path / "plain", prepared, monkeypatch)
  assert_alike(cached, plain)


def test_the_oldest_features_make_room_for_new_ones(fresh):
  prepared, _ = fresh
  config = config_of()
  params = program_lib.create_state(
    config, prepared.program, prepared.first_params(config)
  ).params
  one = features.nbytes(prepared.program, len(prepared.data.splits["train"]))
  first = prepared.features(config, "train", params)
  assert prepared.features(config, "train", params) is first
  assert first["features"].shape == (24, 16) and one == 24 * 16 * 4
  prepared.cache._make_room(one)
  assert prepared.features(config, "train", params) is first
  prepared.cache._make_room(one - 1)
  assert prepared.features(config, "train", params) is not first


def test_trials_that_train_together_end_as_they_would_on_images(compiled, tmp_path):
  ends = []
  program = population.stack_program(compiled.program)
  stacked = dataclasses.replace(compiled, program=program)
  params = compiled.first_params(config_of())
  for cached in (True, False):
    config = config_of(cache_features=cached)
    points = [{"lr": lr, "wd": wd} for lr in (0.01, 0.05) for wd in (0.0, 0.5)]
    configs = [trials.at(config, **point) for point in points]
    workdir = tmp_path / str(cached)
    ends.append(tune.train_trials(configs, stacked, params, workdir, "test"))
  assert len({outcome["val_loss"] for outcome in ends[0]}) == 4
  for cached, on_images in zip(*ends, strict=True):
    assert cached["val_accuracy"] == on_images["val_accuracy"]
    assert cached["val_loss"] == pytest.approx(on_images["val_loss"], rel=1e-5)

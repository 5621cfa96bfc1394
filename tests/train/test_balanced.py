"""Balanced sampling: one order of images, however a run is divided, fed or resumed."""

import dataclasses
import signal

import jax
import numpy as np
import pytest
from tiny_training import (
  CLASSES,
  assert_same,
  at_step,
  make_data,
  metrics,
  prepare,
  stop_by,
  stored,
  streamed,
  tiny_config,
)

from insvp_jax import config_checks, config_variants, trees
from insvp_jax.data import ArraySplit
from insvp_jax.distributed.stopping import Stopped
from insvp_jax.search import population, trials
from insvp_jax.train import trainer
from insvp_jax.train.trainer import train


def unbalanced():
  """Returns a task of 16, 6 and 2 training images of its classes."""
  data = make_data()
  labels = np.repeat(np.arange(3, dtype=np.int32), (16, 6, 2))
  train = ArraySplit(data.splits["train"].images, labels)
  return dataclasses.replace(data, splits={**data.splits, "train": train})


def config_of(**changes):
  """Returns a config of 7 steps, of which 3 are an epoch, with crops and mixing."""
  own = {"data__sampling": "balanced", "data__preset": "cifar", "total_steps": 7}
  own |= {"steps_per_call": 1, "backbone__depth": 1}
  return tiny_config("linear", **{**own, "loss__mixup_alpha": 0.8, **changes})


@pytest.fixture(scope="module")
def prepared():
  return prepare(config_of(), unbalanced())


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
  """The workdir of a run that takes its steps one by one."""
  workdir = tmp_path_factory.mktemp("whole")
  train(config_of(), workdir, prepared=prepared)
  return workdir


def test_killed_and_resumed_equals_uninterrupted(
  prepared, whole, monkeypatch, tmp_path
):
  at_step(monkeypatch, 4, stop_by(signal.SIGTERM))
  with pytest.raises(Stopped):
    train(config_of(), tmp_path, prepared=prepared)
  monkeypatch.undo()
  train(config_of(), tmp_path, prepared=prepared)
  assert_same(stored(tmp_path), stored(whole))
  assert metrics(tmp_path) == metrics(whole)


def test_a_stream_gives_the_same_bits(prepared, whole, tmp_path):
  train(
    config_of(),
    tmp_path,
    prepared=dataclasses.replace(prepared, data=streamed(prepared.data)),
  )
  assert_same(stored(tmp_path), stored(whole))


def test_many_steps_in_a_call_see_the_same_images(prepared, whole, tmp_path):
  # Another program, so that the last bits may differ; the images are the same.
  train(config_of(steps_per_call=200, log_every_steps=3), tmp_path, prepared=prepared)
  many, single = (trees.flatten(stored(place)[3]) for place in (tmp_path, whole))
  for name, leaf in single.items():
    np.testing.assert_allclose(many[name], leaf, rtol=1e-3, atol=1e-5, err_msg=name)


def test_what_is_shown_is_balanced_and_said(prepared, tmp_path, capsys):
  seen = []
  step = prepared.program.train_step

  def counting(state, batch):
    seen.extend(np.asarray(batch["labels"]).tolist())
    return step(state, batch)

  program = dataclasses.replace(prepared.program)
  program.__dict__["train_step"] = counting
  train(config_of(), tmp_path, prepared=dataclasses.replace(prepared, program=program))
  assert np.bincount(seen[:48]).tolist() == [16, 16, 16]  # of two epochs
  said = "balanced sampling: 8 images of each class an epoch, of 2 to 16 that there are"
  assert said in capsys.readouterr().err


def test_trials_that_train_together_see_the_same_images(tmp_path):
  changes = {"data__sampling": "balanced", "total_steps": 7, "backbone__depth": 1}
  config = tiny_config("linear", **changes)
  prepared = prepare(config, unbalanced())
  ends = []
  for lrs in ((0.01,), (0.01, 0.05)):
    configs = [trials.at(config, lr=lr) for lr in lrs]
    params = prepared.first_params(config)
    stacked = population.stack_program(prepared.program)
    state = population.stack_state(configs, stacked, params)
    arrays = prepared.features(config, "train", state.params)
    state, _ = stacked.multi_step(state, arrays, np.uint32(0), np.int32(7))
    ends.append(jax.device_get(state.params["head"]["kernel"][0]))
  np.testing.assert_allclose(*ends, rtol=1e-5, atol=1e-7)


def test_a_run_on_unequal_classes_says_what_accuracy_hides(tmp_path):
  config = tiny_config("linear", total_steps=1, backbone__depth=1)
  data = unbalanced()
  splits = {**data.splits, "test": data.splits["train"]}
  data = dataclasses.replace(data, splits=splits)
  config.data.ordered = True
  result = train(config, tmp_path, prepared=prepare(config, data))
  by_class = result["test_by_class"]
  assert set(by_class) >= {"balanced_accuracy", "macro_f1", "quadratic_kappa"}
  line = trainer.report.result_line(result)
  assert f"macro-F1 {100 * by_class['macro_f1']:.2f}%" in line
  kappa = by_class["quadratic_kappa"]
  assert kappa is None or f"quadratic kappa {kappa:.3f}" in line
  assert by_class["worst_class"]["name"] in CLASSES


def test_rows_of_a_search_may_differ_in_it():
  assert not config_variants.is_shared("data.sampling")
  assert config_variants.is_shared("data.split_seed")
  assert config_variants.is_shared("data.sampling_of_another_kind")


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"data__sampling": "even"}, "data.sampling is 'even', expected 'uniform' or"),
    (
      {"data__sampling": "balanced", "loss__class_weights": True},
      "both together would favour the small ones",
    ),
  ],
)
def test_what_cannot_be_combined_is_one_line(changes, message):
  with pytest.raises(ValueError, match=message):
    config_checks.validate(tiny_config(**changes))

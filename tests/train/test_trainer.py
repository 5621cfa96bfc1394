"""The loop on small images: what it writes, what it changes, how it stops."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import (
  CLASSES,
  SIZE,
  SPLITS,
  assert_same,
  at_step,
  make_data,
  metrics,
  prepare,
  run_to_state,
  stop_by,
  stored,
  stored_events,
  tiny_config,
  with_step,
)

from insvp_jax import trees
from insvp_jax.checkpoints.files import find_steps
from insvp_jax.config import to_dict
from insvp_jax.data import ArraySplit, preprocess
from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.distributed.stopping import Stopped
from insvp_jax.logs import prompt_panels
from insvp_jax.methods import METHODS, Method
from insvp_jax.run import load_run
from insvp_jax.train import report, trainer
from insvp_jax.train import state as state_lib
from insvp_jax.train.state import TrainState
from insvp_jax.train.timing import Profiler
from insvp_jax.train.trainer import Diverged, train

TOTAL = 6  # steps of `tiny_config`: 2 epochs of 3
RESULT_KEYS = (
  "task method preset seed val_accuracy test_accuracy num_test_examples "
  "num_train_examples backbone_params "
  "trainable_params prompter_params backbone train_seconds images_per_second versions "
  "compile_seconds input_wait_seconds feature_seconds step_seconds "
  "peak_host_mb peak_device_mb"
).split()

# What of a result depends on the machine and the moment.
MEASURED = {key for key in RESULT_KEYS if key.endswith(("_seconds", "_second", "_mb"))}


def config_of(method="insvp", **changes):
  """Evaluates every step, saves every other one."""
  every = {"eval_every_epochs": 1 / 3, "checkpoint_every_epochs": 2 / 3}
  # No decay, which moves leaves that no gradient reaches. The large eps keeps AdamW
  # from making steps out of the rounding errors of gradients that should be 0.
  return tiny_config(
    method, **{**every, "optim__wd": 0.0, "optim__eps": 1e-5, **changes}
  )


@functools.cache
def drawn_backbone():
  model = prepare(config_of("linear")).program.model
  return state_lib.init_params(model, 0)["backbone"]


def with_backbone(prepared):
  """Returns `prepared` as if weights had been loaded: drawing them takes longest."""
  identity = {"id": "drawn", "sha256": "0"}
  return dataclasses.replace(prepared, weights=drawn_backbone(), backbone=identity)


@pytest.fixture(scope="module")
def insvp():
  """The data and the compiled steps that many tests share."""
  return prepare(config_of())


@pytest.fixture(scope="module")
def linear():
  """The same of a method that compiles quickly."""
  return prepare(config_of("linear"))


@pytest.fixture(scope="module")
def whole(insvp, tmp_path_factory):
  """An uninterrupted run: (workdir, result)."""
  workdir = tmp_path_factory.mktemp("whole")
  return workdir, train(config_of(), workdir, prepared=insvp)


def test_the_result_says_all_that_was_promised(insvp, whole):
  workdir, result = whole
  assert json.loads((workdir / "result.json").read_text()) == result
  assert not set(RESULT_KEYS) - set(result)
  expected = {
    "task": "insects",
    "method": "insvp",
    "preset": "vtab",
    "seed": 0,
    "num_test_examples": SPLITS["test"],
    "num_train_examples": SPLITS["train"],
    "steps": TOTAL,
    "train_split": "train",
  }
  assert expected.items() <= result.items()
  random = {"id": "random", "seed": 0, "init": "default"}
  assert random.items() <= result["backbone"].items()
  assert len(result["backbone"]["sha256"]) == 64
  for split in ("val", "test"):
    correct = result[f"{split}_accuracy"] * SPLITS[split]
    assert correct == pytest.approx(round(correct), abs=1e-9)
    assert 0 <= result[f"{split}_accuracy"] <= 1
  shapes = state_lib.param_shapes(insvp.program.model)
  trainable, _ = trees.split(shapes, insvp.program.mask)
  head = trees.count(shapes["head"])
  assert head == 16 * len(CLASSES) + len(CLASSES)
  assert result["trainable_params"] == trees.count(trainable)
  assert result["prompter_params"] == trees.count(trainable) - head
  assert result["total_params"] == trees.count(shapes)
  assert result["train_seconds"] > result["compile_seconds"] > 0
  assert min(result[k] for k in ("images_per_second", "step_seconds")) > 0
  assert result["input_wait_seconds"] > 0 and result["peak_host_mb"] > 50
  assert result["peak_device_mb"] is None  # of a CPU
  assert {"jax", "flax"} <= set(result["versions"])


def test_the_workdir_holds_config_metrics_and_the_last_two_checkpoints(whole):
  workdir, result = whole
  names = {"config.json", "metrics.jsonl", "parameters.txt", "checkpoints"}
  names |= {"result.json"}
  assert {path.name for path in workdir.iterdir()} == names
  assert json.loads((workdir / "config.json").read_text()) == to_dict(config_of())
  checkpoints = sorted(path.name for path in (workdir / "checkpoints").iterdir())
  assert checkpoints == [str(TOTAL - 2), str(TOTAL)]
  rows = metrics(workdir)
  trained = [row for row in rows if "loss" in row]
  assert [row["step"] for row in trained] == list(range(1, TOTAL + 1))
  assert trained[0]["lr"] == pytest.approx(0.01)
  assert trained[3]["lr"] == pytest.approx(0.005)
  assert [row["step"] for row in rows if "val_accuracy" in row] == [1, 2, 3, 4, 5, 6]
  assert rows[-1]["test_accuracy"] == result["test_accuracy"]
  assert sum("test_accuracy" in row for row in rows) == 1


def test_the_run_loads_and_predicts_as_it_was_evaluated(insvp, whole):
  workdir, result = whole
  run = load_run(workdir)
  assert (run.class_names, run.result) == (CLASSES, result)
  test = insvp.data.splits["test"]
  predicted = run.predict(test.images).argmax(-1)
  assert float(np.mean(predicted == test.labels)) == result["test_accuracy"]


# For every method, without the trainer: test_every_method.py.
@pytest.mark.parametrize("method, head_init", [("insvp", "zeros"), ("linear", "torch")])
def test_frozen_stays_bit_for_bit_and_trainable_moves_within_two_steps(
  insvp, linear, monkeypatch, tmp_path, method, head_init
):
  # One step a call, so that each can be looked at.
  config = config_of(method, head_init=head_init, steps_per_call=1)
  prepared = {"insvp": insvp, "linear": linear}[method]
  program = prepared.program
  if program.model.head.initializer != head_init:
    # The head's initial values are no part of what is compiled, but for the draws.
    model = program.model
    model = model.clone(head=model.head.clone(initializer=head_init))
    draws = state_lib.Draws(model)
    program = dataclasses.replace(program, model=model, draws=draws)
    prepared = with_backbone(dataclasses.replace(prepared, program=program))
  states = []
  step = program.train_step

  def train_step(state, batch):
    states.append(jax.device_get(trees.flatten(state.params)))
    return step(state, batch)

  train(config, tmp_path, prepared=with_step(prepared, train_step=train_step))
  first, third, last = states[0], states[2], states[-1]
  assert first["head/kernel"].any() == (head_init == "torch")
  mask = trees.flatten(program.mask)
  assert set(mask.values()) == {True, False}
  for name, trainable in mask.items():
    if trainable:
      assert first[name].tobytes() != third[name].tobytes(), f"{name} did not move"
    else:
      assert first[name].tobytes() == last[name].tobytes(), f"{name} has moved"


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
  insvp, whole, tmp_path
):
  train(config_of(), tmp_path / "again", prepared=insvp)
  assert_same(stored(tmp_path / "again"), stored(whole[0]))
  assert metrics(tmp_path / "again") == metrics(whole[0])
  train(config_of(seed=1), tmp_path / "other", prepared=insvp)
  a, b = (stored(w)[3]["adapter"] for w in (whole[0], tmp_path / "other"))
  assert all(np.asarray(a[n]).tobytes() != np.asarray(b[n]).tobytes() for n in a)


@pytest.mark.parametrize("step", [1, TOTAL])
def test_stopped_and_resumed_equals_uninterrupted(
  insvp, whole, monkeypatch, tmp_path, step
):
  with monkeypatch.context() as patch:
    at_step(patch, step, stop_by(signal.SIGTERM))
    with pytest.raises(Stopped, match=f"SIGTERM at step {step}; the ch") as stopped:
      train(config_of(), tmp_path, prepared=insvp)
  assert stopped.value.exit_status == 42
  assert find_steps(tmp_path)[0].name == str(step)
  assert not (tmp_path / "result.json").exists()
  result = train(config_of(), tmp_path, prepared=insvp)
  assert_same(stored(tmp_path), stored(whole[0]))
  assert metrics(tmp_path) == metrics(whole[0])
  assert {k: v for k, v in result.items() if k not in MEASURED} == {
    k: v for k, v in whole[1].items() if k not in MEASURED
  }


def test_killed_and_resumed_equals_uninterrupted(insvp, whole, monkeypatch, tmp_path):
  def die():
    raise RuntimeError("power cut")

  with monkeypatch.context() as patch:
    at_step(patch, 5, die)
    with pytest.raises(RuntimeError, match="power cut"):
      train(config_of(), tmp_path, prepared=insvp)
  # Step 5 was not saved: it is trained again from the checkpoint of step 4.
  assert [row["step"] for row in metrics(tmp_path)][-1] == 4
  assert find_steps(tmp_path)[0].name == "4"
  train(config_of(), tmp_path, prepared=insvp)
  assert_same(stored(tmp_path), stored(whole[0]))
  assert metrics(tmp_path) == metrics(whole[0])


@pytest.mark.parametrize(
  ("method", "leaf"),
  [("mlp", "head/BatchNorm_1/var"), ("transhp", "prompter/hierarchy")],
)
def test_what_no_gradient_sets_survives_a_stop(method, leaf, monkeypatch, tmp_path):
  """Running statistics, which steps set, and what is computed before the first one."""
  config = config_of(method)
  prepared = with_backbone(prepare(config))
  prepares = []
  original = trainer.Prepared.prepare_params

  def count(self, *args):
    prepares.append(original(self, *args))
    return prepares[-1]

  monkeypatch.setattr(trainer.Prepared, "prepare_params", count)
  train(config, tmp_path / "whole", prepared=prepared)
  with monkeypatch.context() as patch:
    at_step(patch, 3, stop_by(signal.SIGTERM))
    with pytest.raises(Stopped):
      train(config, tmp_path / "stopped", prepared=prepared)
  train(config, tmp_path / "stopped", prepared=prepared)
  assert_same(stored(tmp_path / "stopped"), stored(tmp_path / "whole"))
  # A run that goes on computes nothing of the images again.
  assert len(prepares) == 2
  start = trees.flatten(prepared.first_params(config))[leaf]
  end = stored(tmp_path / "whole")[3]["adapter"][leaf]
  assert not np.array_equal(start, end)
  if method == "transhp":
    # All three classes have images, and fall into two coarse ones.
    assert sorted(set(np.asarray(end)[0].tolist())) == [0.0, 1.0]
    np.testing.assert_array_equal(end, prepares[0]["prompter"]["hierarchy"])


class Remember(Method):
  """Scales the feature by the share of training images that were right lately."""

  def setup(self):
    self.share = self.param("share", nn.initializers.zeros, ())
    self.times = self.param("times", nn.initializers.zeros, ())

  def adapt_feature(self, feature, images, *, train=False):
    return feature * (1 + self.share)

  def trainable_patterns(self):
    return ("head/.*",)

  def updated_patterns(self):
    return ("prompter/(share|times)",)

  def refresh_every_epochs(self):
    return 1

  def refresh(self, params, batches, apply):
    right = total = 0.0
    for batch in batches():
      logits = np.asarray(apply.logits(params, batch["images"]))
      right += ((logits.argmax(-1) == batch["labels"]) * batch["mask"]).sum()
      total += batch["mask"].sum()
    times = params["prompter"]["times"] + 1
    own = {"share": np.float32(right / total), "times": times}
    return {**params, "prompter": own}


@pytest.mark.parametrize("steps_per_call", [1, 8])
def test_what_is_computed_anew_each_epoch_survives_a_stop(
  steps_per_call, monkeypatch, tmp_path
):
  monkeypatch.setitem(METHODS, "remember", Remember)
  config = config_of("remember", steps_per_call=steps_per_call)
  # A call of several steps ends with the epoch by itself.
  config.eval_every_epochs = config.checkpoint_every_epochs = 0.0
  config.log_every_steps = 100
  prepared = with_backbone(prepare(config))
  train(config, tmp_path / "whole", prepared=prepared)
  adapter = stored(tmp_path / "whole")[3]["adapter"]
  # Before each of the two epochs.
  assert adapter["prompter/times"] == 2 and 0 < adapter["prompter/share"] <= 1
  for step in (3, 4):
    workdir = tmp_path / f"stopped{step}"
    with monkeypatch.context() as patch:
      at_step(patch, step, stop_by(signal.SIGTERM))
      with pytest.raises(Stopped):
        train(config, workdir, prepared=prepared)
    train(config, workdir, prepared=prepared)
    assert_same(stored(workdir), stored(tmp_path / "whole"))


def test_a_real_ctrl_c_writes_a_checkpoint_and_leaves_the_handlers(
  insvp, monkeypatch, tmp_path
):
  before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
  at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
  with pytest.raises(Stopped, match="SIGINT") as stopped:
    train(config_of(), tmp_path, prepared=insvp)
  assert stopped.value.exit_status == 130
  # Python runs the handler a little after the signal came.
  assert find_steps(tmp_path)[0].name in ("2", "3")
  assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_after_the_last_step_keeps_the_result_and_still_stops(
  insvp, monkeypatch, tmp_path
):
  original = report.result

  def result(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)
    return original(*args, **kwargs)

  monkeypatch.setattr(report, "result", result)
  with pytest.raises(Stopped, match=f"at step {TOTAL}"):
    train(config_of(), tmp_path, prepared=insvp)
  assert json.loads((tmp_path / "result.json").read_text())["steps"] == TOTAL


def test_a_finished_run_is_only_evaluated_again(insvp, whole, monkeypatch, tmp_path):
  shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
  before = stored(tmp_path)
  prepared = with_step(insvp, train_step=None, multi_step=None)
  # What does not shape the result may differ: here, what is logged.
  again = train(config_of(log_every_steps=7), tmp_path, prepared=prepared)
  assert_same(stored(tmp_path), before)
  assert again["test_accuracy"] == whole[1]["test_accuracy"]


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"optim__lr": 0.02}, "config.optim.lr is 0.02, was 0.01"),
    ({"total_epochs": 3.0}, "config.total_epochs is 3.0, was 2.0"),
    ({"batch_size": 4}, "config.batch_size is 4, was 8"),
    ({"seed": 1}, "config.seed is 1, was 0; the backbone is .*seed 1.*seed 0"),
    (
      {"insvp__dropout": 0.2, "optim__wd": 0.5, "tensorboard": True},
      "config.insvp.dropout is 0.2, was None; config.optim.wd is 0.5, was 0.0",
    ),
  ],
)
def test_a_workdir_of_other_settings_is_refused_and_left_alone(
  insvp, whole, changes, message
):
  workdir = whole[0]
  before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
  with pytest.raises(ValueError, match=f"{message}.*[Uu]se another workdir"):
    train(config_of(**changes), workdir, prepared=insvp)
  assert {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()} == before


def broken_after(prepared, step, **values):
  """Returns `prepared` whose train step reports `values` from a step on.

  It is the step of runs with one a call.
  """
  calls = []

  def train_step(state, batch):
    calls.append(int(state.step) + 1)
    state, found = prepared.program.train_step(state, batch)
    wrong = {name: jnp.float32(value) for name, value in values.items()}
    return state, ({**found, **wrong} if calls[-1] >= step else found)

  return with_step(prepared, train_step=train_step), calls


@pytest.mark.parametrize("name", ["loss", "grad_norm", "param_norm"])
def test_nan_stops_at_once_and_keeps_the_last_good_checkpoint(insvp, tmp_path, name):
  prepared, calls = broken_after(insvp, 4, **{name: np.nan})
  config = config_of(
    checkpoint_every_epochs=1 / 3, log_every_steps=100, steps_per_call=1
  )
  message = f"the {name} is nan at step 4. Lower .* The checkpoint of step 3 is kept"
  with pytest.raises(Diverged, match=message):
    train(config, tmp_path, prepared=prepared)
  assert calls == [1, 2, 3, 4]
  assert find_steps(tmp_path)[0].name == "3"
  assert not (tmp_path / "result.json").exists()
  adapter = stored(tmp_path)[3]["adapter"]
  assert len(adapter) > 4 and all(np.isfinite(x).all() for x in adapter.values())
  if name == "loss":  # which of them it was does not matter to who loads
    load_run(tmp_path)
  assert max(row["step"] for row in metrics(tmp_path)) == 3


def test_between_two_looks_at_the_loss_nan_costs_one_step(insvp, tmp_path):
  prepared, calls = broken_after(insvp, 2, loss=np.inf)
  rare = {"checkpoint_every_epochs": 0.0, "eval_every_epochs": 0.0, "steps_per_call": 1}
  with pytest.raises(Diverged, match="the loss is inf at step 2.*No checkpoint yet"):
    train(config_of(log_every_steps=100, **rare), tmp_path, prepared=prepared)
  assert calls == [1, 2, 3]


def test_an_absurd_lr_is_diverged_before_anything_is_saved(insvp, tmp_path):
  with pytest.raises(Diverged, match=r"now 1e\+30"):
    train(config_of(optim__lr=1e30), tmp_path, prepared=insvp)
  assert not list((tmp_path / "checkpoints").iterdir())


def test_four_devices_train_and_evaluate_as_one(insvp, whole, monkeypatch, tmp_path):
  four = prepare(config_of(), devices=4)
  assert (insvp.program.mesh.size, four.program.mesh.size) == (1, 4)
  _, params = run_to_state(monkeypatch, config_of(), tmp_path, four)
  adapter = stored(whole[0])[3]["adapter"]
  moved = 0.0
  for name, leaf in adapter.items():
    np.testing.assert_allclose(leaf, params[name], atol=2e-4, err_msg=name)
    moved = max(moved, float(np.abs(leaf).max()))
  assert moved > 0.01
  for here, there in zip(metrics(tmp_path), metrics(whole[0]), strict=True):
    assert here["step"] == there["step"]
    if "loss" in here:
      assert here["loss"] == pytest.approx(there["loss"], rel=1e-4)
  for split in ("val", "test", "train"):
    found = set()
    # Each size compiles two programs.
    for batch_size in (1, 3, 8, 64) if split == "test" else (8,):
      config = config_of(eval_batch_size=batch_size)
      for prepared in (insvp, four):
        state = TrainState(0, trees.unflatten(params), None, None, None)
        sums = prepared.evaluate(config, split, state)
        found.add((sums["num_correct"], sums["num_examples"]))
    assert len(found) == 1, found
    assert found.pop()[1] == SPLITS[split]


def test_accumulated_gradients_equal_a_larger_batch(monkeypatch, tmp_path):
  changes = {"optim__name": "sgd", "optim__momentum": 0.9, "optim__lr": 0.5}
  finals = []
  for batch_size, accumulate in ((8, 1), (4, 2)):
    config = tiny_config(
      "linear", batch_size=batch_size, optim__accumulate_steps=accumulate, **changes
    )
    with monkeypatch.context() as patch:
      workdir = tmp_path / str(batch_size)
      before, after = run_to_state(patch, config, workdir, prepare(config))
    finals.append(after)
    assert np.abs(after["head/kernel"] - before["head/kernel"]).max() > 0.01
  for name in ("head/kernel", "head/bias"):
    np.testing.assert_allclose(finals[0][name], finals[1][name], atol=1e-5)


def test_bfloat16_compute_and_storage_stay_finite(monkeypatch, tmp_path):
  low = {"backbone__dtype": "bfloat16", "backbone__frozen_dtype": "bfloat16"}
  # A frozen prompter is small, and stored with the run: it stays as it is.
  config = tiny_config("insvp", insvp__train_specific=False, **low)
  prepared = prepare(config)
  _, after = run_to_state(monkeypatch, config, tmp_path, prepared)
  assert not trees.flatten(prepared.program.mask)[
    "prompter/specific_prompter/Conv_0/bias"
  ]
  for name in trees.flatten(prepared.program.mask):
    is_backbone = name.startswith("backbone/")
    assert after[name].dtype == (jnp.bfloat16 if is_backbone else jnp.float32), name
    assert np.isfinite(after[name].astype(np.float32)).all(), name
  losses = [row["loss"] for row in metrics(tmp_path) if "loss" in row]
  assert len(losses) == TOTAL and np.isfinite(losses).all()
  run = load_run(tmp_path)
  assert run.params["backbone"]["cls"].dtype == jnp.bfloat16
  assert np.isfinite(run.predict(prepared.data.splits["test"].images)).all()


def test_after_train_val_no_val_accuracy_is_reported(tmp_path):
  config = config_of("linear", data__train_split="train_val")
  prepared = prepare(config)
  assert prepared.program.steps_per_epoch == (SPLITS["train"] + SPLITS["val"]) // 8
  result = train(config, tmp_path, prepared=prepared)
  assert result["val_accuracy"] is None
  assert result["test_accuracy"] is not None
  assert not any("val_accuracy" in row for row in metrics(tmp_path))


class Untouchable(ArraySplit):
  """A split that may be counted, and nothing else, once it is sealed."""

  sealed = False

  def __getattribute__(self, name):
    if name in ("images", "labels", "take") and type(self).sealed:
      raise AssertionError(f"the test split was touched: {name}")
    return super().__getattribute__(name)

  def __len__(self):
    return SPLITS["test"]


def test_without_test_the_test_split_is_never_touched(linear, tmp_path, monkeypatch):
  data = make_data()
  test = data.splits["test"]
  splits = {**data.splits, "test": Untouchable(test.images, test.labels)}
  data = dataclasses.replace(data, splits=splits)
  monkeypatch.setattr(Untouchable, "sealed", True)
  config = config_of("linear")
  prepared = dataclasses.replace(linear, data=data)
  result = train(config, tmp_path / "search", prepared=prepared, test=False)
  assert (result["test_accuracy"], result["num_test_examples"]) == (None, 0)
  assert result["val_accuracy"] is not None
  assert not any("test_accuracy" in row for row in metrics(tmp_path / "search"))
  with pytest.raises(AssertionError, match="the test split was touched"):
    train(config, tmp_path / "final", prepared=prepared)


def test_a_task_without_val_or_test_trains(linear, tmp_path):
  data = make_data(without=("val", "test", "train_val"))
  prepared = dataclasses.replace(linear, data=data)
  result = train(config_of("linear"), tmp_path, prepared=prepared)
  assert (result["val_accuracy"], result["test_accuracy"]) == (None, None)


def test_random_weights_are_those_of_the_seed_also_after_loading(
  linear, monkeypatch, tmp_path
):
  """A search prepares once, with the config's seed, and then trains other seeds."""
  config = config_of("linear", seed=3, tensorboard=True)
  _, after = run_to_state(monkeypatch, config, tmp_path, linear)
  loaded = jax.device_get(trees.flatten(load_run(tmp_path).params))
  for name, leaf in after.items():
    np.testing.assert_array_equal(loaded[name], leaf, err_msg=name)
  # TensorBoard's files are there where they were asked for.
  assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


def shown(workdir):
  """Returns the names of what TensorBoard shows beside scalars."""
  values = [v for e in stored_events(workdir) for v in e.summary.value]
  return {v.tag for v in values if not v.HasField("simple_value")}


def test_tensorboard_shows_the_config_and_the_prompts_of_final_runs(
  insvp, linear, tmp_path
):
  config = config_of(tensorboard=True)
  train(config, tmp_path / "insvp", prepared=insvp)
  panels = {f"prompts/{i}" for i in range(4)}
  assert shown(tmp_path / "insvp") == {"config"} | panels
  values = [v for e in stored_events(tmp_path / "insvp") for v in e.summary.value]
  image = next(v.image for v in values if v.tag == "prompts/0")
  # The image, three prompts and the prompted image, side by side.
  assert (image.height, image.width) == (SIZE, 5 * SIZE)
  (text,) = (v.tensor.string_val[0].decode() for v in values if v.tag == "config")
  assert re.search(r"\| optim.lr +\| 0.01 +\|", text)
  # A search looks at no test image, and other methods have no such prompts.
  train(config, tmp_path / "search", prepared=insvp, test=False)
  config = config_of("linear", tensorboard=True)
  train(config, tmp_path / "linear", prepared=linear)
  assert shown(tmp_path / "search") == shown(tmp_path / "linear") == {"config"}


def test_prompts_of_a_split_backbone_are_drawn_by_a_single_process(
  insvp, mesh, monkeypatch
):
  model, test = insvp.program.model, insvp.data.splits["test"]
  params = insvp.first_params(config_of())
  whole = jax.device_put(params, mesh_lib.replicated(mesh))
  split = {**whole, "backbone": dict(whole["backbone"])}
  rows = mesh_lib.batch_sharding(mesh)
  split["backbone"]["embedding"] = jax.device_put(params["backbone"]["embedding"], rows)
  preset = preprocess.get_preset("vtab")
  expected = prompt_panels.prompt_panels(model, whole, test, preset, num_images=2)
  assert list(expected) == ["prompts/0", "prompts/1"]
  found = prompt_panels.prompt_panels(model, split, test, preset, num_images=2)
  for name, pixels in expected.items():
    np.testing.assert_allclose(found[name], pixels, atol=1)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  assert prompt_panels.prompt_panels(model, split, test, preset) == {}


def test_what_was_logged_after_a_save_at_its_step_is_not_there_twice(linear, tmp_path):
  config = config_of("linear")
  for _ in range(2):  # the second time it is only evaluated again
    train(config, tmp_path, prepared=linear)
    assert sum("test_accuracy" in row for row in metrics(tmp_path)) == 1


def test_a_profile_that_a_resumed_run_enters_in_its_middle_is_kept(linear, tmp_path):
  folder = tmp_path / "profile"
  profiler = Profiler((2, 4), folder)
  profiler.before(1)
  profiler.after(1, jnp.ones(1))
  assert not folder.exists()
  profiler.before(3)
  profiler.before(4)
  profiler.after(4, jnp.ones(1))
  profiler.before(5)
  profiler.close()
  assert len(list(folder.rglob("*.xplane.pb"))) == 1
  train(config_of("linear", profile="6:6"), tmp_path / "run", prepared=linear)
  assert len(list(tmp_path.glob("run/profile/**/*.xplane.pb"))) == 1


def test_prepare_says_which_splits_there_are(monkeypatch):
  monkeypatch.setattr(
    trainer, "load_data", lambda *_: make_data(without=("val", "train_val"))
  )
  config = tiny_config("linear", data__train_split="train_val")
  with pytest.raises(ValueError, match="no split 'train_val', only train, test"):
    trainer.prepare(config)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"batch_size": 6}, "6, which does not split evenly over 4 devices. Use 4 or 8"),
    ({"batch_size": 28}, "only 24 images; lower it to at most 24"),
    ({"data__preset": "vtb"}, "unknown preset 'vtb'. Did you mean 'vtab'"),
    ({"head_init": "zero"}, "unknown head_init 'zero'. Did you mean 'zeros'"),
    ({"backbone__weights": ""}, "without weights. Set config.backbone.weights"),
    ({"optim__warmup_epochs": 2.0}, "the warm-up takes 6 of the run's 6 updates"),
  ],
)
def test_prepare_refuses_what_cannot_train(monkeypatch, changes, message):
  monkeypatch.setattr(trainer, "load_data", lambda *_: make_data())
  with pytest.raises(ValueError, match=message):
    trainer.prepare(tiny_config("linear", **changes))


def test_training_on_arrays_imports_no_tensorflow(root, tmp_path):
  code = f"""
import sys
from tiny_training import prepare, tiny_config
from insvp_jax.train.trainer import train
config = tiny_config("linear", total_steps=2, tensorboard=True, backbone__depth=1)
train(config, {str(tmp_path)!r}, prepared=prepare(config))
print([name for name in sys.modules if name.split(".")[0] == "tensorflow"])
"""
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=root / "tests",
    env={**os.environ, "PYTHONPATH": str(root)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == "[]\n"

"""Many steps in one call end as single steps do, however they are divided."""

import dataclasses
import re
import types

from hypothesis import given
from hypothesis import strategies as st
import jax
import numpy as np
import pytest
from tiny_training import (
  assert_same,
  metrics,
  prepare,
  stored,
  tiny_config,
  with_step,
)

from insvp_jax import config_checks, trees
from insvp_jax.checkpoints.files import find_steps
from insvp_jax.data import StreamSplit
from insvp_jax.distributed.stopping import Stopped
from insvp_jax.search import population, trials, tune
from insvp_jax.train import batches, steps, trainer
from insvp_jax.train import program as program_lib
from insvp_jax.train.batches import ResidentFeed, StreamFeed
from insvp_jax.train.timing import Timer
from insvp_jax.train.trainer import Diverged, train

TOTAL = 7  # steps; 3 are an epoch
CLOSE = {"rtol": 2e-4, "atol": 1e-6}


def config_of(method="vpt_deep", **changes):
  """Returns a config in which all that is drawn at random is drawn."""
  if method == "vpt_deep":
    changes = {
      "data__preset": "cifar",
      "loss__mixup_alpha": 0.8,
      "vpt_deep__dropout": 0.1,
      **changes,
    }
  return tiny_config(
    method,
    **{
      "total_steps": TOTAL,
      "optim__eps": 1e-4,
      "steps_per_call": 200,
      "log_every_steps": 3,
      **changes,
    },
  )


@pytest.fixture(scope="module")
def prepared():
  return prepare(config_of(), devices=4)


@pytest.fixture(scope="module")
def linear():
  return prepare(config_of("linear"))


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
  """The workdir of a run whose calls are as long as they can be."""
  workdir = tmp_path_factory.mktemp("whole")
  train(config_of(), workdir, prepared=prepared)
  return workdir


@pytest.fixture
def counts(monkeypatch):
  """Gets the number of steps of each call."""
  counts, original = [], ResidentFeed.next

  def next_(feed, count):
    counts.append(count)
    return original(feed, count)

  monkeypatch.setattr(ResidentFeed, "next", next_)
  return counts


@pytest.mark.parametrize(
  "changes, divided",
  [
    ({"log_every_steps": 100}, [1, 6]),
    ({"log_every_steps": 100, "steps_per_call": 4}, [1, 4, 2]),
    ({"log_every_steps": 1}, [1] * TOTAL),
    ({"log_every_steps": 100, "checkpoint_every_epochs": 5 / 3}, [1, 4, 2]),
    ({"log_every_steps": 100, "eval_every_epochs": 1.0}, [1, 2, 3, 1]),
    ({"log_every_steps": 100, "profile": "3:4"}, [1, 1, 2, 3]),
  ],
)
def test_the_division_into_calls_changes_no_bit(
  prepared, whole, counts, tmp_path, changes, divided
):
  train(config_of(**changes), tmp_path, prepared=prepared)
  assert counts == divided
  assert_same(stored(tmp_path), stored(whole))
  rows = {row["step"]: row for row in metrics(whole) if "loss" in row}
  mine = {row["step"]: row for row in metrics(tmp_path) if "loss" in row}
  assert {1, TOTAL} <= rows.keys() & mine.keys()
  for step in rows.keys() & mine.keys():
    assert mine[step] == rows[step]
  if changes.get("profile"):
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_many_steps_end_and_log_as_single_ones(prepared, whole, counts, tmp_path):
  train(config_of(steps_per_call=1), tmp_path, prepared=prepared)
  assert counts == []
  many, single = (stored(w)[3]["adapter"] for w in (whole, tmp_path))
  for name, leaf in single.items():
    np.testing.assert_allclose(many[name], leaf, err_msg=name, **CLOSE)
  for here, there in zip(metrics(whole), metrics(tmp_path), strict=True):
    assert here == pytest.approx(there, rel=1e-4, abs=1e-6)
  before = prepared.first_params(config_of())
  for name, leaf in trees.flatten(before["prompter"]).items():
    assert np.abs(leaf - many[f"prompter/{name}"]).max() > 1e-3


def test_a_preemption_within_a_call_stops_at_its_end_and_resumes_bit_for_bit(
  prepared, whole, counts, monkeypatch, tmp_path
):
  asked = []

  def is_preempted(first, last):
    asked.extend(range(first, last + 1))
    return first <= 3 <= last

  changes = {"log_every_steps": 100, "steps_per_call": 4}
  with monkeypatch.context() as patch:
    patch.setattr(trainer, "_is_preempted", is_preempted)
    with pytest.raises(Stopped, match="SIGTERM at step 5"):
      train(config_of(**changes), tmp_path, prepared=prepared)
  # The service counts steps, in turn, in all processes.
  assert asked == [1, 2, 3, 4, 5] and find_steps(tmp_path)[0].name == "5"
  train(config_of(**changes), tmp_path, prepared=prepared)
  assert counts == [1, 4, 1, 1]
  assert_same(stored(tmp_path), stored(whole))


def test_a_call_names_the_first_step_that_was_not_finite(linear, tmp_path):
  """One metric of steps 3 and 5 is broken within the compiled call."""
  name = "grad_norm"
  train_step = linear.program.functions.train

  def broken(state, batch):
    after, found = train_step(state, batch)
    wrong = (after.step == 3) | (after.step == 5)
    value = jax.numpy.where(after.step == 3, np.inf, np.nan)
    return after, {**found, name: jax.numpy.where(wrong, value, found[name])}

  multi_step = steps.create_multi_step(
    dataclasses.replace(linear.program.functions, train=broken),
    linear.program.mask,
    batch_size=8,
    sharding=linear.program.state_sharding.step,
  )
  prepared = with_step(linear, multi_step=jax.jit(multi_step, donate_argnums=0))
  with pytest.raises(Diverged, match=f"the {name} is inf at step 3. Lower"):
    train(config_of("linear", log_every_steps=6), tmp_path, prepared=prepared)
  # What was logged before was fine; nothing of the call was.
  assert {row["step"] for row in metrics(tmp_path)} == {1}
  assert not list((tmp_path / "checkpoints").iterdir())


def run_trials(linear, workdir, lrs, **changes):
  """Returns (outcomes of trials that train together, their final parameters)."""
  configs = [trials.at(config_of("linear", **changes), lr=lr) for lr in lrs]
  program = population.stack_program(linear.program)
  states, original = [], trainer.train_loop
  with pytest.MonkeyPatch.context() as patch:

    def train_loop(*args, **kwargs):
      states.append(original(*args, **kwargs))
      return states[0]

    patch.setattr(trainer, "train_loop", train_loop)
    outcomes = tune.train_trials(
      configs,
      dataclasses.replace(linear, program=program),
      linear.first_params(configs[0]),
      workdir,
      "test",
    )
  return outcomes, jax.device_get(trees.flatten(states[0].params))


def test_trials_that_train_together_end_as_they_would_step_by_step(
  linear, counts, tmp_path
):
  ends = []
  for i, changes in enumerate(
    ({"steps_per_call": 1}, {}, {"log_every_steps": 2, "steps_per_call": 3})
  ):
    _, params = run_trials(linear, tmp_path / str(i), (0.01, 0.05), **changes)
    assert len(counts) == (0, 4, 9)[i]
    ends.append({name: params[name] for name in ("head/kernel", "head/bias")})
  single, many, divided = ends
  for name, leaf in single.items():
    np.testing.assert_allclose(many[name], leaf, err_msg=name, **CLOSE)
    assert many[name].tobytes() == divided[name].tobytes()
  first, second = single["head/kernel"]
  assert np.abs(first - second).max() > 1e-2


def test_a_trial_that_diverges_names_the_same_step_in_a_call(linear, tmp_path):
  texts = []
  for steps_per_call in (1, 200):
    workdir = tmp_path / str(steps_per_call)
    outcomes, _ = run_trials(
      linear, workdir, (0.01, 1e30), steps_per_call=steps_per_call
    )
    texts.append([outcome["diverged"] for outcome in outcomes])
    assert outcomes[0]["val_accuracy"] is not None
  assert texts[0] == texts[1] and re.search(r"is \w+ at step \d\.", texts[0][1])
  assert texts[0][0] is None


# How many steps a call takes.


@given(
  total=st.integers(1, 60),
  most=st.integers(1, 20),
  periods=st.lists(st.integers(0, 12), max_size=3),
  marks=st.lists(st.integers(0, 60), max_size=3),
)
def test_calls_end_wherever_something_is_due(total, most, periods, marks):
  step, ends = 0, [0]
  while step < total:
    end = batches.next_end(step, min(most, total - step), periods, marks)
    assert step < end <= min(step + most, total)
    step = end
    ends.append(end)
  due = {n for n in range(1, total + 1) if any(p and n % p == 0 for p in periods)}
  assert due | ({m for m in marks if m <= total}) <= set(ends)


class Platform:
  """A mesh of devices of some platform."""

  def __init__(self, name, size=1):
    self.size = size
    self.devices = np.array([type("Device", (), {"platform": name})()])


@pytest.mark.parametrize(
  "method, platform, asked, resident, most",
  [
    ("linear", "cpu", 0, True, 256),
    ("linear", "gpu", 0, True, 256),
    ("linear", "gpu", 1, True, 1),
    ("linear", "cpu", 30, True, 30),
    ("vpt_deep", "cpu", 0, True, 256),
    ("vpt_deep", "cpu", 0, False, 1),
    ("vpt_deep", "gpu", 0, True, 256),
    ("vpt_deep", "gpu", 0, False, 1),
    ("vpt_deep", "cpu", 7, True, 7),
    ("vpt_deep", "gpu", 7, False, 1),
  ],
)
def test_how_many_steps_a_call_takes(
  prepared, linear, monkeypatch, method, platform, asked, resident, most
):
  chosen = {"linear": linear, "vpt_deep": prepared}[method]
  monkeypatch.setattr(batches, "_platform", lambda program: platform)
  settings = config_of(method, steps_per_call=asked)
  params = chosen.first_params(settings)
  state = program_lib.create_state(settings, chosen.program, params)
  split = chosen.data.splits["train"]
  if not resident:
    split = StreamSplit(split.labels, 16, "sha", lambda requests, whole: iter(()))
  features = chosen.features(settings, "train", state.params)
  assert (features is not None) == (method == "linear")
  feed = batches.create_feed(settings, chosen.program, split, state, features)
  assert feed.max_steps == most
  assert isinstance(feed, ResidentFeed if most > 1 else StreamFeed)


def test_a_call_does_no_more_than_a_device_does_in_about_a_second(
  prepared, monkeypatch
):
  monkeypatch.setattr(batches, "_FLOPS_PER_CALL_ELSEWHERE", 1e7)
  monkeypatch.setattr(batches, "_platform", lambda program: "gpu")
  params = prepared.first_params(config_of())
  state = program_lib.create_state(config_of(), prepared.program, params)
  arrays = batches.resident.put_split(
    prepared.data.splits["train"],
    batches.mesh_lib.batch_sharding(prepared.program.mesh),
  )
  most = batches._steps_per_call(prepared.program, state, arrays, np.uint32(0))
  batch = jax.eval_shape(
    prepared.program.functions.make_batch,
    arrays,
    np.arange(24),
    np.uint32(0),
    np.int32(0),
  )
  traced = prepared.program.train_step.trace(state, batch)
  expected = 4e7 / batches.flops.count(traced.jaxpr)
  assert 1 < most < 256 and most == pytest.approx(expected, abs=1)


def test_a_negative_number_of_steps_is_refused():
  with pytest.raises(ValueError, match="steps_per_call is -1, expected at least 0"):
    config_checks.validate(config_of(steps_per_call=-1))


def test_the_loop_starts_with_one_step_that_compiles(linear, monkeypatch, tmp_path):
  timers = []
  original = Timer.add

  def add(timer, num_steps, num_images):
    original(timer, num_steps, num_images)
    timers.append(timer.state())

  monkeypatch.setattr(Timer, "add", add)
  train(config_of("linear", log_every_steps=4), tmp_path, prepared=linear)
  # The first is the making of the feed; then steps 1, 4 and 7.
  assert [each["timed_steps"] for each in timers] == [0, 0, 3, 6]
  # Steps on features see no images.
  assert [each["timed_steps"] for each in timers] == [0, 0, 3, 6]
  assert {each["timed_images"] for each in timers} == {0}
  assert len({each["compile_seconds"] for each in timers[1:]}) == 1
  assert all(each["seconds"] >= each["compile_seconds"] for each in timers[1:])


@pytest.mark.parametrize(
  "asked, num_examples, expected",
  [(100_000, 18, 256), (100_000, 1001, 1002), (8, 1001, 8), (255, 18, 256)],
)
def test_batches_of_evaluation_are_no_larger_than_the_split(
  unchecked, asked, num_examples, expected
):
  config = tiny_config(eval_batch_size=asked)
  program = types.SimpleNamespace(mesh=types.SimpleNamespace(size=2))
  assert batches.eval_batch_size(config, program, num_examples) == expected

"""Trials that train together end as they would have ended one by one."""

import dataclasses

import jax
import numpy as np
import pytest
from test_sharding import wide_config
from tiny_commands import make_place
from tiny_training import make_data, streamed, tiny_config

from insvp_jax import trees
from insvp_jax.search import population, trials, tune
from insvp_jax.search.population import population_size
from insvp_jax.train import trainer
from insvp_jax.train.trainer import Diverged

# Everything that is drawn at random: mixing, crops and flips, dropout.
RANDOM = {
  "loss__mixup_alpha": 0.8,
  "loss__cutmix_alpha": 1.0,
  "data__preset": "cifar",
  # The large eps keeps AdamW from making steps out of rounding errors.
  "optim__eps": 1e-4,
}
TOLERANCE = {"rtol": 2e-3, "atol": 2e-4}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
  """The file of a backbone of one block: to draw one is the dearest program of all."""
  return str(make_place(tmp_path_factory.mktemp("place")) / "backbone0.npz")


@pytest.fixture(autouse=True)
def _data(monkeypatch):
  monkeypatch.setattr(trainer, "load_data", lambda *_: make_data())


def one_block(method, backbone, **changes):
  """Returns a config of a backbone that is read."""
  changes = {"backbone__depth": 1, "backbone__weights": backbone} | changes
  return tiny_config(method, **changes)


@pytest.fixture
def final_states(monkeypatch):
  """A list that gets the last state of every loop."""
  states, original = [], trainer.train_loop

  def train_loop(*args, **kwargs):
    states.append(original(*args, **kwargs))
    return states[-1]

  monkeypatch.setattr(trainer, "train_loop", train_loop)
  return states


def search(config, grid, tmp_path, prepared=None, in_turn=False):
  """Returns (configs, prepared, outcomes) of trials that train together.

  Args:
    config: of all of them.
    grid: what they differ in.
    tmp_path: where they train.
    prepared: of a search like this one, whose compiled steps are used again.
    in_turn: whether trials take turns within a step.
  """
  points = trials.points(grid)
  configs = [trials.at(config, **point) for point in points]
  if prepared is None:
    hparams = tuple(name for name in points[0] if name not in ("lr", "wd"))
    prepared = trainer.prepare(config, hparams=hparams)
    program = population.stack_program(prepared.program, in_turn=in_turn)
    prepared = dataclasses.replace(prepared, program=program)
  params = prepared.first_params(config)
  outcomes = tune.train_trials(configs, prepared, params, tmp_path, "test")
  return configs, prepared, outcomes


def member(state, program, index):
  """Returns the parameters of one trial by name, on the host."""
  mask = trees.flatten(program.mask)
  params = jax.device_get(trees.flatten(state.params))
  return {name: leaf[index] if mask[name] else leaf for name, leaf in params.items()}


def run_single(config, workdir, final_states):
  """Returns (parameters, result) of the same trial as a run of its own."""
  result = trainer.train(config, workdir, test=False)
  return jax.device_get(trees.flatten(final_states[-1].params)), result


def assert_close(params, expected):
  assert params.keys() == expected.keys()
  for name, leaf in expected.items():
    np.testing.assert_allclose(params[name], leaf, err_msg=name, **TOLERANCE)


@pytest.mark.parametrize(
  "method, devices, changes, grid",
  [
    # Nothing but a head, on cached features.
    ("linear", 4, {}, {"wd": (0.0, 0.5), "lr": (0.01, 0.05)}),
    (
      "insvp",
      1,
      RANDOM,
      {
        "lr": (0.02,),
        "wd": (0.1,),
        "dropout": (0.0, 0.4),
        "prompt_dropout": (0.3,),
        "image_fusion": ((0.3, 0.7), (1.0, 2.0)),
        "feature_fusion": ((1.0, 0.5),),
      },
    ),
  ],
)
def test_trials_end_as_runs_of_their_own(
  method, devices, changes, grid, use_devices, backbone, final_states, tmp_path
):
  use_devices(devices)
  config = one_block(method, backbone, **changes)
  configs, prepared, outcomes = search(config, grid, tmp_path / "search")
  program = prepared.program
  state, last = final_states[-1], len(configs) - 1
  # The last trial differs from the first in every hparam; those of the run of its own
  # are constants of its program.
  expected, result = run_single(configs[last], tmp_path / "single", final_states)
  params = member(state, program, last)
  assert_close(params, expected)
  assert outcomes[last]["val_accuracy"] == pytest.approx(result["val_accuracy"])
  assert all(outcome["diverged"] is None for outcome in outcomes)
  first = member(state, program, 0)
  moved = [
    np.abs(first[name] - params[name]).max()
    for name, trainable in trees.flatten(program.mask).items()
    if trainable
  ]
  assert max(moved) > 1e-3


def test_trials_that_take_turns_end_as_trials_at_once(
  use_devices, backbone, final_states, tmp_path
):
  use_devices(1)
  config = one_block("vpt_deep", backbone, **RANDOM | {"loss__mixup_alpha": 0.0})
  grid = {"lr": (0.02, 0.03), "wd": (0.1,), "dropout": (0.0, 0.4)}
  _, prepared, at_once = search(config, grid, tmp_path / "at once")
  program = prepared.program
  _, prepared, in_turn = search(config, grid, tmp_path / "in turn", in_turn=True)
  turned = prepared.program
  first, second = final_states
  for i in range(4):
    assert_close(member(second, turned, i), member(first, program, i))
    assert in_turn[i]["val_accuracy"] == pytest.approx(at_once[i]["val_accuracy"])
    assert in_turn[i]["val_loss"] == pytest.approx(at_once[i]["val_loss"], rel=1e-3)
  assert int(second.step) == int(first.step)
  # The frozen weights are there once, and as they were.
  frozen = trees.split(second.params, program.mask)[1]
  start = trees.flatten(prepared.first_params(config))
  for name, leaf in frozen.items():
    np.testing.assert_array_equal(leaf, start[name], err_msg=name)


def test_on_a_cpu_trials_take_turns_unless_the_backbone_is_shared():
  def turns(method):
    return population.takes_turns(trainer.prepare(tiny_config(method)).program)

  assert turns("vpt_deep") and not turns("linear")


def test_a_trial_that_diverges_leaves_the_others_bit_for_bit(
  backbone, final_states, tmp_path
):
  config = one_block("linear", backbone)
  wd = {"wd": (0.0,)}
  _, prepared, _ = search(config, {**wd, "lr": (0.01, 0.02, 0.03)}, tmp_path / "good")
  configs, _, outcomes = search(
    config, {**wd, "lr": (0.01, 1e30, 0.03)}, tmp_path / "bad", prepared
  )
  program = prepared.program
  good, bad = final_states
  for i in (0, 2):
    expected = member(good, program, i)
    for name, leaf in member(bad, program, i).items():
      assert leaf.tobytes() == expected[name].tobytes(), name
    assert outcomes[i]["diverged"] is None
    assert outcomes[i]["val_accuracy"] is not None
  assert outcomes[1]["val_accuracy"] is None
  with pytest.raises(Diverged) as raised:
    trainer.train(configs[1], tmp_path / "single")
  assert str(raised.value) == f"{outcomes[1]['diverged']} No checkpoint yet."


def test_when_all_diverge_the_search_ends_early(backbone, final_states, tmp_path):
  config = one_block("linear", backbone, total_epochs=50.0)
  _, _, outcomes = search(config, {"lr": (1e30, 1e31), "wd": (0.0,)}, tmp_path)
  assert not final_states  # no loop came to its end
  assert all(outcome["diverged"] for outcome in outcomes)
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) < 5


def test_a_backbone_that_is_split_over_devices_stays_split(final_states, tmp_path):
  config = wide_config(fsdp=4)
  grid = {"lr": (0.01, 0.02), "wd": (0.1,), "dropout": (0.2,)}
  configs, prepared, _ = search(config, grid, tmp_path / "search")
  state, program = final_states[-1], prepared.program
  mask = trees.flatten(program.mask)
  split = [
    name
    for name, leaf in trees.flatten(state.params).items()
    if not leaf.is_fully_replicated
  ]
  assert len(split) > 3 and not any(mask[name] for name in split)
  params, _ = run_single(configs[1], tmp_path / "1", final_states)
  assert_close(member(state, program, 1), params)


def test_trials_share_the_batches_of_a_stream(
  use_devices, backbone, final_states, tmp_path
):
  use_devices(1)
  config = one_block("linear", backbone, data__preset="cifar", optim__eps=1e-4)
  grid = {"lr": (0.01, 0.05), "wd": (0.0,)}
  _, prepared, _ = search(config, grid, tmp_path / "resident")
  prepared = dataclasses.replace(prepared, data=streamed(prepared.data))
  search(config, grid, tmp_path / "stream", prepared)
  resident, stream = (trees.flatten(state.params) for state in final_states)
  for name, leaf in resident.items():
    np.testing.assert_allclose(stream[name], leaf, rtol=1e-6)


# How many train together.


@pytest.mark.parametrize(
  "number, limit, sizes",
  [(49, 16, (13, 13, 13, 13)), (4, 8, (4,)), (5, 2, (2, 2, 2)), (3, 1, (1, 1, 1))],
)
def test_populations_are_balanced(number, limit, sizes):
  size = population.balanced_size(number, limit)
  assert size == sizes[0] <= limit and -(-number // size) == len(sizes)


class Device:
  """A device that knows how much memory it has."""

  def __init__(self, limit):
    self.limit = limit

  def memory_stats(self):
    return {"bytes_limit": self.limit} if self.limit else None


def test_a_population_fits_into_the_memory_that_the_device_has(monkeypatch):
  config = tiny_config("vpt_deep")
  configs = [trials.at(config, lr=lr) for lr in np.linspace(0.01, 0.02, 20).tolist()]
  prepared = trainer.prepare(config)
  program, split = prepared.program, prepared.data.splits["train"]
  shared, each = population.member_bytes(config, program)
  frozen = trees.split(program.shapes, program.mask)[1]
  assert shared >= 4 * trees.count(frozen) and each > 0

  def size(limit, **changes):
    monkeypatch.setattr(jax, "local_devices", lambda **_: [Device(limit)])
    members = [c.copy_and_resolve_references() for c in configs]
    for each_config in members:
      each_config.tune.update(changes)
    return population_size(members, program, split)

  assert size(1) == 1
  assert size(int((shared + split.images.nbytes + 7.5 * each) / 0.7)) == 7
  assert size(10**12) == 20
  # Asked for, it is as asked; without a limit four take turns on a CPU, unless what
  # they train is most of the model, as InsVP's prompters are of this one.
  assert size(10**12, population=3) == 3
  assert size(None) == 4
  prompters = [trials.at(c, method="insvp") for c in configs]
  assert population_size(prompters, trainer.prepare(prompters[0]).program, split) == 1
  linear = [trials.at(c, method="linear") for c in configs]
  assert population_size(linear, trainer.prepare(linear[0]).program, split) == 20


def test_a_trial_s_bytes_grow_with_the_batch_and_not_with_the_backbone():
  def member_bytes(**changes):
    config = tiny_config("vpt_deep", **changes)
    return population.member_bytes(config, trainer.prepare(config).program)

  small, large = member_bytes(), member_bytes(batch_size=16)
  assert large[1] > 1.5 * small[1]
  # Two blocks, two kernels of 16 x mlp_dim, in float32.
  wide = member_bytes(backbone__mlp_dim=4096)
  assert wide[0] - small[0] > 4 * 2 * 2 * 16 * 4000

"""Runs that train together end as they would have ended alone."""

import dataclasses
import json
import re
import shutil
import signal

import jax
import numpy as np
import pytest
from test_sharding import wide_config
from tiny_training import make_data, tiny_config

from insvp_jax import trees
from insvp_jax.checkpoints.files import find_step, read_arrays, read_json
from insvp_jax.data import ArraySplit, StreamSplit, TaskData
from insvp_jax.distributed.stopping import Stopped
from insvp_jax.run import load_run
from insvp_jax.search import sizing, together, trials
from insvp_jax.search.population import Population, can_train_together
from insvp_jax.train import parameters, preparation, trainer
from insvp_jax.train.loop import Diverged, Loop

# Everything that a seed decides: mixing, crops and flips, dropout.
RANDOM = {
  "loss__mixup_alpha": 0.8,
  "loss__cutmix_alpha": 1.0,
  "data__preset": "cifar",
  # The large eps keeps AdamW from making steps out of rounding errors.
  "optim__eps": 1e-4,
}
TOLERANCE = {"rtol": 2e-3, "atol": 2e-4}


@pytest.fixture(autouse=True)
def _data(monkeypatch):
  monkeypatch.setattr(preparation, "load_data", lambda *_: make_data())


def streamed(data: TaskData) -> TaskData:
  """Returns the task with a train split that is read like a stream."""

  def stream(split: ArraySplit) -> StreamSplit:
    return StreamSplit(
      split.labels,
      split.stored_size,
      split.digest,
      lambda requests, whole: split.read(requests, whole=whole),
    )

  return dataclasses.replace(
    data, splits={name: stream(split) for name, split in data.splits.items()}
  )


def final_states(monkeypatch):
  """Returns a list that gets the last state of every loop."""
  states, original = [], Loop.run

  def run(loop, state):
    states.append(original(loop, state))
    return states[-1]

  monkeypatch.setattr(Loop, "run", run)
  return states


def search(config, grid, monkeypatch, tmp_path, data=None):
  """Returns (points, configs, population, stacked state, what `search` returns)."""
  points = trials.points(grid)
  configs = [trials.at(config, **point) for point in points]
  numbers = tuple(name for name in points[0] if name not in ("lr", "wd"))
  prepared = trainer.prepare(config, numbers=numbers)
  if data:
    prepared = dataclasses.replace(prepared, data=data)
  population = Population.of(configs, prepared.program, prepared.weights)
  states = final_states(monkeypatch)
  drawn = population.draw(configs, prepared.weights)
  found = together.search(configs, prepared, population, drawn, tmp_path, "test")
  return points, configs, population, states[-1], found


def alone(config, monkeypatch, workdir):
  """Returns (parameters, result) of a run of its own."""
  states = final_states(monkeypatch)
  result = trainer.train(config, workdir, test=False)
  return jax.device_get(trees.flatten(states[-1].params)), result


def assert_close(state, params):
  """Asserts that a member's parameters are those of a run of its own."""
  mine = jax.device_get(trees.flatten(state.params))
  assert mine.keys() == params.keys()
  for name, leaf in params.items():
    np.testing.assert_allclose(mine[name], leaf, err_msg=name, **TOLERANCE)


@pytest.mark.parametrize(
  "method, grid",
  [
    ("linear", {"wd": (0.0, 0.5), "lr": (0.01, 0.05)}),
    ("vpt_deep", {"lr": (0.02,), "wd": (0.1,), "dropout": (0.0, 0.4)}),
    (
      "insvp",
      {
        "lr": (0.02,),
        "wd": (0.1,),
        "dropout": (0.1, 0.4),
        "prompt_dropout": (0.3,),
        "image_fusion": ((0.3, 0.7), (1.0, 2.0)),
        "feature_fusion": ((1.0, 0.5),),
      },
    ),
  ],
)
def test_trials_end_as_runs_of_their_own(method, grid, monkeypatch, tmp_path):
  config = tiny_config(method, **RANDOM)
  points, configs, population, state, found = search(
    config, grid, monkeypatch, tmp_path / "search"
  )
  ends = []
  # The first and the last differ in every number.
  for i in (0, len(points) - 1):
    params, result = alone(configs[i], monkeypatch, tmp_path / str(i))
    assert_close(population.member(state, i), params)
    ends.append(params)
    assert found[i]["val_accuracy"] == pytest.approx(result["val_accuracy"])
    assert found[i]["diverged"] is None
  moved = [
    np.abs(ends[0][name] - ends[1][name]).max()
    for name, trainable in trees.flatten(population.program.mask).items()
    if trainable
  ]
  assert max(moved) > 1e-3


@pytest.mark.parametrize("weights", ["random", "stored"])
def test_seeds_end_as_runs_of_their_own(weights, monkeypatch, tmp_path):
  config = tiny_config("insvp", eval_every_epochs=1.0, **RANDOM)
  if weights == "stored":
    path = tmp_path / "backbone.npz"
    model = trainer.prepare(config).program.model
    drawn = parameters.init_params(model, 7)
    weights.save_backbone(drawn["backbone"], path)
    config.backbone.weights = str(path)
    # Frozen, and yet drawn by each seed.
    config.insvp.train_specific = False
  configs = [trials.at(config, seed=seed) for seed in (3, 4)]
  prepared = trainer.prepare(config)
  population = Population.of(configs, prepared.program, prepared.weights)
  assert population.one_backbone == (weights == "stored")
  workdirs = [tmp_path / "together" / str(c.seed) for c in configs]
  results = together.train(configs, workdirs, prepared, population)
  for config, workdir, result in zip(configs, workdirs, results, strict=True):
    other = tmp_path / "alone" / str(config.seed)
    expected = trainer.train(config, other, prepared=prepared)
    assert json.loads((workdir / "result.json").read_text()) == result
    assert result.keys() == expected.keys()
    for name, value in expected.items():
      if not re.fullmatch(r".*_seconds?|peak_.*", name):
        assert result[name] == value, name
    assert_same_files(workdir, other)
    run = load_run(workdir)
    assert run.result == result
  one, two = (load_run(w).params["head"]["kernel"] for w in workdirs)
  assert np.abs(one - two).max() > 1e-3


def assert_same_files(mine, expected):
  """Asserts that two workdirs hold the same run, up to rounding."""
  assert {p.name for p in mine.iterdir()} == {p.name for p in expected.iterdir()}
  configs = [json.loads((w / "config.json").read_text()) for w in (mine, expected)]
  assert configs[0] == configs[1]
  rows = []
  for workdir in (mine, expected):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows.append([json.loads(line) for line in lines])
  for here, there in zip(*rows, strict=True):
    here.pop("images_per_second", None), there.pop("images_per_second", None)
    assert here.keys() == there.keys()
    for name, value in there.items():
      assert here[name] == pytest.approx(value, rel=2e-3, abs=2e-4), name
  where = [find_step(workdir) for workdir in (mine, expected)]
  assert where[0].name == where[1].name
  for item in ("adapter", "optimizer"):
    stored = [read_arrays(step, item) for step in where]
    assert stored[0].keys() == stored[1].keys()
    for name, leaf in stored[1].items():
      np.testing.assert_allclose(stored[0][name], leaf, err_msg=name, **TOLERANCE)
  stored = [read_json(step, "meta") for step in where]
  assert stored[0] == stored[1]
  stored = [read_json(step, "progress") for step in where]
  assert stored[0].keys() == stored[1].keys() and stored[0]["rng"] == stored[1]["rng"]


def test_a_member_that_diverges_leaves_the_others_bit_for_bit(monkeypatch, tmp_path):
  config = tiny_config("vpt_deep")
  _, _, population, good, _ = search(
    config, {"wd": (0.0,), "lr": (0.01, 0.02, 0.03)}, monkeypatch, tmp_path / "good"
  )
  with monkeypatch.context() as patch:
    _, configs, _, state, found = search(
      config, {"wd": (0.0,), "lr": (0.01, 1e30, 0.03)}, patch, tmp_path / "bad"
    )
  for i in (0, 2):
    mine, theirs = (
      jax.device_get(trees.flatten(population.member(each, i).params))
      for each in (state, good)
    )
    for name, leaf in theirs.items():
      assert mine[name].tobytes() == leaf.tobytes(), name
    assert found[i]["diverged"] is None and found[i]["val_accuracy"] is not None
  assert found[1]["val_accuracy"] is None
  with pytest.raises(Diverged) as raised:
    trainer.train(configs[1], tmp_path / "alone")
  assert str(raised.value) == f"{found[1]['diverged']} No checkpoint yet."


def test_when_all_diverge_the_search_ends_early(monkeypatch, tmp_path):
  config = tiny_config("linear", total_epochs=50.0)
  with pytest.raises(IndexError):  # no loop came to its end
    search(config, {"lr": (1e30, 1e31), "wd": (0.0,)}, monkeypatch, tmp_path)
  rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert len(rows) < 5


def test_a_backbone_that_is_split_over_devices_stays_split(monkeypatch, tmp_path):
  config = wide_config(fsdp=4)
  grid = {"lr": (0.01, 0.02), "wd": (0.1,), "dropout": (0.0, 0.2)}
  _, configs, population, state, _ = search(
    config, grid, monkeypatch, tmp_path / "search"
  )
  leaves = trees.flatten(state.params)
  mask = trees.flatten(population.program.mask)
  split = [name for name, leaf in leaves.items() if not leaf.is_fully_replicated]
  assert len(split) > 3 and not any(mask[name] for name in split)
  for i in (0, 3):
    params, _ = alone(configs[i], monkeypatch, tmp_path / str(i))
    assert_close(population.member(state, i), params)


def test_trials_of_one_seed_share_the_batches_of_a_stream(monkeypatch, tmp_path):
  config = tiny_config("linear", **RANDOM)
  grid = {"lr": (0.01, 0.05), "wd": (0.0,)}
  *_, resident, _ = search(config, grid, monkeypatch, tmp_path / "resident")
  data = streamed(make_data())
  *_, stream, _ = search(config, grid, monkeypatch, tmp_path / "stream", data)
  for name, leaf in jax.device_get(trees.flatten(resident.params)).items():
    np.testing.assert_allclose(trees.flatten(stream.params)[name], leaf, rtol=1e-6)
  split = data.splits["train"]
  assert can_train_together([3, 3], split) and not can_train_together([3, 4], split)


def at_step(monkeypatch, step, signum):
  """Sends a signal to the loop after a step."""
  original = Loop._is_stopping

  def patched(loop, current):
    if current == step:
      loop.stop.signum = signum
    return original(loop, current)

  monkeypatch.setattr(Loop, "_is_stopping", patched)


@pytest.mark.parametrize("behind", [False, True])
def test_interrupted_runs_go_on_together_from_their_checkpoints(
  behind, monkeypatch, tmp_path
):
  config = tiny_config("linear", checkpoint_every_epochs=1 / 3, **RANDOM)
  configs = [trials.at(config, seed=seed) for seed in (0, 1, 2)]
  prepared = trainer.prepare(config)
  population = Population.of(configs, prepared.program, prepared.weights)
  workdirs = [tmp_path / "stopped" / str(i) for i in range(3)]
  with monkeypatch.context() as patch:
    at_step(patch, 4, signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM at step 4") as stopped:
      together.train(configs, workdirs, prepared, population)
  assert stopped.value.exit_status == 42
  assert [find_step(w).name for w in workdirs] == ["4"] * 3
  if behind:
    # One run lost what it had: each then goes on alone.
    shutil.rmtree(workdirs[1] / "checkpoints")
  trained = []
  original = Population.batches

  def batches(population, members, split, start, arrays):
    trained.append((len(members), start))
    return original(population, members, split, start, arrays)

  monkeypatch.setattr(Population, "batches", batches)
  together.train(configs, workdirs, prepared, population)
  assert trained == ([] if behind else [(3, 4)])
  expected = [tmp_path / "whole" / str(i) for i in range(3)]
  together.train(configs, expected, prepared, population)
  for mine, theirs in zip(workdirs, expected, strict=True):
    assert_same_files(mine, theirs)


def test_a_workdir_of_another_run_is_refused(tmp_path):
  config = tiny_config("linear", total_steps=1)
  configs = [trials.at(config, seed=seed) for seed in (0, 1)]
  prepared = trainer.prepare(config)
  population = Population.of(configs, prepared.program, prepared.weights)
  workdirs = [tmp_path / "0", tmp_path / "1"]
  together.train(configs, workdirs, prepared, population)
  others = [trials.at(c, lr=0.5) for c in configs]
  with pytest.raises(ValueError, match="config.optim.lr is 0.5, was 0.01"):
    together.train(others, workdirs, prepared, population)


def test_a_final_run_that_diverges_is_reported_when_the_others_are_done(tmp_path):
  config = tiny_config("linear")
  configs = [trials.at(config, seed=0, lr=1e30), trials.at(config, seed=1)]
  prepared = trainer.prepare(config)
  population = Population.of(configs, prepared.program, prepared.weights)
  workdirs = [tmp_path / "0", tmp_path / "1"]
  with pytest.raises(Diverged, match=r"/0: the .* at step \d. Lower .*now 1e\+30"):
    together.train(configs, workdirs, prepared, population)
  assert not (workdirs[0] / "result.json").exists()
  assert (workdirs[1] / "result.json").exists()


# How many train together.


@pytest.mark.parametrize(
  "number, limit, sizes",
  [(49, 16, (13, 13, 13, 13)), (4, 8, (4,)), (5, 2, (2, 2, 2)), (3, 1, (1, 1, 1))],
)
def test_chunks_are_balanced(number, limit, sizes):
  size = sizing.balanced(number, limit)
  assert size == sizes[0] <= limit and -(-number // size) == len(sizes)


class Device:
  """A device that knows how much memory it has."""

  def __init__(self, limit):
    self.limit = limit

  def memory_stats(self):
    return {"bytes_limit": self.limit} if self.limit else None


def test_the_chunk_fits_into_the_memory_that_the_device_has(monkeypatch):
  config = tiny_config("insvp")
  configs = [trials.at(config, lr=lr) for lr in np.linspace(0.01, 0.02, 20).tolist()]
  prepared = trainer.prepare(config)
  population = Population.of(configs, prepared.program, prepared.weights)
  split = prepared.data.splits["train"]
  shared, each = sizing.member_bytes(config, population)
  frozen = trees.split(
    parameters.param_shapes(population.program.model), population.program.mask
  )[1]
  assert shared >= 4 * trees.count(frozen) and each > 0

  def size(limit, **changes):
    monkeypatch.setattr(jax, "local_devices", lambda **_: [Device(limit)])
    members = [c.copy_and_resolve_references() for c in configs]
    for member in members:
      member.tune.update(changes)
    return sizing.chunk_size(members, population, split)

  assert size(1) == 1
  assert size(int((shared + split.images.nbytes + 7.5 * each) / 0.7)) == 7
  assert size(10**12) == 20
  # Asked for, it is as asked; without a limit a member keeps a CPU busy.
  assert size(10**12, population=3) == 3
  assert size(None) == 1
  linear = [trials.at(c, method="linear") for c in configs]
  program = trainer.prepare(linear[0]).program
  population = Population.of(linear, program, None)
  assert sizing.chunk_size(linear, population, split) == 20


def test_a_member_s_bytes_grow_with_the_batch_and_not_with_the_backbone():
  def each(**changes):
    config = tiny_config("insvp", **changes)
    configs = [config, trials.at(config, lr=0.5)]
    prepared = trainer.prepare(config)
    population = Population.of(configs, prepared.program, prepared.weights)
    return sizing.member_bytes(config, population)

  small, large = each(), each(batch_size=16)
  assert large[1] > 1.5 * small[1]
  # Two blocks, two kernels of 16 x mlp_dim, in float32.
  wide = each(backbone__mlp_dim=4096)
  assert wide[0] - small[0] > 4 * 2 * 2 * 16 * 4000

"""Runs on a handful of images, and runs that are made longer."""

import json

import jax
import numpy as np
from PIL import Image
import pytest
from tiny_commands import make_place
from tiny_training import assert_same, metrics, prepare, stored, tiny_config

from insvp_jax.checkpoints.files import find_steps
from insvp_jax.config import to_dict
from insvp_jax.search import tune
from insvp_jax.train import program as program_lib
from insvp_jax.train import trainer

# None of this is about devices, and for one all compiles sooner.
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
  """Changes of a config whose backbone is read: to draw one takes longest."""
  place = make_place(tmp_path_factory.mktemp("place"))
  return {"backbone__depth": 1, "backbone__weights": str(place / "backbone0.npz")}


def write_shots(root, shots):
  """Writes three classes of random images: {split: images of each class}."""
  rng = np.random.default_rng(0)
  for split, count in shots.items():
    for name in ("ant", "bee", "cat"):
      folder = root / split / name
      folder.mkdir(parents=True)
      for i in range(count):
        image = Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8))
        image.save(folder / f"{i}.png")
  return root


@pytest.mark.parametrize(
  "shots, size, splits",
  [
    ({"train": 1, "test": 2}, 1, {"train": 3, "test": 6}),
    ({"train": 6}, 2, {"train": 12, "val": 3, "test": 3}),
    ({"train": 16, "val": 1, "test": 1}, 8, {"train": 48, "val": 3, "test": 3}),
  ],
)
def test_few_images_of_each_class_train_as_they_are(
  backbone, tmp_path, monkeypatch, capsys, shots, size, splits
):
  root = write_shots(tmp_path / "images", shots)
  changes = {"task": "folder", "data__root": str(root), "batch_size": 0}
  config = tiny_config("linear", **changes, **backbone)
  # One line for all methods; without a search, a second one compiles least.
  methods = ("linear", "bias")[: 1 + (size == 1)]
  config.tune.methods, config.tune.seeds, config.total_epochs = methods, (0,), 1.0
  if "val" in splits:
    config.tune.lr = (0.01, 0.1)
  summary = tune.run(config, tmp_path / "run")
  said = capsys.readouterr().err
  line = f"note: {splits['train']} training images: batches of {size} (chosen by"
  assert said.count("note: ") == said.count(line) == 1
  for method in methods:
    assert summary[method]["mean"] is not None
    run = tmp_path / "run" / method / "seed0"
    # The final run trains on train + val, in the batches of the trials.
    assert json.loads((run / "config.json").read_text())["batch_size"] == size
  assert config.batch_size == 0
  # The same command again finds everything done.
  monkeypatch.setattr(trainer, "train_loop", None)
  assert tune.run(config, tmp_path / "run") == summary


def test_each_of_several_devices_gets_an_image(mesh):
  config = tiny_config("linear", batch_size=0)
  assert program_lib.create_program(config, 3, 5, mesh).batch_size == 4
  assert config.batch_size == 4
  config.batch_size = 0
  assert program_lib.create_program(config, 3, 1000, mesh).batch_size == 32
  config.batch_size = 0
  with pytest.raises(ValueError, match="3 images, fewer than the 4 devices"):
    program_lib.create_program(config, 3, 3, mesh)


def test_in_64_bits_the_same_seed_would_be_another_run(mesh):
  config = tiny_config("linear")
  with jax.enable_x64(), pytest.raises(ValueError, match="unset JAX_ENABLE_X64"):
    program_lib.create_program(config, 3, 24, mesh)


def longer_config(**changes):
  own = {"optim__schedule": "constant", "optim__warmup_steps": 2}
  changes = {**own, "backbone__depth": 1, **changes}
  return tiny_config("linear", **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """The workdirs of a run of 2 epochs and of one of 4, and what the latter took."""
  folder = tmp_path_factory.mktemp("runs")
  for epochs in (2.0, 4.0):
    config = longer_config(total_epochs=epochs)
    prepared = prepare(config)
    trainer.train(config, folder / f"{epochs:g}", prepared=prepared)
  return folder / "2", folder / "4", prepared


def test_a_finished_run_with_a_constant_lr_is_prolonged_bit_for_bit(runs):
  short, long, prepared = runs
  config = longer_config(total_epochs=4.0)
  # Under way it is not taken for finished: its result is still the old one.
  config_file = short / "config.json"
  before = config_file.read_text()
  config_file.write_text(json.dumps(to_dict(config)))
  assert tune._finished_result(config, short, prepared) is None
  config_file.write_text(before)
  result = trainer.train(config, short, prepared=prepared)
  assert result["steps"] == 12
  assert_same(stored(short), stored(long))
  assert metrics(short) == metrics(long)
  assert tune._finished_result(config, short, prepared) == result


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"total_epochs": 3.0}, "total_epochs is 3.0, was 4.0. Use another workdir"),
    (
      {"total_epochs": 6.0, "optim__schedule": "cosine"},
      "total_epochs is 6.0, was 4.0; .*'cosine' ends with the run",
    ),
    (
      {"total_epochs": 6.0, "optim__wd": 0.5},
      "wd is 0.5, .*total_epochs is 6.0, was 4.0. Use",
    ),
  ],
)
def test_a_run_that_is_no_longer_one_is_left_alone(runs, changes, message):
  config, (_, long, _) = longer_config(**changes), runs
  with pytest.raises(ValueError, match=message):
    trainer.train(config, long, prepared=prepare(config))
  assert find_steps(long)[0].name == "12"

"""A run's data, read again after they changed: by name, by list, never by position."""

import json
import runpy
import shutil
import sys

import numpy as np
from PIL import Image
import pytest
from tiny_commands import make_place
from tiny_training import CLASSES, SPLITS, tiny_config, write_images

from insvp_jax.data import SPLITS_FILE, load_data
from insvp_jax.run import load_run
from insvp_jax.tools import evaluate, run_data
from insvp_jax.train import trainer

# None of this is about devices, and for one all compiles sooner.
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def train(tmp_path_factory):
  """Trains on a folder of images.

  The backbone is read: to draw one takes longest, and so it does whenever a run is
  loaded.
  """
  place = make_place(tmp_path_factory.mktemp("place"))
  backbone = {"depth": 1, "weights": str(place / "backbone0.npz")}

  def train(images, workdir, test=True, **changes):
    config = tiny_config("linear", **{"task": "folder", "total_epochs": 1.0} | changes)
    config.backbone.update(backbone)
    config.data.root = str(images)
    return trainer.train(config, workdir, test=test)

  return train


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
  """A folder of classes alone, whose splits were drawn, and the run on it."""
  place = tmp_path_factory.mktemp("drawn")
  write_images(place / "all", ("train",))
  (place / "all" / "train").rename(place / "images")
  train(place / "images", place / "run", data__val_fraction=0.25)
  return place


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
  """A copy of `trained` that a test may change; the run's root leads to it."""
  shutil.copytree(trained, tmp_path / "copy")

  def load(path, **options):
    run = load_run(path, **options)
    run.meta["config"]["data"]["root"] = str(tmp_path / "copy" / "images")
    return run

  monkeypatch.setattr("insvp_jax.run.load_run", load)
  return tmp_path / "copy"


def evaluated(place, capsys, *flags, status=0):
  assert evaluate.main(["--run", str(place / "run"), *flags]) == status
  printed = capsys.readouterr()
  return printed.out.splitlines(), printed.err.splitlines()


def test_the_splits_are_stored_and_the_root_is_absolute(train, trained, monkeypatch):
  stored = json.loads((trained / "run" / SPLITS_FILE).read_text())
  assert stored["class_names"] == list(CLASSES)
  files = {
    split: [name for names in by_class.values() for name in names]
    for split, by_class in stored["splits"].items()
  }
  assert sum(map(len, files.values())) == SPLITS["train"]
  assert len(set().union(*files.values())) == SPLITS["train"]
  monkeypatch.chdir(trained)
  train("images", trained / "relative", total_epochs=0.0, total_steps=1)
  run = load_run("relative")
  assert run.meta["config"]["data"]["root"] == str(trained / "images")


def test_a_share_of_the_images_is_read_again_as_it_was(
  train, trained, tmp_path, capsys
):
  result = train(trained / "images", tmp_path / "run", data__fraction=0.5)
  data = run_data.read(load_run(tmp_path / "run")).data
  # Neither the whole nor the half of the half, and of the same images.
  assert len(data.splits["train"]) == result["num_train_examples"] == 9
  assert "are not those of the run" not in capsys.readouterr().err


def test_a_run_that_was_not_tested_is_of_the_same_images(
  train, trained, tmp_path, capsys
):
  train(trained / "images", tmp_path / "run", test=False)
  run_data.read(load_run(tmp_path / "run"))
  assert "are not those of the run" not in capsys.readouterr().err


def test_a_photo_more_changes_nothing(place, capsys):
  before, _ = evaluated(place, capsys)
  Image.new("RGB", (16, 16)).save(place / "images" / "bee" / "new.png")
  after, notes = evaluated(place, capsys)
  assert after == before and notes == []


def test_a_class_more_changes_nothing(place, capsys):
  before, _ = evaluated(place, capsys)
  shutil.copytree(place / "images" / "bee", place / "images" / "aardvark")
  after, _ = evaluated(place, capsys)
  assert after == before


def test_a_renamed_class_is_one_line(place, capsys):
  (place / "images" / "ant").rename(place / "images" / "zebra")
  out, errors = evaluated(place, capsys, status=2)
  assert out == [] and len(errors) == 1
  assert "images that" in errors[0] and "first ant/" in errors[0]
  assert "was a folder renamed" in errors[0]


def test_other_pixels_under_the_same_names_are_said(place, capsys):
  run = json.loads((place / "run" / SPLITS_FILE).read_text())
  name = run["splits"]["test"]["ant"][0]
  Image.new("RGB", (16, 16), "white").save(place / "images" / name)
  out, notes = evaluated(place, capsys)
  assert len(out) == 2 and len(notes) == 1
  assert "are not those of the run" in notes[0]


def test_without_its_list_drawn_splits_are_refused_once_anything_changed(place, capsys):
  (place / "run" / SPLITS_FILE).unlink()
  out, notes = evaluated(place, capsys)
  assert len(out) == 2 and notes == []
  Image.new("RGB", (16, 16)).save(place / "images" / "bee" / "new.png")
  out, errors = evaluated(place, capsys, status=2)
  assert out == [] and "drawn anew" in errors[0] and "--root" in errors[0]


def test_another_folder_is_scored_by_the_names_of_its_classes(place, capsys):
  other = place / "other"
  for name in ("cat", "ant"):  # Without bee the labels are other numbers.
    shutil.copytree(place / "images" / name, other / name)
  run = load_run(place / "run")
  right = total = 0
  for name in ("ant", "cat"):
    paths = sorted((other / name).iterdir())
    found = run.predict(paths).argmax(axis=1)
    right += int(np.sum(found == CLASSES.index(name)))
    total += len(paths)
  out, _ = evaluated(place, capsys, f"--root={other}")
  assert out[0].startswith(f"all: accuracy {100 * right / total:.2f}%")
  assert out[0].endswith(f"{total} images")
  (other / "ant").rename(other / "elk")
  out, errors = evaluated(place, capsys, f"--root={other}", status=2)
  assert out == [] and "the class 'elk'" in errors[0] and "'ant'" in errors[0]


def make_case(shared_dir, name, out, monkeypatch):
  """Runs the make.py of a case."""
  monkeypatch.setattr(sys, "argv", ["make.py", str(out)])
  runpy.run_path(str(shared_dir / "cases" / name / "make.py"))


def test_noise_stays_noise_after_a_photo_was_added(
  train, shared_dir, tmp_path, monkeypatch, capsys
):
  make_case(shared_dir, "evaluate-changed", tmp_path, monkeypatch)
  train(tmp_path / "noise", tmp_path / "run")
  before, _ = evaluated(tmp_path, capsys)
  shutil.copy(tmp_path / "extra.png", tmp_path / "noise" / "p" / "extra.png")
  after, _ = evaluated(tmp_path, capsys)
  assert after == before
  # The same for a set with a test folder, of which a class is renamed.
  shutil.rmtree(tmp_path / "run")
  train(tmp_path / "named", tmp_path / "run")
  capsys.readouterr()
  (tmp_path / "named/test/cat").rename(tmp_path / "named/test/zebra")
  out, errors = evaluated(tmp_path, capsys, status=2)
  assert out == [] and "test/cat/" in errors[0]


def test_a_useless_model_shows(train, shared_dir, tmp_path, monkeypatch):
  make_case(shared_dir, "imbalance", tmp_path, monkeypatch)
  result = train(tmp_path / "skew", tmp_path / "run")
  by_class = result["test_by_class"]
  assert by_class["imbalance"] > 10
  assert by_class["worst_class"]["name"] == "rare"
  assert by_class["balanced_accuracy"] < 0.75


def test_copies_of_training_images_in_test_are_counted_and_can_be_left_out(
  shared_dir, tmp_path, monkeypatch, caplog
):
  make_case(shared_dir, "imbalance", tmp_path, monkeypatch)
  config = tiny_config("linear", task="folder")
  config.data.root = str(tmp_path / "copies")
  data = load_data("folder", config.data, 16)
  assert "30 pictures are in two splits (equal pixels), such as" in caplog.text
  assert "/copies: " in caplog.text and "config.data.duplicates=drop" in caplog.text
  config.data.duplicates = "drop"
  dropped = load_data("folder", config.data, 16)
  assert len(dropped.splits["test"]) == len(data.splits["test"]) == 30
  assert len(dropped.splits["train_val"]) == len(data.splits["train_val"]) - 30 == 30
  config.data.duplicates = "error"
  with pytest.raises(ValueError, match="Remove them, or set config.data.duplicates"):
    load_data("folder", config.data, 16)


def test_a_run_says_not_where_to_write(place, capsys, monkeypatch):
  run = load_run(place / "run")
  run.meta["config"]["data"] |= {"cache_dir": str(place / "cache"), "root": "x"}
  seen = []

  def load(task, config, size):
    seen.append(config)
    raise ValueError("enough")

  monkeypatch.setattr(run_data, "load_data", load)
  with pytest.raises(ValueError, match="enough"):
    run_data.read(run)
  assert seen[0].cache_dir == "off" and not (place / "cache").exists()

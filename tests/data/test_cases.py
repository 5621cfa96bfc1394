"""Image sets like those that people report: what each has to give."""

import functools
import subprocess
import sys

from data_fixtures import data_config
import numpy as np
import pytest

from insvp_jax import tools
from insvp_jax.data import load_data


@pytest.fixture(scope="module")
def make(shared_dir, tmp_path_factory):
  """Makes the sets of a case, once; returns their folder."""

  @functools.cache
  def made(name):
    out = tmp_path_factory.mktemp(name)
    script = shared_dir / "cases" / name / "make.py"
    if not script.exists():
      pytest.skip(f"no {script}")
    subprocess.run([sys.executable, str(script), str(out)], check=True)
    return out

  return made


def _sizes(root, **changes):
  data = load_data("folder", data_config(root=str(root), **changes), 8)
  return data.class_names, {name: len(split) for name, split in data.splits.items()}


def test_split_names(make):
  out = make("split-names")
  pets = ("cats", "dogs")
  sizes = {"train": 36, "val": 4, "test": 16, "train_val": 40}
  assert _sizes(out / "pets") == (pets, sizes)
  sizes = {"train": 54, "val": 6, "test": 24, "train_val": 60}
  assert _sizes(out / "scenes") == (("forest", "sea", "street"), sizes)
  sizes = {"train": 18, "val": 2, "test": 12, "train_val": 20}
  assert _sizes(out / "twice") == (pets, sizes)
  assert _sizes(out / "named_test")[0] == ("control", "test")
  assert _sizes(out / "named_train")[0] == ("bus", "train")


def test_symlinks(make):
  out = make("symlinks")
  _, sizes = _sizes(out / "valtest")
  assert sizes == {"train": 20, "val": 20, "test": 20, "train_val": 40}
  _, sizes = _sizes(out / "pool")
  assert (sizes["train_val"], sizes["test"]) == (40, 40)
  _, sizes = _sizes(out / "partial")
  assert (sizes["train_val"], sizes["test"]) == (30, 30)


def test_left_out(make, caplog):
  out = make("left-out")
  data = load_data("folder", data_config(root=str(out)), 8)
  labels = [data.splits[name].labels for name in ("train_val", "test")]
  # Two of them AVIF.
  assert np.bincount(np.concatenate(labels)).tolist() == [24, 26]
  assert "left out" not in caplog.text
  assert len(tools.find_images([str(out / "train" / "a")])) == 24
  assert len(tools.find_images([str(out / "train" / "b")])) == 26


@pytest.mark.parametrize(
  "name,number",
  [("mac", 40), ("broken", 40), ("clean", 40), ("hidden", 1), ("linked", 2)],
)
def test_predict_folder(make, name, number, capsys):
  images = tools.find_images([str(make("predict-folder") / name)])
  assert len(images) == number
  broken = []
  for image in images:
    try:
      image.read_pixels()
    except ValueError as error:
      broken.append(str(error))
  assert len(broken) == (name == "broken")
  assert all("37.png" in message for message in broken)
  said = capsys.readouterr().err
  assert ("left out 1 hidden (.ipynb_checkpoints/)" in said) == (name == "hidden")

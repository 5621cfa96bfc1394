"""tools/evaluate: what it prints is what the trainer found."""

import json
import re

import numpy as np
from PIL import Image
import pytest
from tiny_training import SPLITS, tiny_config, write_images

from insvp_jax.run import load_run
from insvp_jax.tools import evaluate
from insvp_jax.train import trainer

# None of this is about devices, and for one all compiles sooner.
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """Returns (workdir, result) of a training on a folder of images."""
  place = tmp_path_factory.mktemp("evaluate")
  # Of this preset, resized images would change if they were resized again.
  changes = {"backbone__depth": 1, "total_epochs": 1.0, "data__preset": "imagenet"}
  config = tiny_config("linear", task="folder", **changes)
  config.data.root = str(write_images(place / "images"))
  return place / "run", trainer.train(config, place / "run")


def test_it_agrees_with_the_trainer(finished, capsys):
  workdir, result = finished
  assert evaluate.main(["--run", str(workdir), "--splits", "val", "test"]) == 0
  lines = capsys.readouterr().out.splitlines()
  pattern = r"(\w+): accuracy ([\d.]+)%, loss ([\d.]+) nats, (\d+) images"
  found = {m[1]: m for m in map(re.compile(pattern).fullmatch, lines[::2])}
  assert list(found) == ["val", "test"]
  assert all(line.startswith("  95% interval of the acc") for line in lines[1::2])
  for name, match in found.items():
    assert float(match[2]) == pytest.approx(100 * result[f"{name}_accuracy"], abs=0.006)
    assert float(match[3]) > 0 and int(match[4]) == SPLITS[name]


def test_everything_else_that_it_writes(finished, capsys, tmp_path):
  workdir, result = finished
  flags = ["--run", str(workdir), "--ordered"]
  confusion = tmp_path / "confusion.csv"
  assert evaluate.main([*flags, "--by_class", f"--confusion={confusion}"]) == 0
  _, scored, titles, *rows = capsys.readouterr().out.splitlines()
  assert "quadratic kappa" in scored and titles.split()[0] == "class"
  assert [row.split()[0] for row in rows] == ["ant", "bee", "cat"]
  assert len(confusion.read_text().splitlines()) == 4
  assert evaluate.main([*flags, "--format=json", "--splits", "val", "test"]) == 0
  splits = json.loads(capsys.readouterr().out)["splits"]
  assert list(splits) == ["val", "test"]
  for name, scores in splits.items():
    assert scores["accuracy"] == pytest.approx(result[f"{name}_accuracy"])
    assert np.sum(scores["confusion"]) == SPLITS[name]


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--confusion=x.txt"], "cannot write a figure to 'x.txt'"),
    (["--confusion=x.csv", "--splits", "val", "test"], "--splits has 2; name one"),
  ],
)
def test_a_wrong_file_is_one_line(finished, capsys, flags, message):
  assert evaluate.main(["--run", str(finished[0]), *flags]) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1


def test_an_unknown_split_is_one_line(finished, capsys):
  assert evaluate.main(["--run", str(finished[0]), "--splits", "tset"]) == 2
  error = capsys.readouterr().err
  assert error.startswith("insvp_jax: --splits has 'tset'") and "train_val" in error


def test_classes_with_few_training_images_are_told_apart(tmp_path, capsys):
  rng = np.random.default_rng(0)
  sizes = {
    "train": {"ant": 24, "bee": 21, "cat": 6},
    "test": {"ant": 5, "bee": 5, "cat": 5},
  }
  for split, of_class in sizes.items():
    for label, (name, number) in enumerate(of_class.items()):
      for i in range(number):
        path = tmp_path / "images" / split / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = rng.integers(0, 180, (16, 16, 3), np.uint8)
        image[..., label] += 40
        Image.fromarray(image).save(path)
  changes = {"backbone__depth": 1, "total_epochs": 1.0, "data__val_fraction": 0.0}
  config = tiny_config("linear", task="folder", **changes)
  config.data.root = str(tmp_path / "images")
  result = trainer.train(config, tmp_path / "run")
  run = load_run(tmp_path / "run")
  assert run.meta["train_count"] == [24, 21, 6]
  right = {
    name: run.predict(sorted((tmp_path / "images/test" / name).iterdir())).argmax(1)
    == i
    for i, name in enumerate(sizes["test"])
  }
  medium = np.mean([right["ant"].mean(), right["bee"].mean()])
  assert result["test_by_class"]["groups"] == {
    "medium": {"accuracy": pytest.approx(medium), "num_classes": 2, "num_examples": 10},
    "few": {"accuracy": right["cat"].mean(), "num_classes": 1, "num_examples": 5},
  }
  assert evaluate.main(["--run", str(tmp_path / "run")]) == 0
  assert (
    f"(medium {100 * medium:.2f}% of 2 classes, few "
    f"{100 * right['cat'].mean():.2f}% of 1 classes), loss"
  ) in capsys.readouterr().out

"""tools/evaluate: what it prints is what the trainer found."""

import re

import pytest
from tiny_training import SPLITS, tiny_config, write_images

from insvp_jax.tools import evaluate
from insvp_jax.train import trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """Returns (workdir, result) of a training on a folder of images."""
  place = tmp_path_factory.mktemp("evaluate")
  config = tiny_config("linear", task="folder", total_epochs=1.0)
  config.data.root = str(write_images(place / "images"))
  return place / "run", trainer.train(config, place / "run")


def test_it_agrees_with_the_trainer(finished, capsys):
  workdir, result = finished
  assert evaluate.main(["--run", str(workdir), "--splits", "val", "test"]) == 0
  lines = capsys.readouterr().out.splitlines()
  pattern = r"(\w+): accuracy ([\d.]+)%, loss ([\d.]+) nats, (\d+) images"
  found = {m[1]: m for m in map(re.compile(pattern).fullmatch, lines)}
  assert list(found) == ["val", "test"]
  for name, match in found.items():
    assert float(match[2]) == pytest.approx(100 * result[f"{name}_accuracy"], abs=0.006)
    assert float(match[3]) > 0 and int(match[4]) == SPLITS[name]


def test_an_unknown_split_is_one_line(finished, capsys):
  assert evaluate.main(["--run", str(finished[0]), "--splits", "tset"]) == 2
  error = capsys.readouterr().err
  assert error.startswith("insvp_jax: --splits has 'tset'") and "train_val" in error

"""tools/export: the backbone of a run as an .npz that loads again."""

import json

import numpy as np
import pytest
from tiny_runs import make_run

from insvp_jax import trees
from insvp_jax.models import weights
from insvp_jax.tools import export


def test_the_backbone_comes_back_as_it_was(tmp_path, capsys):
  workdir, model, params = make_run(tmp_path / "run", "linear")
  output = tmp_path / "backbone.npz"
  command = ["--run", str(workdir), "--output", str(output), "--command", "train it"]
  assert export.main(command) == 0
  loaded = weights.load_backbone(str(output), model)
  expected = trees.flatten(params["backbone"])
  for name, leaf in trees.flatten(loaded).items():
    np.testing.assert_array_equal(leaf, expected[name])
  described = json.loads(output.with_suffix(".json").read_text())
  assert described["sha256"] == weights.file_digest(output)
  assert described["sha256"] in capsys.readouterr().out
  assert described["width"] == model.backbone.width and described["depth"] == 2
  assert described["test_accuracy"] == 0.5 and described["command"] == "train it"


def test_half_precision_is_half_the_size(tmp_path):
  workdir, _, _ = make_run(tmp_path / "run", "linear")
  sizes = {}
  for dtype in ("float32", "float16"):
    output = tmp_path / f"{dtype}.npz"
    flags = ["--run", str(workdir), "--output", str(output), "--dtype", dtype]
    assert export.main(flags) == 0
    with np.load(output) as file:
      sizes[dtype] = sum(file[name].nbytes for name in file.files)
  assert sizes["float32"] == 2 * sizes["float16"]


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--output", "backbone.npy"], "expected a path ending in .npz"),
    (["--output", "backbone.npz", "--dtype", "int8"], "int8"),
  ],
)
def test_bad_input_gives_one_line(tmp_path, monkeypatch, capsys, flags, message):
  monkeypatch.chdir(tmp_path)
  workdir, _, _ = make_run(tmp_path / "run", "linear")
  assert export.main(["--run", str(workdir), *flags]) == 2
  error = capsys.readouterr().err
  assert error.startswith("insvp_jax: ") and error.count("\n") == 1
  assert message in error
  assert not list(tmp_path.glob("backbone*"))


def test_no_run(tmp_path, capsys):
  flags = ["--run", str(tmp_path / "nothing"), "--output", "b.npz"]
  assert export.main(flags) == 2
  assert "no run at" in capsys.readouterr().err

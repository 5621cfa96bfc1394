"""tools/export: the backbone of a run as an .npz that loads again."""

import json

import jax
import numpy as np
import pytest
from tiny_runs import SIZE, make_run

from insvp_jax import trees
from insvp_jax.models import merging, weights
from insvp_jax.models.classifier import create_model
from insvp_jax.run import load_run
from insvp_jax.tools import export


@pytest.mark.parametrize(
  "name, flags",
  [
    ("backbone.npz", []),
    ("backbone.safetensors", []),
    ("backbone.safetensors", ["--names", "hf"]),
  ],
)
def test_the_backbone_comes_back_as_it_was(tmp_path, capsys, name, flags):
  workdir, model, params = make_run(tmp_path / "run", "linear")
  output = tmp_path / name
  command = ["--run", str(workdir), "--output", str(output), "--command", "train it"]
  assert export.main([*command, *flags]) == 0
  # The description beside it tells what the names do not.
  again = create_model(str(output), "linear", num_classes=3)
  assert again.backbone == model.backbone
  loaded = weights.load_backbone(str(output), model)
  expected = trees.flatten(params["backbone"])
  for name, leaf in trees.flatten(loaded).items():
    np.testing.assert_array_equal(leaf, expected[name])
  described = json.loads(output.with_suffix(".json").read_text())
  assert described["sha256"] == weights.file_digest(output)
  assert described["sha256"] in capsys.readouterr().out
  assert described["width"] == model.backbone.width and described["depth"] == 2
  assert described["test_accuracy"] == 0.5 and described["command"] == "train it"


def test_a_method_is_folded_into_what_others_read(tmp_path):
  workdir, model, params = make_run(tmp_path, "lora", method_kwargs={"rank": 2})
  output = tmp_path / "merged.safetensors"
  assert export.main([f"--run={workdir}", f"--output={output}"]) == 0
  loaded = trees.flatten(weights.load_backbone(str(output), model))
  merged = trees.flatten(merging.merge(model, params))
  assert loaded.keys() == merged.keys()
  assert all(np.array_equal(leaf, merged[name]) for name, leaf in loaded.items())
  plain = trees.flatten(params["backbone"])
  assert any(not np.array_equal(leaf, plain[name]) for name, leaf in loaded.items())


def test_the_head_comes_along_where_it_is_asked_for(tmp_path, capsys):
  workdir, model, params = make_run(tmp_path / "run", "linear")
  output = tmp_path / "backbone.npz"
  flags = ["--run", str(workdir), "--output", str(output), "--with_head"]
  assert export.main(flags) == 0
  described = json.loads(output.with_suffix(".json").read_text())
  assert described["head_classes"] == 3
  assert "head" not in weights.load_backbone(str(output), model)
  with_head = model.backbone.clone(head_classes=3)
  head = weights.load_backbone(str(output), with_head)["head"]
  for name in ("kernel", "bias"):
    np.testing.assert_array_equal(head[name], params["head"][name])
  workdir, _, _ = make_run(tmp_path / "mlp", "mlp")
  flags = ["--run", str(workdir), "--output", str(output), "--with_head"]
  assert export.main(flags) == 2
  assert "no head of one dense layer" in capsys.readouterr().err


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
  "scan, frozen_dtype", [(False, "float32"), (True, "float32"), (True, "int8")]
)
def test_a_method_that_can_be_folded_is(tmp_path, scan, frozen_dtype):
  sizes = {"depth": 2, "scan": scan}
  workdir, model, params = make_run(
    tmp_path / "run", "lora", method_kwargs={"rank": 2}, backbone_kwargs=sizes
  )
  output = tmp_path / "backbone.npz"
  flags = [f"--run={workdir}", f"--output={output}", f"--frozen_dtype={frozen_dtype}"]
  assert export.main(flags) == 0
  # In 8 bits what is written are the floats that these stand for.
  params = load_run(workdir, frozen_dtype=frozen_dtype).params
  plain = create_model(
    "mu/4", "linear", num_classes=3, image_size=SIZE, backbone_kwargs=sizes
  )
  backbone = weights.load_backbone(str(output), plain)
  images = np.random.default_rng(0).standard_normal((2, SIZE, SIZE, 3), np.float32)
  expected = jax.jit(model.apply)({"params": params}, images)
  exported = {"backbone": backbone, "head": params["head"]}
  logits = jax.jit(plain.apply)({"params": exported}, images)
  assert np.max(np.abs(logits - expected)) < 1e-5 * np.max(np.abs(expected))


def test_a_method_that_cannot_be_folded_gives_one_line(tmp_path, capsys):
  workdir, _, _ = make_run(tmp_path / "run", "vpt_deep")
  output = tmp_path / "backbone.npz"
  assert export.main(["--run", str(workdir), "--output", str(output)]) == 2
  error = capsys.readouterr().err
  assert "cannot be folded into a backbone" in error and error.count("\n") == 1
  assert not output.exists()


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--output", "backbone.npy"], "expected a path ending in .npz or .safetensors"),
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


def test_another_s_json_is_not_overwritten(tmp_path, capsys):
  workdir, _, _ = make_run(tmp_path / "run", "linear")
  (tmp_path / "x.json").write_text('{"mine": 1}')
  argv = ["--run", str(workdir), "--output", str(tmp_path / "x.npz")]
  assert export.main(argv) == 2
  assert "x.json is there already, and is no desc" in capsys.readouterr().err
  assert (tmp_path / "x.json").read_text() == '{"mine": 1}'
  assert not (tmp_path / "x.npz").exists()
  (tmp_path / "x.json").unlink()
  # Its own it replaces.
  assert export.main(argv) == export.main(argv) == 0

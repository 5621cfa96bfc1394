"""A run passed on: as one program for jax alone, as an adapter's folder, on the hub."""

import dataclasses
import json
from pathlib import Path
import re
import shutil
import subprocess
import sys
import textwrap
import types

import huggingface_hub
from huggingface_hub import errors
from jax import export as jax_export
import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import load_file, save_file
from tiny_runs import CLASSES, SIZE, make_run
import yaml

import insvp_jax
from insvp_jax import trees
from insvp_jax.checkpoints import adapters
from insvp_jax.checkpoints.files import Damaged
from insvp_jax.data import preprocess
from insvp_jax.models import layers
from insvp_jax.models.weights import downloads
from insvp_jax.run import load_run
from insvp_jax.tools import evaluate, export, hub, programs

RESULT = {"val_accuracy": 0.75, "test_accuracy": 0.5, "num_test_examples": 40}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(workdir, model, params) of a run of InsVP, with a result."""
  workdir, model, params = make_run(
    tmp_path_factory.mktemp("insvp"),
    meta={
      "config": {
        "task": "folder",
        "data": {"root": "/home/ann/photos", "cache_dir": "cache", "max_16bit": 4095},
      }
    },
  )
  (workdir / "result.json").write_text(json.dumps(RESULT))
  return workdir, model, params


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
  """The run's exported adapter."""
  output = tmp_path_factory.mktemp("exported") / "adapter"
  flags = [f"--run={made[0]}", "--format=adapter", f"--output={output}"]
  assert export.main(flags) == 0
  return output


@pytest.fixture
def copied(folder, tmp_path):
  return Path(shutil.copytree(folder, tmp_path / "copied"))


def pixels(*shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def edit_config(folder, **changes):
  file = folder / adapters.CONFIG
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite_arrays(folder, change):
  """Changes the arrays and what the description says of their file."""
  arrays = load_file(folder / adapters.ARRAYS)
  save_file(change(arrays), folder / adapters.ARRAYS)
  digest = downloads.file_digest(folder / adapters.ARRAYS)
  edit_config(folder, adapter_sha256=digest)


# One program.


def snippets(root):
  """Returns the Python of docs/ship.md: to predict, and TF1's resize."""
  text = (root / "docs" / "ship.md").read_text()
  return re.findall(r"```python\n(.*?)```", text, re.S)


# Every way to resize, by preset.
PRESETS = ("vtab", "insvp_release", "imagenet", "modern")


def test_the_program_needs_jax_alone_and_predicts_what_the_run_does(
  made, root, tmp_path
):
  for i, size in enumerate([(30, 20), (12, 9), (SIZE, SIZE)]):
    Image.fromarray(pixels(*size, 3, seed=i)).save(tmp_path / f"{i}.png")
  Image.fromarray(pixels(9, 40)).save(tmp_path / "3.png")
  photos = [str(tmp_path / f"{i}.png") for i in range(4)]
  # Any number of images at once.
  parts = {name: [photos] for name in PRESETS} | {"modern": [photos[:1], photos[1:]]}
  main, tf1 = snippets(root)
  code = "import os, sys\n" + textwrap.dedent(f"""
    class Absent:
      def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("insvp_jax", "flax"):
          raise ModuleNotFoundError(name)
    sys.meta_path.insert(0, Absent())
    sys.path[:] = [p for p in sys.path if p != {str(root)!r}]
    sys.path += {[path for path in sys.path if "packages" in path]!r}
    try:
      import insvp_jax
    except ModuleNotFoundError:
      pass
    else:
      sys.exit("the package is there")
    for name, parts in {parts!r}.items():
      os.chdir(os.path.join({str(tmp_path)!r}, name))
      scope = {{}}
      exec({main!r}, scope)
      if scope["how"]["filter"] == "tf1":
        exec({tf1!r}, scope)
      import numpy
      numpy.save("found.npy", numpy.concatenate([*map(scope["classify"], parts)]))
  """)
  # InsVP once, and what compiles quickest for the others.
  linear = load_run(make_run(tmp_path / "linear", "linear")[0])
  runs = {"vtab": load_run(made[0])}
  for name in PRESETS[1:]:
    runs[name] = dataclasses.replace(linear, preset=preprocess.get_preset(name))
  for name, run in runs.items():
    export.export_program(run, tmp_path / name / "model.stablehlo", "stablehlo")
  # Without site there are no .pth files, and so no editable install.
  subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
  for name, run in runs.items():
    found = np.load(tmp_path / name / "found.npy")
    np.testing.assert_allclose(found, run.predict(photos), atol=1e-5, err_msg=name)
    about = json.loads((tmp_path / name / "model.stablehlo.json").read_text())
    assert about["class_names"] == list(CLASSES)
    assert about["sha256"] == downloads.file_digest(tmp_path / name / about["file"])
    assert about["backbone"]["id"] == "backbone.npz"
    assert about["test_accuracy"] == 0.5


def test_a_program_in_8_bits_is_smaller_and_predicts_what_the_run_does(tmp_path):
  workdir, _, _ = make_run(tmp_path / "run", "linear")
  sizes = {}
  for frozen_dtype in ("float32", "int8"):
    path = tmp_path / f"{frozen_dtype}.stablehlo"
    flags = [f"--run={workdir}", "--format=stablehlo", f"--output={path}"]
    assert export.main([*flags, f"--frozen_dtype={frozen_dtype}"]) == 0
    sizes[frozen_dtype] = path.stat().st_size
  images = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
  found = jax_export.deserialize(bytearray(path.read_bytes())).call(images)
  expected = load_run(workdir, frozen_dtype="int8").predict(images)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  # Of the two blocks' kernels three bytes of four go; the code of the program stays.
  kernels = 2 * 12 * 32 * 32
  assert sizes["float32"] - sizes["int8"] > 2.5 * kernels


def test_a_program_of_fused_attention_is_no_device_s(tmp_path, monkeypatch):
  sizes = {"depth": 1, "fused_attention": True, "dtype": "bfloat16"}
  workdir, _, _ = make_run(tmp_path, "linear", backbone_kwargs=sizes)
  run = load_run(workdir)
  # As on a GPU, where it would be cuDNN's.
  monkeypatch.setattr(layers.jax, "default_backend", lambda: "gpu")
  programs.write_stablehlo(run, tmp_path / "m.stablehlo")
  program = jax_export.deserialize(bytearray((tmp_path / "m.stablehlo").read_bytes()))
  assert program.platforms == programs.PLATFORMS
  assert "cudnn" not in program.mlir_module()
  monkeypatch.undo()
  images = pixels(2, SIZE, SIZE, 3)
  np.testing.assert_allclose(program.call(images), run.predict(images), atol=0.02)


def test_what_cannot_be_a_program_is_one_line(made, tmp_path, monkeypatch, capsys):
  output = tmp_path / "m.stablehlo"
  flags = [f"--run={made[0]}", "--format=stablehlo", f"--output={output}"]
  monkeypatch.setattr(programs, "_MAX_BYTES", 1000)
  assert export.main(flags) == 2
  assert "holds less than 2; export the adapter" in capsys.readouterr().err

  def refuse(run, **options):
    raise NotImplementedError("no such operation\nand more")

  monkeypatch.setattr(programs, "_MAX_BYTES", 2**31)
  monkeypatch.setattr(programs, "classifier", refuse)
  assert export.main(flags) == 2
  error = capsys.readouterr().err
  assert "'insvp' cannot be exported for cpu, cuda, tpu: no such operation\n" in error
  assert not list(tmp_path.iterdir())


def test_onnx_without_its_converter_is_one_line(made, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "jax2onnx", None)
  flags = [f"--run={made[0]}", "--format=onnx", f"--output={tmp_path}/m.onnx"]
  assert export.main(flags) == 2
  assert "pip install 'insvp_jax[onnx]'" in capsys.readouterr().err


def test_onnx_runtime_predicts_what_the_run_does(made, tmp_path, monkeypatch, capsys):
  pytest.importorskip("jax2onnx")
  runtime = pytest.importorskip("onnxruntime")
  output = tmp_path / "m.onnx"
  flags = [f"--run={made[0]}", "--format=onnx", f"--output={output}"]
  # Kernels in 8 bits are written as floats.
  flags.append("--frozen_dtype=int8")
  assert export.main(flags) == 0
  images = pixels(5, SIZE, SIZE, 3)
  (found,) = runtime.InferenceSession(output).run(["probabilities"], {"images": images})
  expected = load_run(made[0], frozen_dtype="int8").predict(images)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  about = json.loads((tmp_path / "m.onnx.json").read_text())
  assert about["platforms"] == ["onnxruntime"] and about["largest_difference"] < 1e-5
  # What computes something else is not written.
  output.unlink()
  monkeypatch.setattr(programs, "_TOLERANCE", -1.0)
  assert export.main(flags) == 2
  assert "the converted program computes something else" in capsys.readouterr().err
  assert not output.exists()


# What comes in the wrong place.


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--format=stablehlo", "--output=m.npz"], "expected a path ending in .stablehlo"),
    (["--format=onnx", "--output=m"], "expected a path ending in .onnx"),
    (["--output=m.stablehlo"], "ending in .npz or .safetensors for --format=backbone"),
    (["--format=adapter", "--output=m.npz"], "expected a folder for an adapter"),
    (
      ["--format=adapter", "--output=m", "--names=hf"],
      "--names is of --format=backbone, not of adapter",
    ),
    (["--format=stablehlo", "--output=m.stablehlo", "--with_head"], "--with_head is"),
    (["--format=adapter", "--output=full"], "is there already, and is no exported"),
    (["--format=adapter", "--output=file"], "is there already, and is no exported"),
    (["--format=stablehlo", "--output=x.stablehlo"], "no description of a program"),
    (["--format=stablehlo", "--output=link.stablehlo"], "is a link to"),
  ],
)
def test_bad_input_is_one_line(made, tmp_path, monkeypatch, capsys, flags, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "photo").write_text("mine")
  (tmp_path / "file").write_text("mine")
  (tmp_path / "x.stablehlo.json").write_text('{"mine": 1}')
  (tmp_path / "link.stablehlo").symlink_to(tmp_path / "file")
  before = sorted(tmp_path.rglob("*"))
  assert export.main([f"--run={made[0]}", *flags]) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1
  assert sorted(tmp_path.rglob("*")) == before


def test_an_unknown_format_is_a_wrong_flag(capsys):
  with pytest.raises(SystemExit) as stop:
    export.main(["--run=x", "--format=tflite", "--output=m"])
  assert stop.value.code == 2
  assert "choose from" in capsys.readouterr().err


# The adapter's folder.


def test_an_adapter_is_the_run_again(made, folder):
  workdir, _, params = made
  assert sorted(p.name for p in folder.iterdir()) == sorted(adapters.FILES)
  stored = load_file(folder / adapters.ARRAYS)
  assert "prompter/common_prompt" in stored and "head/kernel" in stored
  assert not any(name.startswith("backbone/") for name in stored)
  run = load_run(folder, backbone=workdir / "backbone.npz")
  before, after = trees.flatten(params), trees.flatten(run.params)
  assert before.keys() == after.keys()
  for name, leaf in before.items():
    np.testing.assert_array_equal(after[name], leaf)
  assert run.class_names == CLASSES and run.result == RESULT and run.workdir == folder
  # Files are decoded as before.
  assert run.decode_options == load_run(workdir).decode_options


def test_what_was_trained_of_the_backbone_comes_along(tmp_path):
  workdir, _, params = make_run(tmp_path / "run", "bias")
  hub.export_adapter(load_run(workdir), tmp_path / "a")
  stored = load_file(tmp_path / "a" / adapters.ARRAYS)
  trained = [name for name in stored if name.startswith("backbone/")]
  assert trained and all(name.endswith("bias") for name in trained)
  run = load_run(tmp_path / "a", backbone=workdir / "backbone.npz")
  np.testing.assert_array_equal(
    trees.flatten(run.params)[trained[0]], trees.flatten(params)[trained[0]]
  )


def test_nothing_of_the_machine_is_passed_on(made, folder):
  for path in folder.iterdir():
    content = path.read_bytes().decode("utf-8", "replace")
    assert str(made[0]) not in content and "/home" not in content, path.name
  config = json.loads((folder / adapters.CONFIG).read_text())
  assert config["backbone"]["id"] == "backbone.npz"
  data = config["config"]["data"]
  assert data == {"root": "", "cache_dir": "", "max_16bit": 4095}
  meta = {
    "backbone": {"id": "weights/vit.npz", "source": "/data/weights/vit.npz"},
    "class_names": ["/m/0bt9lr"],
    "config": {"dam_vp": {"meta": "C:\\Users\\ann\\meta.npz"}, "method": "dam_vp"},
    "model": {"backbone": "timm/vit_tiny", "mean": [0.5]},
    "variant": "B/16",
  }
  assert adapters.public(meta) == {
    "backbone": {"id": "vit.npz"},
    "class_names": ["/m/0bt9lr"],
    "config": {"dam_vp": {"meta": "meta.npz"}, "method": "dam_vp"},
    "model": {"backbone": "timm/vit_tiny", "mean": [0.5]},
    "variant": "B/16",
  }


def test_an_adapter_takes_the_place_of_an_older_one(made, folder, tmp_path):
  run = load_run(folder, backbone=made[0] / "backbone.npz")
  for _ in range(2):
    hub.export_adapter(run, tmp_path / "again")
  for name in adapters.FILES:
    again = (tmp_path / "again" / name).read_bytes()
    assert again == (folder / name).read_bytes(), name


def test_without_its_backbone_one_line_says_which(folder, made, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(FileNotFoundError, match="'backbone.npz' .sha256 .*--backbone="):
    load_run(folder)
  sizes = {"depth": 1}
  other = make_run(tmp_path / "other", "linear", backbone_kwargs=sizes)[0]
  with pytest.raises(ValueError, match="is not the backbone 'backbone.npz'"):
    load_run(folder, backbone=other / "backbone.npz")


def test_an_adapter_has_no_data_to_be_judged_on(made, folder, capsys):
  flags = [f"--run={folder}", f"--backbone={made[0] / 'backbone.npz'}"]
  assert evaluate.main(flags) == 2
  error = capsys.readouterr().err
  assert "config.data.root" in error and error.count("\n") == 1


def test_damage_is_named(made, copied):
  load = {"backbone": made[0] / "backbone.npz"}
  arrays, whole = copied / adapters.ARRAYS, (copied / adapters.ARRAYS).read_bytes()
  arrays.write_bytes(whole[:-5])
  with pytest.raises(Damaged, match="cannot be read"):
    load_run(copied, **load)
  arrays.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
  with pytest.raises(Damaged, match="not the one that config.json beside it describes"):
    load_run(copied, **load)
  arrays.write_bytes(b"PK\x03\x04 and no archive")
  with pytest.raises(Damaged, match="it is npz, expected .safetensors"):
    load_run(copied, **load)
  arrays.write_bytes(whole)
  config = (copied / adapters.CONFIG).read_text()
  for text, message in (
    ("[1]", "holds a list, expected a JSON object"),
    ("{", "cannot be read"),
    (json.dumps(json.loads(config) | {"class_names": 3}), "class_names is 3, expected"),
    (json.dumps(json.loads(config) | {"adapter_sha256": 3}), "expected a text"),
    (json.dumps(json.loads(config) | {"result": {"test_accuracy": "1"}}), "a number"),
  ):
    (copied / adapters.CONFIG).write_text(text)
    with pytest.raises(Damaged, match=message):
      load_run(copied, **load)
  (copied / adapters.CONFIG).unlink()
  with pytest.raises(Damaged, match="config.json cannot be read: No such file"):
    load_run(copied, **load)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda a: a | {"head/scale": a["head/bias"]}, "has head/scale, which this model"),
    (lambda a: {n: x for n, x in a.items() if n != "head/bias"}, "lacks head/bias"),
    (lambda a: a | {"head/bias": a["head/bias"][:2]}, "got \\[2\\], expected \\[3\\]"),
    (
      lambda a: a | {"head/bias": a["head/bias"].astype(np.int32)},
      "got int32\\[3\\], expected float32\\[3\\]",
    ),
  ],
)
def test_arrays_of_another_model_are_refused(made, copied, change, message):
  rewrite_arrays(copied, change)
  with pytest.raises(ValueError, match=message):
    load_run(copied, backbone=made[0] / "backbone.npz")


def test_narrower_floats_are_cast_and_a_missing_digest_is_said(made, copied):
  rewrite_arrays(copied, lambda a: {n: x.astype(np.float16) for n, x in a.items()})
  edit_config(copied, adapter_sha256=None)
  with pytest.warns(UserWarning, match="names no sha256 of adapter.safetensors"):
    run = load_run(copied, backbone=made[0] / "backbone.npz")
  assert run.params["head"]["bias"].dtype == np.float32


# The model card.


def test_the_card_says_what_the_run_is(made, folder):
  _, front, text = (folder / adapters.CARD).read_text().split("---\n", 2)
  about = yaml.safe_load(front)
  assert about["library_name"] == "insvp_jax" and "license" not in about
  assert about["pipeline_tag"] == "image-classification" and "insvp" in about["tags"]
  (result,) = about["model-index"][0]["results"]
  assert result["metrics"][0]["value"] == 0.5 and result["dataset"]["split"] == "test"
  for line in ("| val | 75.00% |  |", "| test | 50.00% | 40 |"):
    assert f"\n{line}\n" in text
  sha256 = json.loads((folder / adapters.CONFIG).read_text())["backbone"]["sha256"]
  assert f"- sha256: `{sha256}`" in text
  assert "pass the file `backbone.npz`" in text and "\nant\nbee\n$cat$\n" in text


def test_a_card_of_what_nobody_has_evaluated(made):
  run = load_run(made[0])
  meta = {
    "backbone": {"id": "boxed", "sha256": "0"},
    "method": "insvp",
    "task": "`a|b`",
  }
  card = hub.model_card(run, meta, "user/name")
  front = yaml.safe_load(card.split("---\n", 2)[1])
  assert "model-index" not in front and "metrics" not in front
  assert "It has not been evaluated." in card and "of the task `'a'b'`" in card
  # A release is found by itself.
  assert "load_run('hf-hub:user/name')\n" in card
  remote = meta | {"backbone": {"id": "hf-hub:timm/vit_x@abc", "sha256": "0"}}
  card = hub.model_card(run, remote)
  assert yaml.safe_load(card.split("---\n", 2)[1])["base_model"] == "timm/vit_x"
  assert "pass the repository `hf-hub:timm/vit_x@abc`" in card


# On the hub.


@pytest.fixture
def repository(folder, monkeypatch):
  """The hub, with the exported adapter; returns what was asked for."""
  asked = []

  def download(name, file, revision=None, local_files_only=False, dry_run=False):
    if " " in name:
      raise errors.HFValidationError("no blanks")
    if local_files_only and name != "user/cached":
      raise errors.LocalEntryNotFoundError("not in the cache")
    if not (folder / file).is_file() or name == "user/other":
      raise errors.EntryNotFoundError("404")
    if dry_run:
      return types.SimpleNamespace(file_size=(folder / file).stat().st_size)
    asked.append((name, file, revision))
    return str(folder / file)

  monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
  monkeypatch.setattr(downloads, "_look_up", lambda url: None)
  return asked


def test_a_run_of_the_hub_is_two_files_of_a_revision(made, repository):
  backbone = made[0] / "backbone.npz"
  run = load_run("hf-hub:user/name@abc", backbone=backbone)
  assert run.class_names == CLASSES
  files = [adapters.CONFIG, adapters.ARRAYS]
  assert repository == [("user/name", file, "abc") for file in files]
  repository.clear()
  load_run("hf-hub:user/name", backbone=backbone)
  assert [revision for _, _, revision in repository] == [None, None]


def test_a_commit_that_comes_between_two_files_changes_nothing(
  made, folder, repository, tmp_path, monkeypatch
):
  commit = "0123456789" * 4
  snapshot = Path(shutil.copytree(folder, tmp_path / "snapshots" / commit))
  plain = huggingface_hub.hf_hub_download

  def download(*args, **kwargs):
    found = plain(*args, **kwargs)
    return str(snapshot / Path(found).name) if isinstance(found, str) else found

  monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
  load_run("hf-hub:user/name", backbone=made[0] / "backbone.npz")
  assert [revision for _, _, revision in repository] == [None, commit]


def test_what_the_hub_does_not_give_is_one_line(made, repository, monkeypatch):
  with pytest.raises(FileNotFoundError, match="user/other could not be had .it has no"):
    load_run("hf-hub:user/other")
  with pytest.raises(ValueError, match="no name of a repository: no blanks"):
    load_run("hf-hub:a b")
  monkeypatch.setenv(downloads.LIMIT_VARIABLE, "1e-9")
  with pytest.raises(ValueError, match="user/name has more than"):
    load_run("hf-hub:user/name")
  assert not repository


def test_offline_a_run_comes_from_the_cache(made, repository, monkeypatch):
  def look_up(url):
    raise OSError(-2, "Name or service not known")

  monkeypatch.setattr(downloads, "_look_up", look_up)
  load_run("hf-hub:user/cached", backbone=made[0] / "backbone.npz")
  with pytest.raises(FileNotFoundError, match="Name or service not known"):
    load_run("hf-hub:user/name")


def test_a_stranger_s_run_requests_nothing_and_executes_nothing(
  folder, repository, monkeypatch, tmp_path
):
  monkeypatch.setenv("INSVP_CACHE", str(tmp_path))

  def refuse(*args, **kwargs):
    raise AssertionError("a request")

  monkeypatch.setattr(downloads, "_receive", refuse)
  config = (folder / adapters.CONFIG).read_text()
  try:
    for name in ("hf-hub:evil/weights", "https://evil.example/x.safetensors"):
      edit_config(folder, backbone={"id": name, "sha256": "0"})
      with pytest.raises(FileNotFoundError, match="is not requested"):
        load_run("hf-hub:user/name")
    assert {name for name, _, _ in repository} == {"user/name"}
    model = json.loads(config)["model"] | {"method": "os"}
    edit_config(folder, model=model)
    with pytest.raises(ValueError, match="with the method 'os', which is none of this"):
      load_run("hf-hub:user/name")
  finally:
    (folder / adapters.CONFIG).write_text(config)


def test_a_run_is_pushed_with_its_card(made, monkeypatch):
  seen = {}

  class Api:
    def __init__(self, token=None):
      seen["token"] = token

    def create_repo(self, name, private=None, exist_ok=False):
      if name == "taken/name":
        raise OSError("403 Forbidden\nfor url")
      if " " in name:
        raise errors.HFValidationError("no blanks")
      seen["made"] = (name, private, exist_ok)

    def upload_folder(self, *, repo_id, folder_path, revision, commit_message):
      seen["files"] = sorted(path.name for path in Path(folder_path).iterdir())
      seen["card"] = (Path(folder_path) / adapters.CARD).read_text()
      seen["uploaded"] = (repo_id, revision, commit_message)
      return types.SimpleNamespace(oid="abc")

  monkeypatch.setattr(huggingface_hub, "HfApi", Api)
  run = load_run(made[0])
  options = {"private": True, "token": "t", "revision": "dev", "commit_message": "m"}
  name = insvp_jax.push_to_hub(run, "user/name", **options)
  assert name == "hf-hub:user/name@abc" and seen["token"] == "t"
  assert seen["made"] == ("user/name", True, True)
  assert seen["uploaded"] == ("user/name", "dev", "m")
  assert seen["files"] == sorted(adapters.FILES)
  assert "load_run('hf-hub:user/name', backbone=" in seen["card"]
  with pytest.raises(OSError, match="could not be uploaded: 403 Forbidden for url. L"):
    insvp_jax.push_to_hub(run, "taken/name")
  with pytest.raises(ValueError, match="'a b' is no name of a repository"):
    insvp_jax.push_to_hub(run, "a b")

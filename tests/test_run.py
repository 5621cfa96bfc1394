import dataclasses
import functools
import json
import shutil
import subprocess
import sys

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from tiny_runs import CLASSES, SIZE, make_run

from insvp_jax import tools, trees
from insvp_jax.checkpoints.files import write_checksums
from insvp_jax.data import preprocess
from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.models.classifier import create_model
from insvp_jax.models.weights import downloads
from insvp_jax.run import load_run
from insvp_jax.tools import predict
from insvp_jax.train import state as state_lib


def draw(*shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  return make_run(tmp_path_factory.mktemp("insvp"))


@pytest.fixture(scope="module")
def run(made):
  return load_run(made[0])


def edit_meta(workdir, **changes):
  """Changes a run's description as if it had been written so."""
  where = workdir / "checkpoints" / "1"
  file = where / "meta" / "metadata"
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))
  write_checksums(where)


def dtypes(tree):
  return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


@pytest.fixture
def copy(made, tmp_path):
  shutil.copytree(made[0] / "checkpoints", tmp_path / "checkpoints")
  return tmp_path


def test_the_parameters_come_back_exactly(made, run):
  _, _, params = made
  expected, got = trees.flatten(params), trees.flatten(run.params)
  assert sorted(got) == sorted(expected)
  for name, leaf in expected.items():
    np.testing.assert_array_equal(got[name], leaf, err_msg=name)
  assert run.class_names == CLASSES
  assert run.result == {"test_accuracy": 0.5}
  assert run.meta["task"] == "insects"


def test_predict_is_the_model_on_preprocessed_images(made, run):
  _, model, params = made
  images = draw(3, SIZE, SIZE, 3)
  inputs = preprocess.eval_preprocess(run.preset, jnp.asarray(images), SIZE)
  expected = jax.nn.softmax(jax.jit(model.apply)({"params": params}, inputs))
  got = run.predict(images)
  assert got.shape == (3, len(CLASSES)) and got.dtype == np.float32
  np.testing.assert_allclose(got, expected, atol=1e-5)
  np.testing.assert_allclose(got.sum(axis=1), 1, atol=1e-5)
  np.testing.assert_allclose(run.preprocess(images), inputs, atol=1e-6)
  features = jax.jit(functools.partial(model.apply, method="features"))
  expected = features({"params": params}, inputs)
  np.testing.assert_allclose(run.features(images), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["imagenet", "insvp_release", "vtab"])
def test_resized_images_are_taken_as_they_are(copy, name):
  edit_meta(copy, preset=name)
  run = load_run(copy)
  images = draw(2, 20, 30, 3)
  squares = np.stack([preprocess.resize(run.preset, image, SIZE) for image in images])
  expected = run.preprocess(list(images))
  np.testing.assert_array_equal(
    run.preprocess(squares.view(preprocess.Resized)), expected
  )
  again = [square.view(preprocess.Resized) for square in squares]
  np.testing.assert_array_equal(run.preprocess(again), expected)
  with pytest.raises(ValueError, match="a resized image is 20 x 30 pixels, expected"):
    run.predict(images.view(preprocess.Resized))


def test_prompts_have_the_documented_forms(run):
  found = run.prompts(draw(5, 40, 30, 3))
  image, depth, width = (5, SIZE, SIZE, 3), 2, run.model.backbone.width
  assert {name: array.shape for name, array in found.items()} == {
    "patch": image,
    "global": image,
    "image": image,
    "specific": (5, 2, width),
    "feature": (depth, 5, 2, width),
  }
  images = draw(5, 40, 30, 3)
  np.testing.assert_allclose(
    run.prompted(images), run.preprocess(images) + found["image"], atol=1e-5
  )


@pytest.mark.parametrize("count", [1, 2, 33])
def test_an_image_gets_the_same_in_any_company(run, count):
  images = draw(count, SIZE, SIZE, 3)
  alone = run.predict(images[-1])
  assert alone.shape == (1, len(CLASSES))
  np.testing.assert_allclose(run.predict(images)[-1:], alone, atol=1e-5)
  feature = run.prompts(images)["feature"]
  assert feature.shape[1] == count
  np.testing.assert_allclose(
    feature[:, -1:], run.prompts(images[-1])["feature"], atol=1e-5
  )


def test_images_of_any_size_and_kind(run, tmp_path):
  sizes = [(20, 30), (7, 9), (SIZE, SIZE)]
  images = [draw(*size, 3, seed=i) for i, size in enumerate(sizes)]
  paths = [tmp_path / f"{i}.png" for i in range(len(images))]
  for path, image in zip(paths, images, strict=True):
    Image.fromarray(image).save(path)
  expected = run.predict(images)
  np.testing.assert_array_equal(run.predict(paths), expected)
  np.testing.assert_array_equal(run.predict([str(path) for path in paths]), expected)
  np.testing.assert_allclose(run.predict(str(paths[1])), expected[1:2], atol=1e-5)
  np.testing.assert_allclose(run.predict(jnp.asarray(images[0])), expected[:1], 1e-4)


def test_files_are_decoded_as_those_that_the_run_was_trained_on(run, tmp_path):
  grey = draw(SIZE, SIZE).astype(np.uint16) * 16
  Image.fromarray(grey).save(tmp_path / "12bit.png")
  Image.fromarray(grey * 16).save(tmp_path / "16bit.png")
  meta = {**run.meta, "config": {"data": {"max_16bit": 4095}}}
  of_12_bits = dataclasses.replace(run, meta=meta)
  expected = run.preprocess(tmp_path / "16bit.png")
  (image,) = tools.find_images([str(tmp_path / "12bit.png")])
  for images in (tmp_path / "12bit.png", [image]):
    np.testing.assert_allclose(of_12_bits.preprocess(images), expected, atol=0.02)


def test_what_is_no_image_is_refused(run, tmp_path):
  (tmp_path / "bad.jpg").write_bytes(b"not an image")
  with pytest.raises(ValueError, match="bad.jpg is not an image"):
    run.predict(tmp_path / "bad.jpg")
  with pytest.raises(FileNotFoundError, match="nowhere.png"):
    run.predict("nowhere.png")
  with pytest.raises(
    ValueError, match=r"float32\[4, 4, 3\], expected uint8\[h, w, 3\]"
  ):
    run.predict(np.zeros((4, 4, 3), np.float32))
  with pytest.raises(ValueError, match=r"uint8\[4, 4\]"):
    run.predict(np.zeros((4, 4), np.uint8))
  with pytest.raises(ValueError, match="no pixels"):
    run.predict(np.zeros((0, 4, 3), np.uint8))
  for nothing in ([], np.zeros((0, 4, 4, 3), np.uint8), None):
    with pytest.raises(ValueError, match="no images"):
      run.predict(nothing)


def test_shown_pixels_are_those_of_the_image(run):
  images = draw(2, SIZE, SIZE, 3)
  pixels = run.to_pixels(run.preprocess(images))
  np.testing.assert_allclose(pixels, images / 255, atol=1e-6)


def test_trained_on_four_devices_loaded_on_one(tmp_path, make_mesh):
  mesh = make_mesh(4)
  workdir, _, params = make_run(tmp_path, sharding=mesh_lib.replicated(mesh))
  device = jax.devices()[2]
  run = load_run(workdir, device=device)
  for name, leaf in trees.flatten(run.params).items():
    assert leaf.devices() == {device}
    np.testing.assert_array_equal(leaf, trees.flatten(params)[name])
  assert np.isfinite(run.predict(draw(SIZE, SIZE, 3))).all()


@pytest.mark.parametrize("method", ["linear", "vpt_deep", "bias"])
def test_other_methods(tmp_path, method):
  workdir, model, params = make_run(tmp_path, method)
  run = load_run(workdir)
  images = draw(2, SIZE, SIZE, 3)
  inputs = run.preprocess(images)
  logits = jax.jit(model.apply)({"params": params}, inputs)
  np.testing.assert_allclose(run.predict(images), jax.nn.softmax(logits), atol=1e-5)
  assert set(run.prompts(images)) == ({"feature"} if method == "vpt_deep" else set())
  np.testing.assert_array_equal(run.prompted(images), inputs)


def test_a_run_that_trained_everything_needs_no_backbone_file(tmp_path):
  workdir, _, params = make_run(tmp_path, "full", patterns=[".*"])
  (workdir / "backbone.npz").unlink()
  got = trees.flatten(load_run(workdir).params)
  for name, leaf in trees.flatten(params).items():
    np.testing.assert_array_equal(got[name], leaf)


def test_a_random_backbone_is_drawn_again(tmp_path):
  kwargs = {"backbone": "mu/4", "method": "linear", "num_classes": len(CLASSES)}
  kwargs |= {"image_size": SIZE, "backbone_kwargs": {"depth": 1}}
  drawn = state_lib.init_params(create_model(**kwargs), seed=5)["backbone"]
  identity = {"id": "random", "seed": 5, "sha256": trees.digest(drawn)}
  workdir, _, _ = make_run(tmp_path, meta={"backbone": identity}, **kwargs)
  run = load_run(workdir)
  assert trees.digest(run.params["backbone"]) == identity["sha256"]
  edit_meta(workdir, backbone={**identity, "seed": 6})
  with pytest.raises(ValueError, match="drawing it again gave sha256 .* expected"):
    load_run(workdir)


def test_frozen_weights_keep_the_type_they_were_trained_in(copy):
  edit_meta(copy, config={"backbone": {"frozen_dtype": "bfloat16"}})
  run = load_run(copy)
  assert dtypes(run.params["backbone"]) == {"bfloat16"}
  assert dtypes(run.params["head"]) == {"float32"}


def test_frozen_kernels_are_8_bits_where_they_were_or_are_asked_to_be(copy):
  asked = load_run(copy, frozen_dtype="int8")
  edit_meta(copy, config={"backbone": {"frozen_dtype": "int8"}})
  assert dtypes(load_run(copy, frozen_dtype="float32").params) == {"float32"}
  run = load_run(copy)
  backbone = trees.flatten(run.params["backbone"])
  for name, leaf in backbone.items():
    assert leaf.dtype == (jnp.int8 if name.endswith("kernel") else jnp.float32), name
  assert dtypes(run.params["head"]) == dtypes(run.params["prompter"]) == {"float32"}
  assert trees.digest(run.params) == trees.digest(asked.params)
  # What a plain backbone of these weights says.
  floats = {name: jnp.asarray(np.asarray(leaf)) for name, leaf in backbone.items()}
  params = {**run.params, "backbone": trees.unflatten(floats)}
  image = np.random.default_rng(0).integers(0, 256, (1, SIZE, SIZE, 3), np.uint8)
  expected = dataclasses.replace(run, params=params).predict(image)
  np.testing.assert_allclose(run.predict(image), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["int4", ""])
def test_an_unknown_type_of_frozen_weights_is_refused(copy, dtype):
  expected = "frozen_dtype is .*, expected one of 'float32', 'bfloat16', 'int8'"
  with pytest.raises(ValueError, match=expected):
    load_run(copy, frozen_dtype=dtype)
  edit_meta(copy, config={"backbone": {"frozen_dtype": dtype}})
  with pytest.raises(ValueError, match=expected):
    load_run(copy)


def test_another_backbone_is_refused(made, copy, tmp_path_factory):
  other = make_run(tmp_path_factory.mktemp("other"), "linear", num_classes=3)[0]
  right, wrong = made[0] / "backbone.npz", other / "backbone.npz"
  wrong.write_bytes(right.read_bytes()[:-1] + b"x")
  with pytest.raises(ValueError, match=f"{wrong} has sha256 .*, expected .*Pass load"):
    load_run(copy, backbone=wrong)
  assert load_run(copy, backbone=right).class_names == CLASSES


def test_a_backbone_that_has_moved(made, copy):
  identity = json.loads((copy / "checkpoints/1/meta/metadata").read_text())["backbone"]
  edit_meta(copy, backbone={**identity, "id": "gone/backbone.npz"})
  with pytest.raises(FileNotFoundError, match="gone/backbone.npz.*--backbone=<path>"):
    load_run(copy)
  source = str(made[0] / "backbone.npz")
  edit_meta(copy, backbone={**identity, "id": "gone/backbone.npz", "source": source})
  assert load_run(copy).class_names == CLASSES


@pytest.fixture
def requests(monkeypatch):
  """What is asked for of the network, which there is not."""
  asked = []

  def download(url, *args):
    asked.append(url)
    raise OSError("no network")

  def hub_download(repository, file, local_files_only=False, **options):
    asked.extend([] if local_files_only else [repository])
    raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")

  monkeypatch.setattr(downloads, "_download", download)
  monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub_download)
  monkeypatch.setattr(downloads, "_look_up", asked.append)
  return asked


@pytest.mark.parametrize(
  "name",
  [
    *("http://127.0.0.1:9/x.npz", "https://example.org/x.npz", "gs://bucket/x.npz"),
    *("timm/x", "hf-hub:a/b"),
  ],
)
def test_a_run_makes_nobody_request_an_address(made, copy, requests, name):
  meta = json.loads((copy / "checkpoints/1/meta/metadata").read_text())
  edit_meta(copy, backbone={**meta["backbone"], "id": name, "source": name})
  with pytest.raises(FileNotFoundError, match="is not requested. .*--backbone=<path>"):
    load_run(copy)
  # Nor by leaving out what the file would tell.
  edit_meta(copy, model={**meta["model"], "backbone": name, "backbone_kwargs": {}})
  with pytest.raises(ValueError, match="is not requested because a run names it"):
    load_run(copy, backbone=made[0] / "backbone.npz")
  assert not requests
  # The reader may ask for it.
  edit_meta(copy, model=meta["model"])
  assert load_run(copy, backbone=made[0] / "backbone.npz").class_names == CLASSES
  if not name.startswith("http:"):
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
      load_run(copy, backbone=name)
    assert requests


def test_a_run_may_name_a_release(copy, requests, monkeypatch, tmp_path):
  monkeypatch.setenv("INSVP_CACHE", str(tmp_path / "cache"))
  identity = json.loads((copy / "checkpoints/1/meta/metadata").read_text())["backbone"]
  edit_meta(copy, backbone={**identity, "id": "vit_b16_i21k"})
  with pytest.raises(FileNotFoundError, match="no network"):
    load_run(copy)
  (url,) = requests
  assert url.startswith("https://storage.googleapis.com/vit_models/")


def test_of_a_backbone_without_a_digest_something_is_said(copy):
  identity = json.loads((copy / "checkpoints/1/meta/metadata").read_text())["backbone"]
  for sha256 in (None, ""):
    edit_meta(copy, backbone={"id": identity["id"], "sha256": sha256})
    with pytest.warns(UserWarning, match="names no sha256 of its backbone"):
      load_run(copy)


def test_names_of_classes_move_no_cursor(copy, tmp_path, capsys):
  edit_meta(copy, class_names=["a\x1b[2J", "b\r\n", "c\u202e"])
  assert load_run(copy).class_names == (r"a\x1b[2J", r"b\r\n", r"c\u202e")
  Image.fromarray(draw(SIZE, SIZE, 3)).save(tmp_path / "x.png")
  assert predict.main(["--run", str(copy), str(tmp_path / "x.png")]) == 0
  printed = capsys.readouterr().out
  assert len(printed.splitlines()) == 4
  assert all(line.isprintable() for line in printed.splitlines())


def test_a_run_that_contradicts_itself_is_refused(made, copy):
  meta = json.loads((copy / "checkpoints/1/meta/metadata").read_text())
  edit_meta(copy, format=2)
  with pytest.raises(ValueError, match="format 2, expected 1"):
    load_run(copy)
  edit_meta(copy, format=1, class_names=["a"])
  with pytest.raises(ValueError, match="1 class names for 3 classes"):
    load_run(copy)
  names = ["a", "b", "c", "d"]
  model = {**meta["model"], "num_classes": 4}
  edit_meta(copy, class_names=names, model=model)
  with pytest.raises(ValueError, match=r"head/bias: got \[3\], expected \[4\]"):
    load_run(copy)
  model = {**meta["model"], "method": "linear", "method_kwargs": {}}
  edit_meta(copy, class_names=meta["class_names"], model=model)
  with pytest.raises(ValueError, match="another model or method: it has prompter/"):
    load_run(copy)
  (copy / "checkpoints/1/meta/metadata").write_text("{")
  write_checksums(copy / "checkpoints/1")
  with pytest.raises(ValueError, match="meta/metadata cannot be read"):
    load_run(copy)


def test_paths_that_mean_a_run(made, tmp_path):
  workdir = made[0]
  for path in (workdir / "checkpoints", workdir / "checkpoints/1", str(workdir)):
    assert load_run(path).result == {"test_accuracy": 0.5}
  parent = tmp_path / "insvp"
  shutil.copytree(workdir, parent / "seed0")
  with pytest.raises(FileNotFoundError, match="holds 1 run: give .*/insvp/seed0"):
    load_run(parent)


def test_loading_imports_neither_tensorflow_nor_figures(made, root):
  code = (
    "import sys\n"
    "from insvp_jax.run import load_run\n"
    "import numpy as np\n"
    f"load_run({str(made[0])!r}).predict(np.zeros((4, 4, 3), np.uint8))\n"
    "heavy = 'tensorflow', 'tensorboard', 'matplotlib', 'sklearn'\n"
    "print([name for name in heavy if name in sys.modules])"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=root, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == "[]"


def test_a_damaged_result_costs_only_itself(made, copy):
  (copy / "result.json").write_text('{"test_acc')
  with pytest.warns(
    UserWarning, match="result.json cannot be read.*without its result"
  ):
    assert load_run(copy).result is None


def test_without_checksums_it_is_said(copy):
  (copy / "checkpoints/1/checksums.json").unlink()
  with pytest.warns(UserWarning, match="has no checksums.json: nothing tells whether"):
    load_run(copy)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"class_names": "ant"}, "class_names is 'ant', expected a list"),
    (
      {"class_names": ["ant", 3, "bee"]},
      "an item of class_names is 3, expected a text",
    ),
    ({"model": []}, "model is , expected an object"),
    ({"model": {"backbone": 3}}, "model.backbone is 3, expected a text"),
    ({"model": {"backbone": "mu/4"}}, r"lacks \['model.num_classes'\]"),
    ({"backbone": {}}, r"lacks \['backbone.id'\]"),
    ({"backbone": {"id": "random"}}, r"lacks \['backbone.seed'\]"),
    ({"preset": None}, r"lacks \['preset'\]"),
    ({"trainable": {"a": 1}}, "trainable is .*, expected a list"),
    ({"config": {"data": {"max_pixels": "x"}}}, "config.data.max_pixels is 'x'"),
    ({"format": True}, "format is True, expected a whole number"),
  ],
)
def test_a_description_with_other_types_is_one_line(copy, changes, message):
  edit_meta(copy, **changes)
  with pytest.raises(ValueError, match=message) as found:
    load_run(copy)
  assert "\n" not in str(found.value)


def test_names_that_would_move_the_cursor_are_escaped(copy):
  edit_meta(copy, class_names=["ant", "\x1b[2J", "bee"])
  assert load_run(copy).class_names == ("ant", "\\x1b[2J", "bee")

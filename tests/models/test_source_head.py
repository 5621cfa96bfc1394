"""The head that a backbone was trained with: kept where asked, and read by methods."""

import io
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from tiny_runs import draw_backbone

from insvp_jax import trees
from insvp_jax.data import preprocess
from insvp_jax.models.classifier import create_model
from insvp_jax.models.weights.load import load_backbone, save_backbone
from insvp_jax.models.weights.releases import ASSETS
from insvp_jax.train import state as state_lib

SIZES = {"width": 8, "depth": 2, "mlp_dim": 16, "num_heads": 2, "patch_size": 4}
CLASSES = 5


def model_of(method="linear", head_classes=CLASSES, **fields):
  return create_model(
    "B/16",
    method,
    num_classes=3,
    image_size=8,
    backbone_kwargs={**SIZES, "head_classes": head_classes},
    method_kwargs=fields,
  )


@pytest.fixture
def saved(tmp_path):
  """Returns (path of a file with a head, the leaves in it)."""
  params = draw_backbone(state_lib.param_shapes(model_of())["backbone"])
  save_backbone(params, tmp_path / "vit.npz")
  return tmp_path / "vit.npz", trees.flatten(params)


@pytest.mark.parametrize("scan", [False, True])
def test_the_head_is_read_where_it_is_asked_for(saved, scan):
  path, leaves = saved
  model = model_of()
  model = model.clone(backbone=model.backbone.clone(scan=scan))
  loaded = trees.flatten(load_backbone(path, model))
  for name in ("head/kernel", "head/bias"):
    assert leaves[name].any() and np.array_equal(loaded[name], leaves[name])
  assert "head/kernel" not in trees.flatten(load_backbone(path, model_of("linear", 0)))

  params = {"backbone": trees.unflatten(loaded)}
  rng = np.random.default_rng(1)
  images = jax.device_put(rng.standard_normal((2, 8, 8, 3), np.float32))
  variables = {"params": params}
  logits, feature = jax.jit(
    lambda variables: tuple(
      model.apply(variables, images, method=name)
      for name in ("source_logits", "features")
    )
  )(variables)
  expected = np.asarray(feature) @ leaves["head/kernel"] + leaves["head/bias"]
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def test_the_backbone_in_the_box_has_its_ten_classes_where_asked():
  kwargs = {"num_classes": 3, "backbone_kwargs": {"head_classes": 10}}
  head = load_backbone("boxed", create_model("boxed", "linear", **kwargs))["head"]
  assert head["kernel"].shape == (128, 10) and np.ptp(head["kernel"]) > 0.1
  assert "head" not in load_backbone("boxed", create_model("boxed", num_classes=3))


def test_the_backbone_in_the_box_knows_cifar_10(shared_dir):
  with np.load(shared_dir / "data" / "cifar10_test.npz") as file:
    labels, ends = file["labels"][:1000], file["offsets"][:1001]
    jpeg = file["jpeg"][: ends[-1]].tobytes()
  images = np.stack(
    [Image.open(io.BytesIO(jpeg[i:j])) for i, j in itertools.pairwise(ends.tolist())]
  )
  kwargs = {"num_classes": 2, "backbone_kwargs": {"head_classes": 10}}
  model = create_model("boxed", "linear", **kwargs)
  backbone = load_backbone("boxed", model)

  @jax.jit
  def classes(images):
    inputs = preprocess.normalise(preprocess.get_preset("cifar"), images)
    params = {"params": {"backbone": backbone}}
    return jnp.argmax(model.apply(params, inputs, method="source_logits"), axis=1)

  described = json.loads((ASSETS / "boxed.json").read_text())
  accuracy = np.mean(np.asarray(classes(images)) == labels)
  # Of 1,000 of the 10,000 images: more than two standard errors.
  assert abs(accuracy - described["test_accuracy"]) < 0.032


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"head/kernel": np.zeros((8, CLASSES))}, "all zeros, as that of the IN-21k"),
    ({"pre_logits/kernel": np.zeros((8, 8))}, "reads a layer 'pre_logits'"),
    ({"head/kernel": np.ones((8, 7))}, r"backbone_kwargs=\{'head_classes': 7\}"),
    ({"head/kernel": None, "head/bias": None}, "only the model has: head/bias"),
  ],
)
def test_a_head_that_cannot_be_read_is_refused(saved, changes, message):
  path, leaves = saved
  leaves = {**leaves, **changes}
  arrays = {n: np.float32(x) for n, x in leaves.items() if x is not None}
  np.savez(path, **arrays)
  with pytest.raises(ValueError, match=message):
    load_backbone(path, model_of())
  # Without the head the file is as good as any.
  load_backbone(path, model_of("linear", 0))


def test_a_method_that_reads_the_source_s_classes_trains_no_head():
  model = model_of("vp", classifier="source")
  params = draw_backbone(state_lib.param_shapes(model))
  assert set(params) == {"backbone", "prompter"}
  images = np.ones((2, 8, 8, 3), np.float32)
  source, logits = jax.jit(
    lambda params, images: (
      model.apply({"params": params}, images, method="source_logits"),
      model.apply({"params": params}, images),
    )
  )(params, images)
  np.testing.assert_array_equal(logits, np.asarray(source)[:, :3])


def test_what_needs_a_head_says_so():
  with pytest.raises(ValueError, match=r"'vp' reads .* set head_classes"):
    model_of("vp", 0, classifier="source")
  with pytest.raises(ValueError, match="3 target classes .* head has 2"):
    model_of("vp", 2, classifier="source")
  model = model_of("linear", 0)
  images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  with pytest.raises(ValueError, match="kept without the head"):
    jax.eval_shape(
      lambda params, x: model.apply({"params": params}, x, method="source_logits"),
      state_lib.param_shapes(model),
      images,
    )


def test_methods_that_share_a_head_cannot_be_combined():
  with pytest.raises(ValueError, match="the one trains no head"):
    model_of("vp+mlp", vp={"classifier": "source"})
  model_of("vp+lora", vp={"classifier": "source"}, lora={"rank": 2})

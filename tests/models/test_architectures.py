"""Swin, ConvNeXt and ResNet: counts, layouts, prompts by stage, and what runs where."""

import itertools
import os
from pathlib import Path
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from test_sharding import first_batch
from tiny_runs import draw_backbone
from tiny_training import prepare, tiny_config

from insvp_jax import trees
from insvp_jax.methods import create_method
from insvp_jax.methods.hooks import Adaptation, BlockPrompts
from insvp_jax.models import architectures, support, swin
from insvp_jax.models.classifier import create_backbone, create_model
from insvp_jax.models.stages import unstack
from insvp_jax.models.weights import (
  load_backbone,
  names_convnext,
  names_resnet,
  names_swin,
  save_backbone,
)
from insvp_jax.train import flops
from insvp_jax.train import program as program_lib
from insvp_jax.train import state as state_lib

NAMES = {"swin_t": names_swin, "convnext_t": names_convnext, "resnet50": names_resnet}
TINY = {
  "swin_t": {"width": 16, "depths": (2, 2), "num_heads": (2, 4), "window": 2},
  "convnext_t": {"width": 16, "depths": (2, 1)},
  "resnet50": {"width": 4, "depths": (2, 2)},
}


def tiny(variant, **changes):
  return create_backbone(variant, 16, {**TINY[variant], **changes})


def shapes_of(backbone):
  size = backbone.image_size
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  shapes = jax.eval_shape(backbone.init, jax.random.key(0), images)["params"]
  return trees.flatten(shapes)


def drawn(backbone, seed=0):
  """Flat parameters that are nowhere zero, so that every path counts."""
  rng = np.random.default_rng(seed)
  leaves = {
    name: np.asarray(0.3 * rng.normal(size=leaf.shape), np.float32)
    for name, leaf in shapes_of(backbone).items()
  }
  return {n: np.abs(x) if n.endswith("/var") else x for n, x in leaves.items()}


def images(batch=2, size=16):
  rng = np.random.default_rng(1)
  return rng.normal(size=(batch, size, size, 3)).astype(np.float32)


@pytest.mark.parametrize(
  ("variant", "count"),
  [
    ("swin_t", 27_519_354),
    ("swin_s", 48_837_258),
    ("swin_b", 86_743_224),
    ("swin_l", 194_995_476),
    ("convnext_t", 27_820_128),
    ("convnext_s", 49_454_688),
    ("convnext_b", 87_566_464),
    ("convnext_l", 196_230_336),
    ("resnet50", 23_508_032),
    ("resnet101", 42_500_160),
  ],
)
def test_published_parameter_counts(variant, count):
  """As timm counts them, without the head and a BatchNorm's statistics."""
  # A scan traces few blocks instead of all.
  backbone = create_backbone(variant, 224, {"scan": True})
  shapes = {"backbone": trees.unflatten(shapes_of(backbone))}
  full = create_method("full", backbone.spec)
  trained = trees.mask(shapes, full.trainable_patterns())
  assert trees.count(trees.split(shapes, trained)[0]) == count


def trained_count(variant, method, **fields):
  """Returns what trains besides the head."""
  model = create_model(
    variant,
    method,
    num_classes=1,
    backbone_kwargs={"scan": True},
    method_kwargs=fields,
  )
  shapes = state_lib.param_shapes(model)
  trained = trees.split(
    shapes, trees.mask(shapes, model.prompter.trainable_patterns())
  )[0]
  return trees.count({n: x for n, x in trained.items() if not n.startswith("head/")})


def test_counts_of_methods_by_stage():
  # p l d of each stage; shallow prompts are those of the first stage.
  assert trained_count("swin_b", "vpt_deep") == 50 * 12_032 == 601_600
  # The biases of all layers, and the tables of relative positions, which are biases by
  # name and nature: only with them the published total for 19 tasks, 1.06 times the
  # backbone, comes out.
  bias = trained_count("swin_b", "bias")
  assert bias == 137_216 + 169 * (2 * 4 + 2 * 8 + 18 * 16 + 2 * 32)
  head = 0.038e6 * 1024 / 768
  assert 1 + 19 * (bias + head) / 86_743_224 == pytest.approx(1.06, abs=0.006)
  # 12 n (224 + n) of a border that is n wide.
  pad = {"location": "pad", "prompt_length": 5}
  assert trained_count("resnet50", "vpt_shallow", **pad) == 13_740


def test_insvp_s_specific_prompts_have_one_trunk_and_a_layer_for_each_stage():
  model = create_model("swin_b", num_classes=1, backbone_kwargs={"scan": True})
  prompter = state_lib.param_shapes(model)["prompter"]
  specific = prompter["specific_prompter"]
  counts = {name: trees.count(leaves) for name, leaves in specific.items()}
  # c channels of each of 9 tokens: 8 x 8 x 2, 16 x 16 x 1, x 2 and x 4.
  last = {f"Conv_{i + 2}": 9 * c * (9 * 27 + 1) for i, c in enumerate((2, 1, 2, 4))}
  assert counts == {"Conv_0": 2_196, "Conv_1": 6_102, **last}
  common = {n: x for n, x in prompter.items() if n.startswith("common_prompt")}
  assert sorted(common) == [f"common_prompt_{i}" for i in range(4)]
  assert trees.count(common) == 9 * 12_032
  # Patches of 4 x 4 pixels.
  assert trees.count(prompter["patch_prompter"]) == 16 * 48 + 16 + 48 * 16 + 48


def test_the_table_of_methods_and_backbones(root):
  """What the documentation says runs, runs; all else is one line at construction."""
  assert support.table() in (root / "docs" / "methods.md").read_text()
  for variant in list(support.ARCHITECTURES.values())[1:]:
    sizes = TINY[next(name for name in TINY if name[:4] == variant[:4])]
    sizes = {**sizes, "head_classes": 7}
    spec = create_backbone(variant, 16, sizes).spec
    for method, fields in support.rows():
      refusal = support.refusal(method, fields, spec)
      build = {"backbone_kwargs": sizes, "method_kwargs": fields, "image_size": 16}
      if refusal:
        assert "\n" not in refusal and len(refusal) < 250
        with pytest.raises(ValueError) as error:
          create_model(variant, method, num_classes=2, **build)
        assert str(error.value) == refusal
        continue
      model = create_model(variant, method, num_classes=2, **build)
      shapes = state_lib.param_shapes(model)
      trees.mask(shapes, model.prompter.trainable_patterns())


@pytest.mark.parametrize("variant", TINY)
def test_published_names_come_and_go(variant):
  names, backbone = NAMES[variant], tiny(variant, head_classes=3)
  leaves = drawn(backbone)
  published = names.invert(leaves)
  shapes = {name: array.shape for name, array in published.items()}
  assert [other.recognise(shapes) for other in NAMES.values()].count(True) == 1
  assert names.recognise(shapes)
  back = names.convert(published)
  assert back.keys() == leaves.keys()
  for name, leaf in leaves.items():
    np.testing.assert_array_equal(back[name], leaf, err_msg=name)
  # Scanned and back.
  scanned = tiny(variant, scan=True)
  stacked = scanned.stack({n: x for n, x in leaves.items() if "head/" not in n})
  expected = {name: leaf.shape for name, leaf in shapes_of(scanned).items()}
  assert {name: leaf.shape for name, leaf in stacked.items()} == expected
  back = unstack(stacked)
  assert back.keys() == leaves.keys() - {"head/kernel", "head/bias"}
  assert all(np.array_equal(leaf, leaves[name]) for name, leaf in back.items())
  # What the file tells is what was built.
  known = names.fields(leaves)
  assert {name: getattr(backbone, name) for name in known} == known
  with pytest.raises(ValueError, match="'cls_token' is no array of a"):
    names.convert({**published, "cls_token": np.zeros(1)})


@pytest.mark.parametrize("variant", TINY)
def test_a_file_is_a_backbone_and_comes_back(variant, tmp_path):
  """In published names below a prefix, and in our own; of either layout."""
  leaves = drawn(tiny(variant, head_classes=3))
  theirs = {f"model.{n}": x for n, x in NAMES[variant].invert(leaves).items()}
  theirs = {name: np.ascontiguousarray(x) for name, x in theirs.items()}
  path = tmp_path / "theirs.safetensors"
  safetensors.numpy.save_file(theirs, path)
  files = {"": path}
  for suffix, layout in (
    (".npz", "this package's names"),
    (".safetensors", "published"),
  ):
    files[layout] = tmp_path / f"ours{suffix}"
    save_backbone(trees.unflatten(leaves), files[layout])
  again = safetensors.numpy.load_file(files["published"])
  assert {f"model.{n}" for n in again} == theirs.keys()
  assert all(np.array_equal(theirs[f"model.{n}"], x) for n, x in again.items())
  for (layout, path), scan in itertools.product(files.items(), (False, True)):
    backbone = create_backbone(str(path), 16, {"scan": scan, "head_classes": 3})
    assert backbone == tiny(variant, scan=scan, head_classes=3)
    reports = []
    found = trees.flatten(load_backbone(path, backbone, report=reports.append))
    assert (layout or "'model.'") in reports[0].layout
    expected = backbone.stack(leaves) if scan else leaves
    assert found.keys() == expected.keys()
    assert all(np.array_equal(leaf, expected[name]) for name, leaf in found.items())
    # A head that nothing reads is left out.
    headless = create_backbone(str(path), 16, {"scan": scan})
    found = trees.flatten(load_backbone(path, headless, report=reports.append))
    assert found.keys() == {n for n in expected if not n.startswith("head/")}
  other = tiny(variant, width=2 * backbone.width)
  with pytest.raises(ValueError, match="does not fit the model: .* of another shape"):
    load_backbone(path, other)
  with pytest.raises(ValueError, match="written in timm's names alone"):
    save_backbone(trees.unflatten(leaves), path, names="hf")


def test_windows_tell_the_size_of_images(tmp_path):
  sizes = {"width": 16, "depths": (2, 2), "num_heads": (2, 2), "window": 6}
  backbone = create_backbone("swin_t", 48, sizes)
  save_backbone(trees.unflatten(drawn(backbone)), tmp_path / "swin.safetensors")
  assert create_backbone(str(tmp_path / "swin.safetensors")) == backbone


def test_microsoft_s_swin_merges_tokens_at_the_end_of_a_stage():
  leaves = drawn(tiny("swin_t"))
  published = {
    name.replace("layers.1.downsample", "layers.0.downsample"): array
    for name, array in names_swin.invert(leaves).items()
  }
  published["layers.0.blocks.1.attn_mask"] = np.zeros((4, 4, 4))
  published["layers.0.blocks.0.attn.relative_position_index"] = np.zeros((4, 4), int)
  back = names_swin.convert(published)
  assert back.keys() == leaves.keys()
  name = "stage_1/downsample/reduction/kernel"
  np.testing.assert_array_equal(back[name], leaves[name])


def test_the_authors_names_of_a_convnext():
  leaves = drawn(tiny("convnext_t", head_classes=3))
  published = names_convnext.invert(leaves)
  authors = {}
  for name, array in published.items():
    for timm, theirs in (
      ("stem.", "downsample_layers.0."),
      ("stages.1.downsample.", "downsample_layers.1."),
      (".blocks.", "."),
      ("conv_dw", "dwconv"),
      ("mlp.fc1", "pwconv1"),
      ("mlp.fc2", "pwconv2"),
      ("head.norm", "norm"),
      ("head.fc", "head"),
    ):
      name = name.replace(timm, theirs)
    authors[name] = array
  assert names_convnext.recognise({n: x.shape for n, x in authors.items()})
  back = names_convnext.convert(authors)
  assert back.keys() == leaves.keys()
  assert all(np.array_equal(back[name], leaf) for name, leaf in leaves.items())


def test_windows_and_their_neighbours():
  grid, window, shift = 6, 3, 1
  positions = np.stack(np.mgrid[:grid, :grid], -1)
  rolled = np.roll(positions, (-shift, -shift), (0, 1))
  mask = swin.shift_mask(grid, window, shift)
  rows = swin.relative_positions(window)
  for w, (i, j) in enumerate(itertools.product(range(0, grid, window), repeat=2)):
    own = rolled[i : i + window, j : j + window].reshape(-1, 2)
    apart = own[:, None] - own
    # Neighbours are less than a window apart; what came from the other side is not.
    near = np.all(np.abs(apart) < window, axis=-1)
    np.testing.assert_array_equal(mask[w] == 0, near)
    table = (apart[..., 0] + window - 1) * (2 * window - 1) + apart[..., 1] + window - 1
    np.testing.assert_array_equal(rows[near], table[near])


def swin_features(model, given):
  """Returns the program of (parameters, images)."""

  def encode(module, x):
    return module.encode(module.embed(x), given)

  return jax.jit(lambda p, x: model.apply({"params": p}, x, method=encode))


@pytest.mark.parametrize("counts", [(3,), (4, 1)])
def test_prompts_of_some_blocks_scanned_or_not(counts):
  """Later blocks carry them on, through the merging of tokens, too."""
  depths = {"depths": (4, 2)}
  rng = np.random.default_rng(3)
  tokens = tuple(
    jax.device_put(rng.normal(size=(count, 1, 2, 16 * 2**i)).astype(np.float32))
    for i, count in enumerate(counts)
  )
  given = Adaptation(prompts=BlockPrompts(tokens))
  leaves = drawn(tiny("swin_t", **depths))
  unrolled = swin_features(tiny("swin_t", **depths), given)
  x = images()
  expected = unrolled(trees.unflatten(leaves), x)
  # An image's prompts never meet those of another image.
  beside_another = unrolled(trees.unflatten(leaves), np.stack([x[0], -x[1]]))
  np.testing.assert_allclose(beside_another[0], expected[0], rtol=1e-5, atol=1e-6)
  scanned = tiny("swin_t", **depths, scan=True, remat=True)
  params = trees.unflatten(scanned.stack(leaves))
  found = swin_features(scanned, given)(params, x)
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["insvp", "vpt_deep", "vpt_shallow"])
def test_a_swin_s_train_step_computes_no_gradient_of_frozen_weights(method):
  """Counted, not compiled, as for the ViT."""
  model = create_model(
    "swin_t",
    method,
    num_classes=10,
    image_size=56,
    backbone_kwargs={"depths": (2, 2), "num_heads": 3, "width": 192},
    method_kwargs={"prompt_length": 9},
  )
  shapes = state_lib.param_shapes(model)
  mask = trees.mask(shapes, model.prompter.trainable_patterns())
  trainable, frozen = trees.split(shapes, mask)
  x = jax.ShapeDtypeStruct((2, 56, 56, 3), jnp.float32)

  def loss(trainable, frozen, x):
    params, rngs = trees.merge(trainable, frozen), {"dropout": jax.random.key(0)}
    return jnp.sum(model.apply({"params": params}, x, train=True, rngs=rngs) ** 2)

  def forward(params, x):
    return model.apply({"params": params}, x)

  step = flops.count(jax.jit(jax.grad(loss)).trace(trainable, frozen, x).jaxpr)
  assert 1.8 < step / flops.count(jax.jit(forward).trace(shapes, x).jaxpr) <= 2.4


@pytest.mark.parametrize("variant", TINY)
def test_trains_alike_on_one_device_and_split_over_four(variant):
  fields = {"width": 64, "depths": (2, 2), "num_heads": 2, "window": 2, "patch_size": 4}
  if variant != "swin_t":
    fields = {**TINY[variant], "width": 64, "num_heads": None, "patch_size": None}
  method = "vpt_deep" if variant == "swin_t" else "bias"
  found = []
  for fsdp in (1, 4):
    config = tiny_config(
      method, backbone__scan=True, backbone__fsdp=fsdp, optim__wd=0.0
    )
    # AdamW would make steps out of the rounding errors of gradients that are 0.
    config.optim.name, config.optim.lr = "sgd", 0.3
    config.backbone.update(name=variant, depth=None, mlp_dim=None, **fields)
    program = prepare(config, devices=fsdp).program
    params = draw_backbone(program.shapes)
    state = program_lib.create_state(config, program, params)
    specs = {n: x.sharding.spec for n, x in trees.flatten(state.params).items()}
    cut = {name: spec for name, spec in specs.items() if "fsdp" in spec}
    assert bool(cut) == (fsdp == 4)
    # Blocks are whole; their kernels are cut.
    stacked = [spec for name, spec in cut.items() if "/blocks/" in name]
    assert bool(stacked) == bool(cut) and all(spec[0] is None for spec in stacked)
    state, metrics = program.train_step(state, first_batch(config, program))
    found.append(jax.device_get((state.params, metrics["loss"])))
  for one, four in zip(*map(jax.tree.leaves, found), strict=True):
    np.testing.assert_allclose(four, one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  ("variant", "changes", "message"),
  [
    ("swin_t", {"depths": (2, 3), "scan": True}, "takes blocks in pairs"),
    ("swin_t", {"window": 3}, "4 x 4 tokens, which windows of 3 x 3 do not divide"),
    ("swin_t", {"num_heads": 3}, "width 16 is not divisible by num_heads 3"),
    ("swin_t", {"num_heads": (2, 2, 2)}, "2 stages and num_heads 3"),
    ("swin_t", {"depths": (2,) * 4, "num_heads": 2}, "16 is not a multiple of 32"),
    ("swin_t", {"gelu": "erf"}, "gelu is 'erf'"),
    ("convnext_t", {"depths": (1, 1, 1, 1)}, "one position of the last stage has 32"),
    ("convnext_t", {"dtype": "float16"}, "dtype is 'float16'"),
    ("resnet50", {"depths": ()}, "depths is"),
  ],
)
def test_wrong_fields(variant, changes, message):
  with pytest.raises(ValueError, match=message):
    shapes_of(tiny(variant, **changes))


def test_fields_of_another_backbone_are_named():
  with pytest.raises(ValueError, match="unknown backbone field 'pool' of a ConvNeXt"):
    create_backbone("convnext_t", 0, {"pool": "gap"})
  # What a config always has and means nothing elsewhere.
  given = {"fused_attention": False, "skip_unread": True, "depth": None, "window": None}
  assert create_backbone("resnet50", 0, given) == create_backbone("resnet50")
  with pytest.raises(ValueError, match="unknown ViT variant 'Q'"):
    architectures.decode_variant("Q/16")
  with pytest.raises(ValueError, match="deep_shared is True.*differ in width"):
    create_model(
      "swin_b", "vpt_deep", num_classes=2, method_kwargs={"deep_shared": True}
    )


def test_images_of_another_size_are_refused():
  backbone = tiny("convnext_t")
  with pytest.raises(ValueError, match="20 x 20 pixels.*built for 16 x 16"):
    jax.eval_shape(backbone.init, jax.random.key(0), images(size=20))


# Run by an interpreter that has timm: writes weights, images and features.
_TIMM = """
import sys
import numpy as np, timm, torch
torch.manual_seed(0)
for case in (
  ("swin_t", "swin_tiny_patch4_window7_224", dict(img_size=64, patch_size=2,
   window_size=4, embed_dim=16, depths=(2, 2, 4, 2), num_heads=(2, 4, 4, 8))),
  ("convnext_t", "convnext_tiny", dict(depths=(2, 2, 3, 1), dims=(8, 16, 32, 64))),
  ("resnet50", "resnet50", {}),
):
  variant, name, fields = case
  model = timm.create_model(name, pretrained=False, num_classes=5, **fields).eval()
  with torch.no_grad():
    for key, value in model.state_dict().items():
      if key.endswith("running_var"):
        value.copy_(torch.rand_like(value) + 0.5)
      elif value.is_floating_point() and (value.ndim == 1 or "table" in key):
        value.add_(0.1 * torch.randn_like(value))
    x = torch.randn(2, 3, 64, 64)
    f = model.forward_head(model.forward_features(x), pre_logits=True)
    y = model(x)
  arrays = {"w/" + k: v.numpy() for k, v in model.state_dict().items()}
  x = x.permute(0, 2, 3, 1).numpy()
  np.savez(f"{sys.argv[1]}/{variant}.npz", x=x, f=f.numpy(), y=y.numpy(), **arrays)
"""
_SIZES = {
  "swin_t": {"patch_size": 2, "window": 4, "width": 16, "depths": (2, 2, 4, 2)}
  | {"num_heads": (2, 4, 4, 8)},
  "convnext_t": {"depths": (2, 2, 3, 1), "width": 8},
  "resnet50": {},
}


@pytest.fixture(scope="module")
def timm_files(tmp_path_factory):
  """What timm computes, where INSVP_TORCH_PYTHON, or this interpreter, has it."""
  python = os.environ.get("INSVP_TORCH_PYTHON", sys.executable)
  has_timm = subprocess.run([python, "-c", "import timm"], capture_output=True)
  if has_timm.returncode:
    pytest.skip("no timm; set INSVP_TORCH_PYTHON to an interpreter that has it")
  folder: Path = tmp_path_factory.mktemp("timm")
  subprocess.run([python, "-c", _TIMM, str(folder)], check=True)
  return {path.stem: dict(np.load(path)) for path in folder.glob("*.npz")}


@pytest.mark.parametrize("variant", TINY)
def test_the_same_features_and_logits_as_timm(timm_files, variant):
  file, names = timm_files[variant], NAMES[variant]
  weights = {n.removeprefix("w/"): x for n, x in file.items() if n.startswith("w/")}
  leaves = names.convert(weights)
  for name, array in names.invert(leaves).items():
    np.testing.assert_array_equal(array, weights[name], err_msg=name)
  for scan in (False, True):
    fields = {**_SIZES[variant], "head_classes": 5, "scan": scan}
    backbone = create_backbone(variant, 64, fields)

    @jax.jit
    def outputs(params, x, backbone=backbone):
      feature = backbone.apply({"params": params}, x)
      return feature, backbone.apply(
        {"params": params}, feature, method="source_logits"
      )

    params = trees.unflatten(backbone.stack(leaves) if scan else leaves)
    found = outputs(params, file["x"])
    for actual, expected in zip(found, (file["f"], file["y"]), strict=True):
      np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())

"""Integer parameter counts of the published methods, by arithmetic on shapes only."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import markdown_table
import pytest

from insvp_jax import trees
from insvp_jax.methods import METHODS, BackboneSpec, Method, create_method
from insvp_jax.models.classifier import create_model
from insvp_jax.models.heads import Head
from insvp_jax.models.vit import decode_variant
from insvp_jax.train import state as state_lib

MODULES = {
  "patch": "patch_prompter",
  "global": "global_prompter",
  "specific": "specific_prompter",
}
RELEASE_16 = {"prompt_length": 16, "specific_kernels": (7, 9, 3)}
RELEASE_20 = {"prompt_length": 20, "specific_kernels": (7, 9, 3)}
PARAM_MATCHED = {
  "global_kernels": (3, 13),
  "global_dilations": (5, 2),
  "global_hidden": 25,
}


def prompter_shapes(variant, method, **kwargs):
  spec = BackboneSpec(**decode_variant(variant), image_size=224)
  prompter = create_method(method, spec, **kwargs)
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)

  def init(images):
    return prompter.init(jax.random.key(0), images, method="prompts")

  return prompter, jax.eval_shape(init, images)["params"]


@pytest.mark.parametrize(
  ("kwargs", "patch", "global_", "specific", "common", "total", "trained"),
  [
    ({"preset": "paper"}, 25_360, 333, 14_886, 82_944, 123_523, 123_523),
    (PARAM_MATCHED, 25_360, 13_378, 14_886, 82_944, 136_568, 136_568),
    ({"preset": "release"}, 25_360, 13_437, 14_886, 82_944, 136_627, 121_741),
    (
      {"preset": "release", **RELEASE_16},
      25_360,
      13_437,
      85_408,
      147_456,
      271_661,
      186_253,
    ),
    (
      {"preset": "release", **RELEASE_20},
      25_360,
      13_437,
      132_680,
      184_320,
      355_797,
      223_117,
    ),
  ],
)
def test_insvp_on_b16(kwargs, patch, global_, specific, common, total, trained):
  prompter, shapes = prompter_shapes("B/16", "insvp", **kwargs)
  counts = {name: trees.count(shapes[module]) for name, module in MODULES.items()}
  assert counts == {"patch": patch, "global": global_, "specific": specific}
  assert trees.count({"common_prompt": shapes["common_prompt"]}) == common
  assert trees.count(shapes) == total

  params = {"prompter": shapes, "head": {"kernel": jax.ShapeDtypeStruct((), float)}}
  mask = trees.mask(params, prompter.trainable_patterns())
  trainable, _ = trees.split(params, mask)
  assert trees.count(trainable) - 1 == trained


def test_insvp_specific_prompter_by_convolution():
  _, shapes = prompter_shapes("B/16", "insvp")
  specific = shapes["specific_prompter"]
  counts = [trees.count(specific[f"Conv_{i}"]) for i in range(3)]
  assert counts == [2_196, 6_102, 6_588]


@pytest.mark.parametrize(
  ("variant", "specific", "total"),
  [
    ("Ti/16", 14_886, 74_419),
    ("S/16", 21_474, 101_743),
    ("B/16", 14_886, 136_627),
    ("L/16", 17_082, 277_063),
    ("So400m/14", 47_826, None),
    ("H/14", 19_278, 420_775),
  ],
)
def test_insvp_on_other_widths(variant, specific, total):
  _, shapes = prompter_shapes(variant, "insvp", preset="release")
  assert trees.count(shapes["specific_prompter"]) == specific
  assert total is None or trees.count(shapes) == total


@pytest.mark.parametrize(
  ("variant", "method", "prompt_length", "expected"),
  [
    ("B/16", "vpt_shallow", 50, 38_400),
    ("B/16", "vpt_deep", 1, 9_216),
    ("B/16", "vpt_deep", 5, 46_080),
    ("B/16", "vpt_deep", 10, 92_160),
    ("B/16", "vpt_deep", 50, 460_800),
    ("B/16", "vpt_deep", 100, 921_600),
    ("B/16", "vpt_deep", 200, 1_843_200),
    ("L/16", "vpt_deep", 50, 1_228_800),
    ("H/14", "vpt_deep", 50, 2_048_000),
  ],
)
def test_vpt(variant, method, prompt_length, expected):
  _, shapes = prompter_shapes(variant, method, prompt_length=prompt_length)
  assert trees.count(shapes) == expected


@functools.cache
def backbone_shapes():
  model = create_model("B/16", "linear", num_classes=1)
  return model.backbone.spec, state_lib.param_shapes(model)["backbone"]


def trainable_count(name, fields, num_classes=100):
  """Returns what trains on ViT-B/16 at 224 px besides the linear head."""
  spec, backbone = backbone_shapes()
  # For those that read the classes that a backbone was trained on.
  spec = dataclasses.replace(spec, head_classes=1000)
  method = create_method(name, spec, num_classes, **fields)

  def embed(images):
    num_patches = images.shape[1] * images.shape[2] // 256
    return jnp.zeros((len(images), num_patches, spec.width))

  def everything(method, images):
    routed = {"route": jnp.zeros(1, jnp.int32)} if method.routes() else {}
    prompted = method.prompt_image(images, **routed)
    method.adapt_logits(jnp.zeros((1, spec.head_classes)))
    method.adapt_feature(jnp.zeros((1, spec.width)), images)
    return method.adapt(images, prompted, embed=embed)

  def init(images):
    variables = method.init(jax.random.key(0), images, method=everything)
    head = method.head(Head(num_classes))
    head = head.init(jax.random.key(0), jnp.zeros((2, spec.width)))
    return variables.get("params", {}), head["params"]

  size = method.input_size()
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  prompter, head = jax.eval_shape(init, images)
  params = {"backbone": backbone, "prompter": prompter, "head": head}
  if method.reads_source_head():
    del params["head"]
  params = {part: tree for part, tree in params.items() if tree}
  mask = trees.mask(params, method.trainable_patterns())
  trainable, _ = trees.split(params, mask)
  linear = 0 if method.reads_source_head() else (spec.width + 1) * num_classes
  return trees.count(trainable) - linear


@pytest.mark.parametrize(
  ("name", "fields", "expected"),
  [
    ("linear", {}, 0),
    # The published 85,798,656 have a position for the class token; big_vision adds it
    # to `cls` once and for all.
    ("full", {}, 85_798_656 - 768),
    ("partial", {"blocks": 1}, 7_089_408),
    ("partial", {"blocks": 2}, 14_177_280),
    ("partial", {"blocks": 4}, 28_353_024),
    ("mlp", {"hidden_layers": 1}, 592_128),
    ("mlp", {}, 1_184_256),
    ("mlp", {"hidden_layers": 3}, 1_776_384),
    ("bias", {}, 102_912),
    ("bitfit", {}, 102_912),
    ("ln_tune", {}, 38_400),
    ("difffit", {}, 140_544),
    ("adapter", {}, 1_779_840),
    ("adapter", {"reduction": 64}, 230_544),
    ("adapter", {"reduction": 256}, 64_548),
    ("adapter", {"hidden": 8}, 156_768),
    ("adaptformer", {}, 1_189_632),
    ("adaptformer", {"hidden": 1}, 27_660),
    ("adaptformer", {"hidden": 4}, 82_992),
    ("adaptformer", {"hidden": 8}, 156_768),
    ("adaptformer", {"hidden": 32}, 599_424),
    ("adapter_plus", {}, 165_984),
    ("adapter_plus", {"hidden": 16}, 313_536),
    ("convpass", {}, 327_552),
    ("convpass", {"branches": ("attn",)}, 163_776),
    ("lora", {}, 294_912),
    ("lora", {"rank": 1}, 36_864),
    ("lora", {"fused": True}, 294_912),
    ("lora", {"fused": True, "rank": 1}, 36_864),
    ("ssf", {}, 205_824),
    ("fact_tt", {}, 61_440),
    ("fact_tt", {"rank": 8}, 21_504),
    ("fact_tt", {"rank": 32}, 196_608),
    ("fact_tk", {}, 30_976),
    ("fact_tk", {"rank": 32}, 86_528),
    ("repadapter", {}, 239_808),
    ("repadapter", {"branches": ("attn",)}, 119_904),
    ("vpt_shallow", {"prompt_length": 50}, 38_400),
    ("vpt_deep", {"prompt_length": 50}, 460_800),
    ("vpt_deep", {"prompt_length": 50, "deep_shared": True}, 38_400),
    ("vfpt", {"prompt_length": 50}, 460_800),
    ("vapt", {}, 55_608),
    ("gated", {}, 76_823),
    # Prompts, key and value prompts, 17 gates a prompt.
    ("e2vpt", {}, 92_160 + 85),
    ("e2vpt", {"prompt_length": 10}, 138_240 + 170),
    ("e2vpt", {"prompt_length": 50}, 506_880 + 850),
    ("e2vpt", {"token_mask": (), "piece_mask": ()}, 92_160),
    ("vp", {}, 69_840),
    ("vp", {"classifier": "source"}, 69_840),
    # For each cluster.
    ("dam_vp", {"max_clusters": 1}, 69_840),
    ("dam_vp", {"max_clusters": 5}, 5 * 69_840),
    ("ilm_vp", {}, 3 * 224**2),
    ("autovp", {"mapping": "frequency", "resize": False}, 3 * 224**2),
    ("sidetune", {}, 9_547_585),
    # No published count: those of the design.
    ("lion", {}, 827 + 103_232),
    ("lion", {"layers": ("pixels",)}, 827),
    ("lion", {"layers": ("feature",)}, 103_232),
    ("lion", {"layers": ("feature",), "hidden": 32}, 50_976),
    # The released hierarchy of ImageNet's 1,000 classes.
    (
      "transhp",
      {"levels": (2, 2, 2, 4, 9, 16, 25, 49, 90, 170, 406)},
      1_207_296,
    ),
  ],
)
def test_published_counts_on_b16(name, fields, expected):
  assert trainable_count(name, fields, num_classes=1000) == expected


def test_the_catalogue_of_methods_is_what_there_is(root):
  text, _, _ = (root / "docs" / "methods.md").read_text().partition("\n## Which runs")
  titles, *table = markdown_table.cells(text)
  rows = {row[0].strip("`"): dict(zip(titles, row, strict=True)) for row in table}
  assert list(rows) and set(rows) == set(METHODS)
  spec = dataclasses.replace(backbone_shapes()[0], head_classes=1000)
  for name, row in rows.items():
    assert row["parameters"] == f"{trainable_count(name, {}):,}", name
    method = create_method(name, spec, 100)
    is_head = type(method).head is not Method.head
    folds = type(method).merge is not Method.merge or not method.overridden_hooks()
    assert row["folds"] == ("yes" if folds and not is_head else ""), name


def test_the_comparison_with_the_paper_has_the_methods_and_their_counts(root):
  text = (root / "docs" / "measured.md").read_text()
  section = text[text.index("## The comparison of InsVP's paper") :]
  section = section[: section.index("\n## ", 1)]
  titles, *table = markdown_table.cells(section)
  rows = {row[1].strip("`"): dict(zip(titles, row, strict=True)) for row in table}
  assert len(table) == len(rows) == 18
  for name in set(rows) & set(METHODS):
    fields = {"max_clusters": 1} if name == "dam_vp" else {}
    expected = f"{trainable_count(name, fields):,}"
    assert rows[name]["parameters"].removesuffix(" a cluster") == expected, name

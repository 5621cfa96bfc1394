"""LoRA, RepAdapter, SSF and FacT: what can be merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from insvp_jax import trees
from insvp_jax.methods import BackboneSpec, HookArrays, create_method

SPEC = BackboneSpec(
  width=8, depth=3, mlp_dim=32, num_heads=2, patch_size=2, image_size=4
)
READERS = {"query": "norm1", "key": "norm1", "value": "norm1", "fc1": "norm2"}
NORMS = ("norm1", "norm2", "encoder_norm")


def shapes_of(method):
  size = SPEC.image_size
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)

  def init(images):
    return method.init(jax.random.key(0), images, images, method="adapt")["params"]

  return jax.eval_shape(init, images)


def draw_sites(rng):
  """Draws the operations of a backbone, as `Method.merge` takes them."""
  d, m = SPEC.width, SPEC.mlp_dim
  sizes = {"embedding": (12, d), "fc1": (d, m), "fc2": (m, d)}
  sizes |= dict.fromkeys(("query", "key", "value", "out"), (d, d))
  sites = {}
  for name in ("embedding", "norm1", *sizes, "norm2", "encoder_norm"):
    lead = () if name in ("embedding", "encoder_norm") else (SPEC.depth,)
    ins, outs = sizes.get(name, (None, d))
    weight = {"scale": (*lead, d)} if ins is None else {"kernel": (*lead, ins, outs)}
    leaves = weight | {"bias": (*lead, outs)}
    sites[name] = {leaf: rng.standard_normal(shape) for leaf, shape in leaves.items()}
  return sites


def apply_site(site, x):
  if "kernel" in site:
    return x @ site["kernel"] + site["bias"]
  return x * site["scale"] + site["bias"]


@pytest.mark.parametrize(
  ("name", "kwargs"),
  [
    ("lora", {"rank": 3, "scale": 0.5}),
    ("lora", {"rank": 2, "targets": ("key", "out", "fc1", "fc2")}),
    ("lora", {"rank": 2, "fused": True}),
    ("ssf", {}),
    ("repadapter", {"hidden": 6, "scale": 0.5}),
    ("repadapter", {"hidden": 4, "groups": 4, "branches": ("mlp",)}),
    ("repadapter", {"hidden": 3, "groups": 1}),
    ("fact_tt", {"rank": 3, "scale": 0.5}),
    ("fact_tk", {"rank": 3, "scale": 0.5}),
  ],
)
def test_merged_operations_do_what_hooks_did(name, kwargs):
  rng = np.random.default_rng(0)
  method = create_method(name, SPEC, **kwargs)
  shapes = trees.flatten(shapes_of(method))
  params = trees.unflatten(
    {leaf: rng.standard_normal(shape.shape) for leaf, shape in shapes.items()}
  )
  sites = draw_sites(rng)
  before = {name: dict(site) for name, site in sites.items()}
  merged = method.merge(params, sites)
  assert {name: dict(site) for name, site in sites.items()} == before
  images = np.zeros((1, SPEC.image_size, SPEC.image_size, 3))
  hooks = method.hooks()
  with jax.enable_x64(True):
    params, images = jax.tree.map(jnp.asarray, (params, images))
    adaptation = method.apply({"params": params}, images, images, method="adapt")
    for site in sites:
      outside = site in ("embedding", "encoder_norm")
      for i in range(1 if outside else SPEC.depth):

        def of(tree, i=i, outside=outside):
          return tree if outside else jax.tree.map(lambda leaf: leaf[i], tree)

        ins = SPEC.width if site in NORMS else sites[site]["kernel"].shape[-2]
        x = jnp.asarray(rng.standard_normal((2, 5, ins)))
        y = apply_site(of(sites[site]), x)
        block = None if outside else of(adaptation.blocks)
        if site in hooks.at:
          y = hooks.after(HookArrays(block, adaptation.shared), site, x, y)
        np.testing.assert_allclose(apply_site(of(merged[site]), x), y, atol=1e-10)


@pytest.mark.parametrize(
  ("name", "kwargs", "message"),
  [
    ("lora", {"rank": 9}, "rank is 9, but .* 8 wide; expected .* 1 to 8"),
    ("lora", {"targets": ("query", "query")}, "targets is .*, each once"),
    ("lora", {"targets": ("quary",)}, "Did you mean 'query'"),
    ("fact_tt", {}, "rank is 16, but .* 8 wide"),
    ("fact_tk", {"rank": 0}, "rank is 0, but .* from 1 to 8"),
    ("repadapter", {"hidden": 5}, r"groups is 2, but it must divide hidden \(5\)"),
    ("repadapter", {"hidden": 6, "groups": 3}, r"and the width of the backbone \(8\)"),
    ("repadapter", {"hidden": 9}, "hidden is 9, but .* 8 wide"),
    ("ssf", {"rank": 2}, "unknown field 'rank' of the method 'ssf'"),
  ],
)
def test_bad_fields(name, kwargs, message):
  with pytest.raises(ValueError, match=message):
    create_method(name, SPEC, **kwargs)


@pytest.mark.parametrize("name", ["fact_tt", "fact_tk"])
def test_fact_needs_an_mlp_that_is_a_multiple_of_the_width(name):
  spec = BackboneSpec(
    width=8, depth=1, mlp_dim=20, num_heads=2, patch_size=2, image_size=4
  )
  with pytest.raises(ValueError, match="mlp_dim is 20, but FacT .* multiple of its w"):
    create_method(name, spec, rank=2)


def test_ssf_starts_near_the_identity():
  method = create_method("ssf", SPEC)
  images = jnp.zeros((1, 4, 4, 3))
  params = method.init(jax.random.key(0), images, images, method="adapt")["params"]
  for name, leaf in trees.flatten(params).items():
    offset = leaf - 1 if name.endswith("scale") else leaf
    assert 0 < np.max(np.abs(offset)) < 0.1, name


def test_dropout_leaves_the_key_projection_its_layers():
  # The random keys of blocks and the projection "key" are different things.
  method = create_method("lora", SPEC, targets=("key",), rank=2, dropout=0.5)
  images = jnp.ones((1, 4, 4, 3))
  shapes = shapes_of(method)
  params = {"params": jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)}
  adaptation = method.apply(
    params,
    images,
    images,
    train=True,
    method="adapt",
    rngs={"dropout": jax.random.key(0)},
  )
  block = jax.tree.map(lambda leaf: leaf[0], adaptation.blocks)
  x = jnp.ones((64, 1, 8))
  update = method.hooks().after(HookArrays(block, adaptation.shared), "key", x, 0.0)
  # Of two hidden values of 8, doubled where they are kept.
  np.testing.assert_allclose(np.unique(update), [0, 16, 32])

"""LoRA, RepAdapter, SSF and FacT: what can be merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from insvp_jax import trees
from insvp_jax.methods import BackboneSpec, HookArrays, create_method
from insvp_jax.methods.hooks import block_of

SPEC = BackboneSpec(
  width=8, depth=3, mlp_dim=32, num_heads=2, patch_size=2, image_size=4
)
READERS = {"query": "norm1", "key": "norm1", "value": "norm1", "fc1": "norm2"}
NORMS = ("norm1", "norm2", "encoder_norm")
OUTSIDE = ("embedding", "encoder_norm")


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


def of_blocks(name, site):
  """Yields each block and its leaves of a site; outside of the blocks, 0 and all."""
  for block in range(1 if name in OUTSIDE else SPEC.depth):
    yield block, site if name in OUTSIDE else block_of(site, block)


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
  inputs = {}
  for name, site in sites.items():
    ins = SPEC.width if name in NORMS else site["kernel"].shape[-2]
    inputs[name] = rng.standard_normal((SPEC.depth, 2, 5, ins))

  @jax.jit
  def hooked(params, sites, inputs, images):
    """Returns the outputs of each site's operation, block by block."""
    adaptation = method.apply({"params": params}, images, images, method="adapt")
    hooks, outputs = method.hooks(), {}
    for name, site in sites.items():
      outputs[name] = []
      for block, own in of_blocks(name, site):
        x = inputs[name][block]
        y = apply_site(own, x)
        if name in hooks.at:
          outside = name in OUTSIDE
          arrays = None if outside else block_of(adaptation.blocks, block)
          y = hooks.after(HookArrays(arrays, adaptation.shared), name, x, y)
        outputs[name].append(y)
    return outputs

  with jax.enable_x64(True):
    outputs = jax.device_get(hooked(params, sites, inputs, images))
  for name, site in merged.items():
    for block, own in of_blocks(name, site):
      expected = apply_site(own, inputs[name][block])
      np.testing.assert_allclose(expected, outputs[name][block], atol=1e-10)


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
  images = jax.device_put(np.zeros((1, 4, 4, 3), np.float32))
  # One program of so many draws would take longer to compile than each draw's own.
  params = method.init(jax.random.key(0), images, images, method="adapt")["params"]
  params = jax.device_get(params)
  for name, leaf in trees.flatten(params).items():
    offset = leaf - 1 if name.endswith("scale") else leaf
    assert 0 < np.max(np.abs(offset)) < 0.1, name


def test_dropout_leaves_the_key_projection_its_layers():
  # The random keys of blocks and the projection "key" are different things.
  method = create_method("lora", SPEC, targets=("key",), rank=2, dropout=0.5)

  @jax.jit
  def update_of(images, x, key):
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes_of(method))
    options = {"train": True, "rngs": {"dropout": key}, "method": "adapt"}
    adaptation = method.apply({"params": params}, images, images, **options)
    arrays = HookArrays(block_of(adaptation.blocks, 0), adaptation.shared)
    return method.hooks().after(arrays, "key", x, 0.0)

  ones = (np.ones(shape, np.float32) for shape in ((1, 4, 4, 3), (64, 1, 8)))
  update = update_of(*ones, jax.random.key(0))
  # Of two hidden values of 8, doubled where they are kept.
  np.testing.assert_allclose(np.unique(update), [0, 16, 32])

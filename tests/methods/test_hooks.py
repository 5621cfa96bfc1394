"""What a method asks of a backbone, and what several methods are together."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_runs import draw_backbone

from insvp_jax import config as config_lib
from insvp_jax import trees
from insvp_jax.methods import METHODS, BackboneSpec, Hooks, Method, create_method
from insvp_jax.methods.hooks import FUNCTIONS, OPERATIONS, SITES, CombinedHooks
from insvp_jax.models.classifier import create_model
from insvp_jax.search import trials
from insvp_jax.train import state as state_lib

SPEC = BackboneSpec(
  width=16, depth=2, mlp_dim=64, num_heads=2, patch_size=4, image_size=16
)


def without(*sites):
  return dataclasses.replace(SPEC, sites=SITES - set(sites))


@pytest.mark.parametrize(
  ("name", "spec", "message"),
  [
    ("gated", without("qkv", "leave"), "'gated' changes .* not have: leave, qkv. It"),
    ("lora", without("query"), "'lora' changes what .* not have: query. It has attn, "),
    ("insvp+ssf", without("fc1"), "'ssf' changes what .* not have: fc1"),
    ("insvp+vpt_deep", SPEC, "'insvp' and 'vpt_deep' .*: both have their own prompts"),
    ("e2vpt+vapt", SPEC, "'e2vpt' and 'vapt' .*: both have their own prompts, of w"),
    ("lora+lora", SPEC, "'lora\\+lora' has one method twice"),
    ("insvp+laro", SPEC, "unknown method 'laro'. Nearest: .*lora"),
    ("insvp+", SPEC, "unknown method ''"),
  ],
)
def test_what_cannot_be_is_one_clear_line(name, spec, message):
  with pytest.raises(ValueError, match=message) as error:
    create_method(name, spec)
  assert "\n" not in str(error.value)


def test_two_that_pool_or_have_a_head_cannot_be_combined():
  pools = {"gated": {"pool": "mean"}, "vpt_deep": {"pool": "image"}}
  with pytest.raises(ValueError, match="own pool|own prompts"):
    create_method("gated+vpt_deep", SPEC, **pools)

  class Deeper(METHODS["mlp"]):
    pass

  with pytest.raises(ValueError, match="'mlp' and 'deeper' .* their own head"):
    with pytest.MonkeyPatch.context() as patch:
      patch.setitem(METHODS, "deeper", Deeper)
      create_method("mlp+deeper", SPEC)


@pytest.mark.parametrize(
  "kwargs", [{"rank": 2}, {"lora": 2}, {"bias": {}, "lor": {"rank": 2}}]
)
def test_fields_of_several_methods_come_by_method(kwargs):
  with pytest.raises(
    ValueError, match="expected the fields of each by its name: lora="
  ):
    create_method("lora+bias", SPEC, **kwargs)
  assert (
    create_method("lora+bias", SPEC, lora={"rank": 2}).parts.methods["lora"].rank == 2
  )


def test_a_hook_at_an_unknown_operation_is_named():
  class Odd(Method):
    def hooks(self):
      return Hooks(at=("fc3",))

  with pytest.raises(ValueError, match="'Odd' changes what .* not have: fc3"):
    create_method(Odd, SPEC)


def test_sites_are_what_hooks_override():
  assert Hooks().sites() == frozenset()
  found = {name: create_method(name, SPEC).hooks().sites() for name in METHODS}
  assert found["insvp"] == found["vpt_deep"] == found["linear"] == frozenset()
  assert found["lora"] == {"query", "value"}
  assert found["ssf"] == set(OPERATIONS)
  assert found["gated"] == {"qkv", "leave"} and found["vapt"] == {"enter"}
  assert found["transhp"] == {"enter", "leave"}
  assert set(FUNCTIONS) < SITES
  both = CombinedHooks.of((("a", create_method("lora", SPEC).hooks()), ("b", Hooks())))
  assert both.sites() == {"query", "value"}


def test_several_methods_are_each_of_them_under_its_own_name():
  kwargs = {"vpt_deep": {"prompt_length": 2}, "lora": {"rank": 2}}
  sizes = {"width": 16, "depth": 2, "mlp_dim": 64, "num_heads": 2}
  options = {"num_classes": 3, "image_size": 16, "backbone_kwargs": sizes}
  options["head_init"] = "torch"
  model = create_model("mu/4", "vpt_deep+lora+bias", method_kwargs=kwargs, **options)
  images = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
  backbone = draw_backbone(state_lib.param_shapes(model)["backbone"])
  params = state_lib.init_params(model, 0, weights=backbone)
  names = set(trees.flatten(params["prompter"]))
  assert names == {"vpt_deep/common_prompt"} | {
    f"lora/{target}_{part}/kernel"
    for target in ("query", "value")
    for part in ("down", "up")
  }
  mask = trees.flatten(trees.mask(params, model.prompter.trainable_patterns()))
  assert all(mask[f"prompter/{name}"] for name in names)
  assert mask["backbone/embedding/bias"] and not mask["backbone/embedding/kernel"]
  # The update starts at zero: so far it is the prompts alone.
  alone = create_model("mu/4", "vpt_deep", method_kwargs=kwargs["vpt_deep"], **options)
  own = {**params, "prompter": params["prompter"]["vpt_deep"]}
  logits, expected = (
    jax.jit(each.apply)({"params": tree}, images)
    for each, tree in ((model, params), (alone, own))
  )
  np.testing.assert_allclose(logits, expected, atol=1e-6)
  params["prompter"]["lora"] = jax.tree.map(
    lambda leaf: leaf + 0.1, params["prompter"]["lora"]
  )
  changed = jax.jit(model.apply)({"params": params}, images)
  assert np.abs(changed - logits).max() > 1e-3


def test_a_config_of_several_methods_has_the_section_of_each():
  config = config_lib.defaults()
  config.method = "insvp+lora"
  config.lora.rank = 2
  kwargs = config_lib.method_kwargs(config)
  assert kwargs == {"insvp": {"preset": "paper"}, "lora": {"rank": 2}}
  # A field that both have is searched for, and set, in both.
  config.tune.grid.dropout = (0.1, 0.2)
  grid = trials.grid_of(config, default=True)
  assert grid["dropout"] == (0.1, 0.2)
  config = trials.at(config, dropout=0.2)
  assert config.insvp.dropout == config.lora.dropout == 0.2
  assert config.vpt_deep.dropout is None

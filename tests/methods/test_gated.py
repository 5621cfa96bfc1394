"""Gated prompts: what their golden files do not pin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import draw_backbone

from insvp_jax import trees
from insvp_jax.methods import BackboneSpec, create_method
from insvp_jax.models.classifier import create_model
from insvp_jax.models.vit import decode_variant
from insvp_jax.train import state as state_lib

SPEC = BackboneSpec(
  width=32, depth=3, mlp_dim=64, num_heads=2, patch_size=4, image_size=16
)
IMAGES = jax.device_put(
  np.random.default_rng(1).standard_normal((2, 16, 16, 3), np.float32)
)


def model(method, **kwargs):
  return create_model(
    "mu/4",
    method,
    num_classes=5,
    image_size=16,
    backbone_kwargs={"depth": 3},
    method_kwargs={"prompt_length": 4, **kwargs},
    head_init="torch",
  )


def test_count_and_start_on_b16():
  spec = BackboneSpec(**decode_variant("B/16"), image_size=224)
  method = create_method("gated", spec)
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)

  def init(images):
    return method.init(jax.random.key(0), images, method="prompts")

  assert trees.count(jax.eval_shape(init, images)["params"]) == 76_823
  small = create_method("gated", SPEC)
  params = jax.jit(lambda key: small.init(key, IMAGES, method="prompts")["params"])(
    jax.random.key(0)
  )
  np.testing.assert_array_equal(params["gate"], [-5, -5])
  np.testing.assert_array_equal(params["temperature"], [1, 1, 1])
  assert params["common_prompt"].shape == (1, 100, 32)


def test_open_gates_are_vpt_shallow():
  gated, shallow = model("gated"), model("vpt_shallow")
  params = draw_backbone(state_lib.param_shapes(gated))
  # As they start: closed, and with plain softmax.
  params["prompter"]["gate"] = np.full(2, -5.0, np.float32)
  params["prompter"]["temperature"] = np.ones(3, np.float32)
  apply = jax.jit(gated.apply)
  closed = apply({"params": params}, IMAGES)
  params["prompter"]["gate"] = np.full(2, 50.0, np.float32)
  opened = apply({"params": params}, IMAGES)
  params["prompter"] = {"common_prompt": params["prompter"]["common_prompt"]}
  expected = jax.jit(shallow.apply)({"params": params}, IMAGES)
  np.testing.assert_allclose(opened, expected, atol=1e-6)
  assert np.max(np.abs(closed - expected)) > 1e-4


def test_temperatures_stay_within_their_bounds():
  method = create_method("gated", SPEC, temperature_min=0.5, temperature_max=2.0)
  updates = {
    "prompter/temperature": jnp.array([-3.0, 0.25, 3.0]),
    "prompter/gate": jnp.array([9.0, 9.0]),
  }
  params = {"prompter/temperature": jnp.ones(3), "prompter/gate": jnp.zeros(2)}
  adjusted = method.adjust_updates(updates, params=params, grads={}, lr=1.0)
  np.testing.assert_allclose(adjusted["prompter/temperature"], [-0.5, 0.25, 1.0])
  np.testing.assert_array_equal(adjusted["prompter/gate"], updates["prompter/gate"])


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"temperature_min": 0}, "temperature_min is 0.0 and temperature_max 10.0"),
    ({"temperature_max": 0.5}, "positive numbers with 1"),
    ({"pool": "image"}, "pool is 'image', expected one of 'cls', 'mean'"),
    ({"gate_init": float("inf")}, "gate_init is inf"),
  ],
)
def test_bad_input_is_one_clear_line(kwargs, message):
  with pytest.raises(ValueError, match=message) as error:
    create_method("gated", SPEC, **kwargs)
  assert "\n" not in str(error.value)


def test_there_is_one_set_of_prompts():
  with pytest.raises(ValueError, match="'gated' and 'vpt_deep' cannot be combined"):
    create_method("gated+vpt_deep", SPEC)

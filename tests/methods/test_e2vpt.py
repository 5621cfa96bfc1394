"""E2VPT: masks, trained, given or as data, and prompts among keys and values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_counts import prompter_shapes

from insvp_jax import trees
from insvp_jax.methods import BackboneSpec, create_method
from insvp_jax.methods.hooks import HookArrays

SPEC = BackboneSpec(
  width=40, depth=3, mlp_dim=64, num_heads=2, patch_size=4, image_size=16
)
IMAGES = jnp.zeros((2, 16, 16, 3))
MASKS = {
  "token_mask": (1, 0, 1),
  "piece_mask": ((1,) * 16, (1,) * 16, (1, 1, 1, 0) + (1,) * 12),
}


def init(**fields):
  method = create_method("e2vpt", SPEC, prompt_length=3, kv_length=2, **fields)
  return method, method.init(jax.random.key(0), IMAGES, method="prompts")


@pytest.mark.parametrize(
  ("prompt_length", "kv_length", "expected"),
  [(5, 5, 92_160), (10, 5, 138_240), (32, 5, 340_992), (50, 5, 506_880)],
)
def test_published_counts(prompt_length, kv_length, expected):
  lengths = {"prompt_length": prompt_length, "kv_length": kv_length}
  _, shapes = prompter_shapes("B/16", "e2vpt", **lengths)
  assert trees.count(shapes) == expected + 17 * prompt_length
  none = {"token_mask": (), "piece_mask": ()}
  _, shapes = prompter_shapes("B/16", "e2vpt", **lengths, **none)
  assert trees.count(shapes) == expected
  _, shapes = prompter_shapes("B/16", "e2vpt", **lengths, **none, share_kv=False)
  assert trees.count(shapes) == expected + 12 * 768 * kv_length


def test_each_block_s_key_and_value_prompts_start_as_published():
  _, variables = init()
  prompts = np.abs(variables["params"]["kv_prompt"])
  assert prompts.shape == (3, 2, 2, 20)
  bound = np.sqrt(6 / (2 * 20))
  assert np.all(prompts.max(axis=(1, 2, 3)) > 0.9 * bound) and prompts.max() <= bound


def test_a_mask_removes_a_token_or_every_sixteenth_channel():
  method, variables = init(**MASKS)
  assert set(variables["params"]) == {"common_prompt", "kv_prompt"}
  (tokens, _) = jnp.swapaxes(
    method.apply(variables, IMAGES, method="prompts")["feature"], 0, 1
  )
  expected = np.array(variables["params"]["common_prompt"])
  expected[:, 1] = 0
  expected[:, 2, 3::16] = 0
  np.testing.assert_array_equal(tokens, expected)

  # The same masks as parameters, and as data of a compiled step.
  params = variables["params"] | {n: jnp.array(m, float) for n, m in MASKS.items()}
  trained, _ = init()
  others = trained.apply({"params": params}, IMAGES, method="prompts")["feature"]
  np.testing.assert_array_equal(others[:, 0], expected)
  ones = {"token_mask": (1, 1, 1), "piece_mask": ((1,) * 16,) * 3}
  data = {name: jnp.array(mask, jnp.float32) for name, mask in MASKS.items()}
  others = init(**ones)[0].apply(
    {**variables, "hparams": data}, IMAGES, method="prompts"
  )["feature"]
  np.testing.assert_array_equal(others[:, 0], expected)


def test_queries_stay_and_each_head_has_its_own_prompts():
  method, variables = init(share_kv=False)
  adaptation = method.apply(variables, IMAGES, IMAGES, method="adapt")
  block = {name: leaf[1] for name, leaf in adaptation.blocks.items()}
  q, k, v = jnp.ones((3, 2, 5, 2, 20))
  new_q, new_k, new_v = method.hooks().qkv(HookArrays(block), q, k, v)
  assert new_q is q and new_k.shape == new_v.shape == (2, 7, 2, 20)
  for name, joined in (("key", new_k), ("value", new_v)):
    prompt = variables["params"][f"{name}_prompt"][1]
    np.testing.assert_array_equal(joined[1, 5:, 1], prompt[1])
    np.testing.assert_array_equal(joined[:, :5], jnp.ones((2, 5, 2, 20)))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"token_mask": (1, 0)}, r"token_mask has the shape \[2\], but prompt_length is 3"),
    ({"piece_mask": ((1, 0),) * 3}, r"piece_mask has the shape \[3, 2\].*\[3, 16\]"),
    ({"piece_mask": (1, 0, 1)}, r"piece_mask has the shape \[3\].*\[3, 16\] zeros"),
    ({"token_mask": (1, 0.5, 1)}, r"token_mask is \(1, 0.5, 1\), expected zeros and"),
  ],
)
def test_wrong_masks_are_one_line(fields, message):
  with pytest.raises(ValueError, match=message):
    create_method("e2vpt", SPEC, prompt_length=3, **fields)


@pytest.mark.parametrize("other", ["vfpt", "vapt"])
def test_two_methods_with_prompts_do_not_go_together(other):
  with pytest.raises(ValueError, match=f"'e2vpt' and '{other}'.*own prompts"):
    create_method(f"e2vpt+{other}", SPEC)

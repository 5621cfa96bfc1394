"""TransHP: its hierarchies and losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from insvp_jax import trees
from insvp_jax.methods import BackboneSpec, create_method
from insvp_jax.methods.base import Apply
from insvp_jax.models.vit import decode_variant

SPEC = BackboneSpec(
  width=32, depth=6, mlp_dim=64, num_heads=2, patch_size=4, image_size=16
)
# The published hierarchy of ImageNet.
IMAGENET = (2, 2, 2, 4, 9, 16, 25, 49, 90, 170, 406)


@functools.partial(jax.jit, static_argnums=0)
def init(method):
  images = jnp.zeros((1, 16, 16, 3))
  return method.init(jax.random.key(0), images, method="prompts")["params"]


def test_count_of_imagenets_hierarchy_on_b16():
  spec = BackboneSpec(**decode_variant("B/16"), image_size=224)
  hierarchy = tuple(tuple(i % size for i in range(1000)) for size in IMAGENET)
  method = create_method("transhp", spec, 1000, hierarchy=hierarchy)
  assert method.level_blocks == tuple(range(11))
  shapes = jax.eval_shape(lambda: init(method))
  assert trees.count(shapes) == 1_207_296


def test_defaults():
  method = create_method("transhp", SPEC, 12)
  assert (method.level_blocks, method.level_weights) == ((4,), (1.0,))
  assert method.level_sizes() == (3,)
  params = init(method)
  assert params["level_0"]["prompt"].shape == (4, 32)
  np.testing.assert_array_equal(params["hierarchy"], -np.ones((1, 12)))
  mask = trees.mask(
    {"prompter": params, "head": {"kernel": 0}}, method.trainable_patterns()
  )
  assert mask["prompter"] == {
    "level_0": {"prompt": True, "matrix": True},
    "hierarchy": False,
  }


def test_losses_take_mixed_targets_and_classes_without_a_label():
  hierarchy = ((0, 1, 1), (0, -1, 1))
  method = create_method(
    "transhp", SPEC, 3, hierarchy=hierarchy, level_blocks=(1, 3), level_weights=(2, 0.5)
  )
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(2, 2, 3)).astype(np.float32)
  reads = [None] * 6
  for i, block in enumerate((1, 3)):
    weight = np.float32(method.level_weights[i])
    reads[block] = {"logits": logits[i], "weight": weight}
  # The second image is mixed of classes 1 and 2.
  targets = np.array([[1.0, 0, 0], [0, 0.75, 0.25]], np.float32)
  log_probs = scipy.special.log_softmax(logits, axis=-1)
  first = -(log_probs[0][0, 0] + log_probs[0][1, 1]) / 2
  # Row 2 of the second level is that of no label.
  second = log_probs[1][0, 0] + 0.75 * log_probs[1][1, 2] + 0.25 * log_probs[1][1, 1]
  loss = jax.jit(method.extra_loss)({}, reads, targets)
  np.testing.assert_allclose(loss, 2 * first - 0.5 * second / 2, rtol=1e-6)
  # A hierarchy that was found is a parameter.
  found = create_method(
    "transhp", SPEC, 3, levels=(2, 2), level_blocks=(1, 3), level_weights=(2, 0.5)
  )
  params = {"hierarchy": np.asarray(hierarchy, np.float32)}
  again = jax.jit(found.extra_loss)(params, reads, targets)
  np.testing.assert_allclose(again, loss, rtol=1e-6)


def test_classes_with_near_features_become_one_coarse_class():
  method = create_method("transhp", SPEC, 6, levels=(2, 3))
  # Class 4 has no image, but for one that is padding.
  centres = np.array([0.0, 10.0, 0.1, 10.1, 5.0, 14.0])
  labels = np.array([0, 1, 2, 3, 5, 0, 1, 4])
  batches = [
    {
      "images": centres[labels] + 0.01 * np.arange(8),
      "labels": labels,
      "mask": labels != 4,
    }
  ]

  def backbone(params, images, adaptation=None):
    return np.stack([images, -images], axis=1).astype(np.float32), None

  params = {"backbone": {}, "prompter": dict(init(method)), "head": {}}
  prepared = method.prepare(params, lambda: iter(batches), Apply(backbone, None, None))
  two, three = prepared["prompter"]["hierarchy"]
  assert two[0] == two[2] != two[1] == two[3] == two[5]
  assert three[0] == three[2] != three[1] == three[3] != three[5] != three[0]
  assert two[4] == three[4] == -1
  assert set(two) == {-1, 0, 1} and set(three) == {-1, 0, 1, 2}
  # With a hierarchy that is given nothing is computed.
  given = create_method("transhp", SPEC, 3, hierarchy=((0, 1, 1),))
  assert not given.prepares() and method.prepares()


def test_as_many_coarse_classes_as_there_are_classes():
  method = create_method("transhp", SPEC, 2, level_blocks=(5,))
  batch = {
    "images": np.arange(3.0),
    "labels": np.array([1, 0, 1]),
    "mask": np.ones(3),
  }
  params = {"backbone": {}, "prompter": dict(init(method)), "head": {}}
  apply = Apply(
    lambda params, images, adaptation=None: (images[:, None], None), None, None
  )
  prepared = method.prepare(params, lambda: iter([batch]), apply)
  np.testing.assert_array_equal(prepared["prompter"]["hierarchy"], [[0, 1]])


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    (
      {"hierarchy": ((0, 1),)},
      "level 0 of hierarchy covers 2 classes, but there are 3",
    ),
    ({"hierarchy": (0, 1, 1)}, "level 0 of hierarchy is 0, expected a tuple"),
    ({"hierarchy": ((0, 1, -2),)}, r"level 0 of hierarchy is \(0, 1, -2\)"),
    ({"hierarchy": ()}, r"hierarchy is \(\), expected a tuple for each level"),
    ({"levels": (4,)}, r"levels is \(4,\), but there are only 3 classes"),
    ({"levels": (2, 0)}, r"levels is \(2, 0\), expected a tuple of integers"),
    ({"levels": (2,), "hierarchy": ((0, 0, 1),)}, "hierarchy and levels are both set"),
    ({"level_blocks": (6,)}, r"level_blocks is \(6,\), expected 1 different blocks"),
    ({"levels": (2, 3), "level_blocks": (1, 1)}, "expected 2 different blocks"),
    ({"level_blocks": (0, 1)}, "expected one for each of 1 levels"),
    ({"level_weights": (0.1, 0.2)}, "expected one for each of 1 levels"),
    ({"level_weights": (float("nan"),)}, "expected a tuple of finite numbers"),
  ],
)
def test_bad_input_is_one_clear_line(kwargs, message):
  with pytest.raises(ValueError, match=message) as error:
    create_method("transhp", SPEC, 3, **kwargs)
  assert "\n" not in str(error.value)

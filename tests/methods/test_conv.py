"""The convolution's forms compute one function; the rule that chooses between them."""

import functools
import re

import flax.linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import pytest

from insvp_jax import methods
from insvp_jax.methods.ops.conv import CHOICES, PORTABLE, Conv, auto_is, choose_form
from insvp_jax.methods.ops.conv_forms import FORMS, blocks, fft, fft_length, nhwc

# Of the largest absolute value, or of the data's own size where that is less.
TOLERANCE = {"float64": 1e-13, "float32": 2e-6}
KEY = jax.random.key(0)


def output_and_gradients(module, variables, images, weights):
  """Of sum(weights * module(images)), with respect to parameters and images."""

  @jax.jit
  def run(variables, images, weights):
    output, backward = jax.vjp(module.apply, variables, images)
    return output, *backward(weights)

  # On the host, where a difference is no program of its own.
  return jax.device_get(jax.tree.leaves(run(variables, images, weights)))


def assert_near(actual, expected, tolerance):
  for a, b in zip(actual, expected, strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert np.max(np.abs(a - b)) <= tolerance * max(1, np.max(np.abs(b)))


@functools.cache
def case(dtype, *, height, width, channels, features, kernel, dilation):
  """Returns (arguments, output and gradients of flax's convolution)."""
  rng = np.random.default_rng(0)
  images = rng.normal(size=(2, height, width, channels)).astype(dtype)
  weights = rng.normal(size=(2, height, width, features)).astype(dtype)
  plain = nn.Conv(
    features,
    (kernel, kernel),
    kernel_dilation=(dilation, dilation),
    padding="SAME",
  )
  variables = {
    "params": {
      "kernel": rng.normal(size=(kernel, kernel, channels, features)).astype(dtype),
      "bias": rng.normal(size=features).astype(dtype),
    }
  }
  arguments = variables, images, weights
  return arguments, output_and_gradients(plain, *arguments)


def compare(form, dtype, **sizes):
  """Compares a form with flax's convolution."""
  with jax.enable_x64(dtype == "float64"):
    arguments, expected = case(dtype, **sizes)
    ours = Conv(sizes["features"], sizes["kernel"], sizes["dilation"], form)
    actual = output_and_gradients(ours, *arguments)
    assert_near(actual, expected, TOLERANCE[dtype])


@settings(max_examples=12)
@given(
  height=st.integers(1, 33),
  width=st.integers(1, 33),
  channels=st.integers(1, 7),
  features=st.integers(1, 7),
  kernel=st.integers(1, 13),
  dilation=st.integers(1, 5),
)
def test_every_form_is_flax_convolution_in_float64(**sizes):
  for form in ("fft", "blocks"):
    compare(form, "float64", **sizes)


PUBLISHED = (
  # The published kernels; sides that no block and no transform length divides.
  (6, 3, 25, 1, 31),
  (3, 6, 11, 1, 31),
  (3, 16, 7, 1, 31),
  (3, 6, 3, 5, 31),
  (6, 3, 3, 12, 31),
  # A kernel wider than the image.
  (6, 3, 25, 1, 9),
)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
  ("channels", "features", "kernel", "dilation", "size"), PUBLISHED
)
def test_published_kernels(form, dtype, channels, features, kernel, dilation, size):
  compare(
    form,
    dtype,
    height=size,
    width=size,
    channels=channels,
    features=features,
    kernel=kernel,
    dilation=dilation,
  )


def test_on_a_gpu_the_bias_has_the_same_gradient(monkeypatch):
  sizes = {"height": 7, "width": 5, "channels": 2, "features": 3}
  sizes |= {"kernel": 3, "dilation": 1}
  case("float32", **sizes)  # what is expected, as a CPU computes it
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  compare("plain", "float32", **sizes)
  module = Conv(3, 3, form="plain")
  variables = jax.eval_shape(module.init, KEY, jnp.ones((1, 7, 5, 2)))

  def loss(variables):
    return jnp.sum(module.apply(variables, jnp.ones((1, 7, 5, 2))))

  # Or XLA makes one sum of both, over all pixels at once.
  assert "optimization_barrier" in str(jax.make_jaxpr(jax.grad(loss))(variables))


@pytest.mark.parametrize("form", FORMS)
def test_forms_keep_the_dtype_of_the_images(form):
  images, kernel = (np.ones(s, jnp.bfloat16) for s in ((1, 8, 8, 2), (3, 3, 2, 1)))
  output = np.asarray(jax.jit(lambda *a: FORMS[form](*a, 1))(images, kernel))
  assert output.dtype == jnp.bfloat16
  np.testing.assert_allclose(output[0, 1:-1, 1:-1], 18, rtol=0.01)


@given(size=st.integers(1, 400), extent=st.integers(0, 400))
def test_transforms_are_long_enough_and_fast(size, extent):
  length = fft_length(size, extent)
  assert length >= max(size + extent - extent // 2, extent + 1)
  assert 210**9 % length == 0
  assert length <= 2 * (size + extent)


@pytest.mark.parametrize("form", FORMS)
def test_a_population_of_kernels_under_vmap(form):
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(2, 10, 10, 3)), jnp.float32)
  kernels = rng.normal(size=(2, 5, 5, 3, 2)).astype(np.float32)

  def gradient(kernel):
    return jax.grad(lambda k: jnp.sum(FORMS[form](images, k, 1) ** 2))(kernel)

  expected = np.stack([jax.jit(gradient)(kernel) for kernel in kernels])
  found = np.asarray(jax.jit(jax.vmap(gradient))(kernels))
  assert_near([found], [expected], TOLERANCE["float32"])


@pytest.mark.parametrize(
  ("side", "stride", "padding", "dilation"),
  # With pixels that no output reads; AlexNet's second layer; more padding than reach.
  [(17, 4, 2, 1), (9, 1, 2, 1), (10, 3, 0, 2), (6, 2, 5, 1)],
)
def test_strides_and_padding(side, stride, padding, dilation):
  rng = np.random.default_rng(0)
  images = rng.normal(size=(2, side, side + 1, 3)).astype(np.float32)
  kernel = rng.normal(size=(5, 5, 3, 4)).astype(np.float32)

  def compiler(images, kernel):
    return jax.lax.conv_general_dilated(
      images,
      kernel,
      (stride, stride),
      [(padding, padding)] * 2,
      rhs_dilation=(dilation, dilation),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )

  @jax.jit
  def both(images, kernel):
    found = []
    for form in (
      functools.partial(nhwc, dilation=dilation, stride=stride, padding=padding),
      compiler,
    ):
      y, backward = jax.vjp(form, images, kernel)
      found.append((y, *backward(jnp.sin(y))))
    return found

  actual, expected = jax.device_get(both(images, kernel))
  assert_near(actual, expected, TOLERANCE["float32"])


def test_gradients_have_the_layout_that_is_fast_on_cpus_in_a_loop_too():
  """XLA brings convolutions into it, but not everywhere."""
  rng = np.random.default_rng(0)
  images = rng.normal(size=(2, 8, 8, 4)).astype(np.float32)
  kernel = rng.normal(size=(3, 3, 4, 5)).astype(np.float32)

  def layouts(form):
    def loss(images, kernel):
      return jnp.sum(FORMS[form](images, kernel, 1) ** 2)

    def loop(images, kernel):
      def body(_, carry):
        return jax.grad(loss, argnums=(0, 1))(*carry)

      return jax.lax.fori_loop(0, 2, body, (images, kernel))

    text = jax.jit(loop).lower(images, kernel).compile().as_text()
    return re.findall(r" convolution\(.*?dim_labels=([^,]+)", text)

  found = layouts("nhwc")
  assert set(found) == {"b01f_01io->b01f"} and len(found) == 3
  # Once this fails, the compiler needs no help any more.
  assert set(layouts("plain")) > {"b01f_01io->b01f"}


def test_the_gradient_of_frozen_input_costs_no_transform():
  """As many transforms as images, kernel, output and what is differentiated need."""
  images, kernel = (
    jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 16, 16, 3), (5, 5, 3, 4))
  )

  def transforms(argnums):
    def loss(images, kernel):
      return jnp.sum(fft(images, kernel, 1) ** 2)

    gradient = jax.jit(jax.grad(loss, argnums=argnums)).lower(images, kernel)
    return gradient.compile().as_text().count(" fft(")

  both, of_images, of_kernel = map(transforms, ((0, 1), (0,), (1,)))
  assert (both, of_images, of_kernel) == (6, 5, 5)


def test_blocks_keep_no_copies_of_the_images_for_the_backward_pass():
  images, kernel = jnp.ones((2, 32, 32, 6)), jnp.ones((25, 25, 6, 3))
  _, backward = jax.eval_shape(lambda *a: jax.vjp(blocks, *a, 1), images, kernel)
  kept = sum(leaf.size for leaf in jax.tree.leaves(backward))
  assert kept == images.size + kernel.size


def on(monkeypatch, platform, devices):
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  monkeypatch.setattr(jax, "device_count", lambda: devices)


RELEASE = ((3, 6, 11, 1), (6, 3, 25, 1), (3, 16, 7, 1), (16, 48, 9, 1), (48, 48, 3, 1))
PAPER = ((3, 6, 3, 5), (6, 3, 3, 12), (3, 9, 9, 1), (9, 27, 5, 1), (27, 27, 3, 1))


@pytest.mark.parametrize(
  ("platform", "devices", "release", "paper"),
  [
    ("cpu", 1, "fft fft fft nhwc nhwc", "fft fft fft nhwc nhwc"),
    ("cpu", 4, "blocks blocks nhwc nhwc nhwc", "nhwc nhwc nhwc nhwc nhwc"),
    ("gpu", 1, "blocks blocks blocks plain plain", "blocks blocks blocks blocks plain"),
    ("tpu", 8, "blocks blocks blocks plain plain", "blocks blocks blocks blocks plain"),
  ],
)
def test_forms_of_the_presets(monkeypatch, platform, devices, release, paper):
  on(monkeypatch, platform, devices)
  assert " ".join(choose_form(*shape) for shape in RELEASE) == release
  assert " ".join(choose_form(*shape) for shape in PAPER) == paper


def test_a_sum_over_one_pixel_is_not_transformed(monkeypatch):
  on(monkeypatch, "cpu", 1)
  assert choose_form(1, 1, 1, 1) == "nhwc"


@pytest.mark.parametrize("form", CHOICES)
def test_parameters_do_not_depend_on_the_form(form):
  spec = methods.BackboneSpec(
    width=32, depth=2, mlp_dim=64, num_heads=2, patch_size=4, image_size=16
  )
  images = jnp.zeros((1, 16, 16, 3))

  def shapes(**kwargs):
    method = methods.create_method("insvp", spec, preset="release", **kwargs)
    return jax.eval_shape(lambda key: method.init(key, images, method="prompts"), KEY)

  assert shapes() == shapes(conv=form)
  # What is drawn under these names: small ones compile sooner.
  default, given_form = (
    jax.jit(conv.init)(KEY, images) for conv in (Conv(2, 5), Conv(2, 5, form=form))
  )
  jax.tree.map(np.testing.assert_array_equal, default, given_form)


def test_an_unknown_form_is_one_clear_line():
  spec = methods.BackboneSpec(
    width=32, depth=2, mlp_dim=64, num_heads=2, patch_size=4, image_size=16
  )
  with pytest.raises(ValueError, match="conv is 'ftt'.*Did you mean 'fft'"):
    methods.create_method("insvp", spec, conv="ftt")


def test_a_portable_program_has_the_form_of_each_platform():
  conv, images = Conv(3, 7), np.ones((2, 8, 8, 3), np.float32)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: rng.uniform(-0.1, 0.1, leaf.shape).astype(np.float32),
    jax.eval_shape(conv.init, KEY, images),
  )

  def apply(images):
    with auto_is(PORTABLE):
      return conv.apply(params, images)

  shape = jax.ShapeDtypeStruct((*export.symbolic_shape("b"), 8, 8, 3), jnp.float32)
  lowered = {
    platforms: export.export(jax.jit(apply), platforms=platforms)(shape)
    for platforms in (("cpu",), ("cuda",), ("cpu", "cuda", "tpu"))
  }
  assert ["fft" in e.mlir_module() for e in lowered.values()] == [True, False, True]
  # Elsewhere "auto" is what it was.
  outside = jax.jit(conv.apply)(params, images)
  for exported in (lowered[("cpu",)], lowered[("cpu", "cuda", "tpu")]):
    np.testing.assert_allclose(exported.call(images), outside, atol=1e-5)
  with auto_is("plain"):
    plain = str(jax.make_jaxpr(conv.apply)(params, images))
  assert "conv_general_dilated" in plain and "fft" not in plain

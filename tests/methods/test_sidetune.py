"""Sidetune's side network: against a computation in NumPy, and from files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from tiny_runs import draw_backbone

from insvp_jax import trees
from insvp_jax.methods import BackboneSpec, create_method, sidetune
from insvp_jax.methods.base import Apply
from insvp_jax.methods.ops.conv_forms import nhwc
from insvp_jax.methods.sidetune import AlexNet, adaptive_average_pool

SPEC = BackboneSpec(8, 2, 16, 2, 4, 96)
CHANNELS = (2, 3, 4, 3, 2)
# torchvision's `features`: (name, stride, padding, whether a pool follows).
CONVS = ((0, 4, 2, 1), (3, 1, 2, 1), (6, 1, 1, 0), (8, 1, 1, 0), (10, 1, 1, 1))
RNG = np.random.default_rng(0)


def torch_weights():
  """Returns random weights under torchvision's names, [out, in, h, w]."""
  inputs, weights = (3, *CHANNELS), {}
  for i, (name, *_) in enumerate(CONVS):
    size = (11, 5, 3, 3, 3)[i]
    shape = (inputs[i + 1], inputs[i], size, size)
    weights[f"features.{name}.weight"] = RNG.normal(0, 0.3, shape).astype(np.float32)
    weights[f"features.{name}.bias"] = RNG.normal(0, 0.3, shape[0]).astype(np.float32)
  return weights


def windows(x, size, stride):
  """Returns [c, i, j, size, size] of x [c, h, w]."""
  view = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))
  return view[:, ::stride, ::stride]


def average(x, cells):
  """Adaptive average pooling of x [c, h, w], pixel by pixel."""
  out, (_, h, w) = np.zeros((len(x), cells, cells)), x.shape
  for i in range(cells):
    for j in range(cells):
      rows = slice(i * h // cells, int(np.ceil((i + 1) * h / cells)))
      columns = slice(j * w // cells, int(np.ceil((j + 1) * w / cells)))
      out[:, i, j] = x[:, rows, columns].mean((1, 2))
  return out


def flat_features(image, weights):
  """What torch's flatten(1) of AlexNet's layers gives for image [h, w, 3]."""
  x = np.float64(image).transpose(2, 0, 1)
  for name, stride, padding, pooled in CONVS:
    kernel = np.float64(weights[f"features.{name}.weight"])
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    x = np.einsum("cijuv,ocuv->oij", windows(x, kernel.shape[-1], stride), kernel)
    x = np.maximum(x + weights[f"features.{name}.bias"][:, None, None], 0)
    x = windows(x, 3, 2).max((3, 4)) if pooled else x
  return average(x, 6).ravel()


def params_of(method, images, weights=""):
  feature = np.zeros((len(images), SPEC.width), np.float32)
  init = jax.jit(lambda *x: method.init(*x, method="adapt_feature"))
  params = {"prompter": init(jax.random.key(0), feature, images)["params"]}
  if method.prepares():
    params = method.prepare(params, None, Apply(None, None, None))
  return params["prompter"]


def adapted(method, params, feature, images):
  apply = jax.jit(lambda p, *x: method.apply({"params": p}, *x, method="adapt_feature"))
  return np.asarray(apply(params, feature, images))


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_it_is_torchvision_s_alexnet_blended(kind, tmp_path):
  weights, path = torch_weights(), tmp_path / f"alexnet.{kind}"
  # The classifier's layers are no part of it.
  stored = {"classifier.1.weight": np.zeros((2, 2), np.float32), **weights}
  if kind == "npz":
    np.savez(path, **stored)
  else:
    safetensors.numpy.save_file(stored, path)
  method = create_method("sidetune", SPEC, channels=CHANNELS, weights=str(path))
  images = RNG.normal(0, 1, (2, 96, 96, 3)).astype(np.float32)
  feature = RNG.normal(0, 1, (2, SPEC.width)).astype(np.float32)
  params = params_of(method, images)
  assert params["alpha"] == 0
  params["alpha"] = np.float32(0.4)
  # [n, d], as PyTorch's [d, n] transposed.
  projection = np.asarray(params["projection"]["kernel"])
  side = np.stack([flat_features(x, weights) @ projection for x in images])
  share = 1 / (1 + np.exp(-0.4))
  expected = share * feature + (1 - share) * side
  assert np.abs(side).mean() > 0.1
  actual = adapted(method, params, feature, images)
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 4, 6, 13])
def test_the_average_over_cells(size):
  x = RNG.normal(0, 1, (size, size, 2))
  pool = jax.jit(adaptive_average_pool, static_argnums=1)
  pooled = np.asarray(pool(x[None].astype(np.float32), 6))[0]
  expected = average(x.transpose(2, 0, 1), 6).transpose(1, 2, 0)
  np.testing.assert_allclose(pooled, expected, rtol=1e-5, atol=1e-6)


def test_images_of_any_size():
  small = RNG.normal(0, 1, (1, 32, 32, 3)).astype(np.float32)
  method = create_method("sidetune", SPEC, channels=CHANNELS)
  params = params_of(method, small)
  feature = np.zeros((1, SPEC.width), np.float32)
  enlarged = jax.image.resize(small, (1, 64, 64, 3), "bilinear")
  outputs = [adapted(method, params, feature, x) for x in (small, enlarged)]
  np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)
  assert outputs[0].any()
  # The smallest that torchvision's takes goes through as it is.
  assert adapted(method, params, feature, enlarged[:, :63, :63]).any()
  with pytest.raises(ValueError, match=r"^side_size is 62, expected .* at least 63,"):
    create_method("sidetune", SPEC, side_size=62)
  with pytest.raises(ValueError, match="side_size is 8193, expected .* at most 8192"):
    create_method("sidetune", SPEC, side_size=8193)


def test_a_file_of_other_weights_is_refused_in_one_line(tmp_path):
  weights = torch_weights()
  images = np.zeros((1, 64, 64, 3), np.float32)
  plain = create_method("sidetune", SPEC, channels=CHANNELS)
  before = params_of(plain, images)

  def refused(path, message):
    method = create_method("sidetune", SPEC, channels=CHANNELS, weights=str(path))
    with pytest.raises(ValueError, match=message) as info:
      method.prepare({"prompter": before}, None, None)
    assert "\n" not in str(info.value)

  np.savez(tmp_path / "a.npz", **{**weights, "features.8.bias": np.zeros(7)})
  refused(tmp_path / "a.npz", r"features.8.bias in .* is \[7\], expected .* \[3\]")
  del weights["features.6.weight"]
  np.savez(tmp_path / "b.npz", **weights)
  refused(tmp_path / "b.npz", "there is no array 'features.6.weight'")
  safetensors.numpy.save_file(weights, tmp_path / "c.safetensors")
  refused(tmp_path / "c.safetensors", "there is no array 'features.6.weight'")
  weights["features.6.weight"] = np.zeros((4, 3, 3, 3), np.float32)
  safetensors.numpy.save_file(weights, tmp_path / "d.safetensors")
  cut = (tmp_path / "d.safetensors").read_bytes()[:-8]
  (tmp_path / "d.safetensors").write_bytes(cut)
  refused(tmp_path / "d.safetensors", "truncated or damaged")
  # PyTorch's own format: a pickle in a zip.
  (tmp_path / "alexnet.pth").write_bytes(b"PK\x03\x04" + bytes(64))
  refused(tmp_path / "alexnet.pth", "no weights of AlexNet in torchvision's names: ")


def test_all_of_it_trains():
  method = create_method("sidetune", SPEC, channels=CHANNELS)
  images = np.zeros((1, 64, 64, 3), np.float32)
  prompter = jax.eval_shape(lambda: params_of(method, images))
  shapes = {"prompter": prompter, "head": {"kernel": np.zeros(1)}}
  mask = trees.mask(shapes, method.trainable_patterns())
  assert len(trees.flatten(mask)) == 13 and all(trees.flatten(mask).values())


def test_one_cpu_computes_the_same_gradients_in_its_own_form(monkeypatch):
  images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
  images = jax.device_put(images)
  module, strides = AlexNet((4, 6, 8, 6, 4)), []

  def spy(*args, stride, **kwargs):
    strides.append(stride)
    return nhwc(*args, stride=stride, **kwargs)

  def gradient(params):
    def total(params):
      return jnp.sum(module.apply({"params": params}, images) ** 2)

    return jax.device_get(jax.jit(jax.grad(total))(params))

  params = draw_backbone(jax.eval_shape(module.init, jax.random.key(0), images))
  expected = gradient(params["params"])
  monkeypatch.setattr(sidetune, "is_one_cpu", lambda: True)
  monkeypatch.setattr(sidetune, "nhwc", spy)
  found = gradient(params["params"])
  assert strides == [4, 1, 1, 1, 1]
  for name, leaf in trees.flatten(expected).items():
    np.testing.assert_allclose(
      trees.flatten(found)[name], leaf, rtol=1e-4, atol=1e-5, err_msg=name
    )

"""LION: fixed points, their gradients, and training that prunes."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import datasets

from insvp_jax import trees
from insvp_jax.methods import BackboneSpec, create_method
from insvp_jax.methods.lion import cell, contract
from insvp_jax.methods.ops import fixed_point as fp
from insvp_jax.models.classifier import create_model

SPEC = BackboneSpec(
  width=32, depth=3, mlp_dim=64, num_heads=2, patch_size=4, image_size=16
)
UNROLLED = 200
PIXELS, FEATURE = (3, 8, (3, 12, 12, 8)), (1, 64, (3, 1, 1, 64))


@functools.cache
def digits():
  """Returns six scans of digits, [6, 16, 16, 3] in [-1, 1]."""
  small = datasets.load_digits().images[:6] / 8 - 1
  return jnp.asarray(np.kron(small, np.ones((2, 2)))[..., None].repeat(3, -1), "f")


def model(name="lion", **kwargs):
  return create_model(
    "mu/4",
    name,
    num_classes=5,
    image_size=16,
    backbone_kwargs={"depth": 3},
    method_kwargs=kwargs,
    head_init="torch",
  )


@functools.cache
def start():
  return jax.jit(model().init)(jax.random.key(0), digits())["params"]


@functools.cache
def moved():
  """Returns parameters at which nothing is the identity."""
  rng = np.random.default_rng(1)
  prompter = jax.tree.map(
    lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype),
    start()["prompter"],
  )
  return {**start(), "prompter": prompter}


def weights(taps, width, shape, *, scale=1.0, seed=0):
  """Returns a kernel, what is injected and a direction, as they are at the start."""
  rng = np.random.default_rng(seed)
  bound = scale / np.sqrt(taps**2 * width)
  kernel = rng.uniform(-bound, bound, (taps, taps, width, width))
  injected, direction = rng.standard_normal((2, *shape)) * 0.5
  return tuple(jnp.asarray(x, jnp.float32) for x in (kernel, injected, direction))


def value_and_grads(arrays, **options):
  kernel, injected, direction = arrays

  @jax.jit
  @jax.value_and_grad
  def loss(operands):
    kernel, injected = operands
    z = fp.fixed_point(
      cell, (contract(kernel, 0.9), injected), jnp.zeros_like(injected), **options
    )
    return jnp.vdot(direction, z)

  return loss((kernel, injected))


def errors(grads, expected):
  return [
    float(jnp.max(jnp.abs(grad - other)) / jnp.max(jnp.abs(other)))
    for grad, other in zip(grads, expected, strict=True)
  ]


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("sizes", [PIXELS, FEATURE])
def test_the_implicit_gradient_is_that_of_200_steps(sizes, scale):
  arrays = weights(*sizes, scale=scale)
  value, expected = value_and_grads(arrays, iterations=UNROLLED, gradient="unrolled")
  default = create_method("lion", SPEC).iterations
  for options in ({}, {"solver": "anderson"}):
    found, grads = value_and_grads(arrays, iterations=default, **options)
    np.testing.assert_allclose(found, value, rtol=1e-4)
    assert max(errors(grads, expected)) < 1e-4
  # Phantom gradients are approximations of it, in its direction.
  found, grads = value_and_grads(arrays, iterations=default, gradient="phantom")
  np.testing.assert_allclose(found, value, rtol=1e-4)
  assert 1e-4 < max(errors(grads, expected)) < 0.5
  for grad, other in zip(grads, expected, strict=True):
    norms = jnp.linalg.norm(grad) * jnp.linalg.norm(other)
    assert jnp.vdot(grad, other) / norms > 0.95


def test_anderson_finds_the_same_point_and_helps_where_iteration_is_slow():
  _, injected, _ = weights(*FEATURE)
  # Almost linear and at its bound in all directions: the worst there is.
  operands = (contract(9 * jnp.eye(64)[None, None], 0.9), 0.1 * injected)

  def solve(**options):
    return fp.fixed_point(cell, operands, jnp.zeros_like(injected), **options)

  exact = solve(iterations=400)
  slow, fast = solve(iterations=25), solve(iterations=25, solver="anderson")
  np.testing.assert_allclose(fast, exact, rtol=1e-5, atol=1e-6)
  far = fp.residual(cell, operands, slow)
  assert np.all(far > 100 * fp.residual(cell, operands, fast))


@pytest.mark.parametrize("gradient", fp.GRADIENTS)
def test_gradients_under_vmap_and_remat(gradient):
  options = {"iterations": 8, "gradient": gradient}
  trials = [weights(*PIXELS, seed=seed) for seed in range(2)]

  def loss(kernel, injected, direction):
    z = fp.fixed_point(
      cell, (contract(kernel, 0.9), injected), jnp.zeros_like(injected), **options
    )
    return jnp.vdot(direction, z)

  grad = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss), argnums=(0, 1))))
  together = grad(*(jnp.stack(leaves) for leaves in zip(*trials, strict=True)))
  for i, arrays in enumerate(trials):
    _, alone = value_and_grads(arrays, **options)
    for leaf, other in zip(together, alone, strict=True):
      np.testing.assert_allclose(leaf[i], other, rtol=1e-4, atol=1e-5)


@jax.jit
def jacobian_at_zero(kernel, units):
  """Returns the Jacobian of a step by the state, applied to each of the units."""
  operands = (contract(kernel, 0.9), jnp.zeros(1))
  return jax.jvp(lambda z: cell(operands, z), (0 * units,), (units,))[1]


@settings(max_examples=30)
@given(
  taps=st.sampled_from([1, 3]),
  width=st.sampled_from([1, 8]),
  log_scale=st.floats(-6, 6),
  rank_one=st.booleans(),
  seed=st.integers(0, 2**16),
)
def test_a_step_is_a_contraction_whatever_the_weights(
  taps, width, log_scale, rank_one, seed
):
  rng = np.random.default_rng(seed)
  shape = (taps, taps, width, 1 if rank_one else width)
  kernel = (10**log_scale * rng.standard_normal(shape)).astype(np.float32)
  kernel = np.broadcast_to(kernel, (taps, taps, width, width))
  bound = jax.jit(fp.spectral_bound)(kernel)
  norms = np.linalg.norm(kernel.astype(np.float64), 2, axis=(2, 3))
  # Never below the norm, nor far above it.
  assert np.all(bound >= norms * (1 - 1e-5))
  assert np.all(bound <= norms * width ** (1 / 64) * (1 + 1e-5) + 1e-5)
  # The matrix of the whole linear map, by its action on unit vectors: exact.
  size = 4 if taps > 1 else 1
  units = jnp.eye(size**2 * width).reshape(-1, size, size, width)
  columns = jacobian_at_zero(kernel, units)
  assert np.linalg.norm(np.asarray(columns).reshape(len(units), -1), 2) < 0.9 + 1e-4


def test_the_gradient_of_a_zero_kernel_is_finite():
  kernel, injected, direction = weights(*PIXELS)
  _, grads = value_and_grads((0 * kernel, injected, direction), iterations=3)
  assert all(np.all(np.isfinite(grad)) for grad in grads)


def test_starts_as_the_identity_bit_for_bit():
  # Behind the plain backbone the same head.
  params = {part: start()[part] for part in ("backbone", "head")}
  expected = jax.jit(model("linear").apply)({"params": params}, digits())
  np.testing.assert_array_equal(
    jax.jit(model().apply)({"params": start()}, digits()), expected
  )
  prompts = jax.jit(functools.partial(model().apply, method="prompts"))
  assert not np.any(prompts({"params": start()}, digits())["image"])
  changed = prompts({"params": moved()}, digits())["image"]
  assert changed.shape == digits().shape and np.all(np.std(changed, axis=(1, 2)) > 0)


def test_the_residuals_of_both_layers_are_read_and_small():
  apply = jax.jit(functools.partial(model().apply, mutable=["residuals"]))
  for params in (start(), moved()):
    logits, found = apply({"params": params}, digits())
    for layer in ("pixels", "feature"):
      (residual,) = found["residuals"]["prompter"][layer]["residual"]
      assert residual.shape == (6,) and 0 < np.max(residual) < 1e-4
  # It is not there where nobody asks, and changes nothing.
  plain = jax.jit(model().apply)({"params": moved()}, digits())
  np.testing.assert_allclose(plain, logits, rtol=1e-6, atol=1e-6)
  few = jax.jit(functools.partial(model(iterations=2).apply, mutable=["residuals"]))
  _, found = few({"params": moved()}, digits())
  assert np.min(found["residuals"]["prompter"]["pixels"]["residual"][0]) > 1e-4


@pytest.mark.parametrize("solver", fp.SOLVERS)
def test_an_order_of_images_changes_nothing(solver):
  apply = jax.jit(model(solver=solver).apply)
  logits = apply({"params": moved()}, digits())
  order = np.array([3, 0, 5, 1, 4, 2])
  permuted = apply({"params": moved()}, digits()[order])
  np.testing.assert_array_equal(permuted, logits[order])
  for i in range(2):
    one = apply({"params": moved()}, digits()[i : i + 1])
    np.testing.assert_allclose(one[0], logits[i], rtol=1e-5, atol=1e-5)


def flat_updates(seed=0):
  """Returns (updates, params, grads) by whole name, as a train step has them."""
  rng = np.random.default_rng(seed)
  params = trees.flatten({"prompter": moved()["prompter"], "head": start()["head"]})

  def draw():
    return {
      n: jnp.asarray(rng.standard_normal(p.shape), "f") for n, p in params.items()
    }

  return draw(), draw(), params


def test_critical_entries_step_and_the_others_shrink():
  updates, grads, params = flat_updates()
  method = create_method("lion", SPEC, critical=0.25, shrinkage=0.5)
  # As in a step, where the learning rate is an array.
  adjust = jax.jit(
    lambda lr: method.adjust_updates(updates, params=params, grads=grads, lr=lr)
  )
  adjusted = adjust(jnp.float32(0.1))
  kernels = [name for name in params if name.endswith("_kernel")]
  assert len(kernels) == 6
  assert set(adjusted) == set(params)
  for name in set(params) - set(kernels):
    np.testing.assert_array_equal(adjusted[name], updates[name], err_msg=name)
  scores = {name: np.abs(np.asarray(params[name] * grads[name])) for name in kernels}
  everything = np.sort(np.concatenate([score.ravel() for score in scores.values()]))
  # One threshold over both layers.
  threshold = everything[round(0.75 * len(everything))]
  for name, score in scores.items():
    theta, is_critical = np.asarray(params[name]), score >= threshold
    np.testing.assert_array_equal(
      np.asarray(adjusted[name])[is_critical], np.asarray(updates[name])[is_critical]
    )
    after = (theta + np.asarray(adjusted[name]))[~is_critical]
    expected = np.sign(theta) * np.maximum(np.abs(theta) - 0.05, 0)
    np.testing.assert_allclose(after, expected[~is_critical], atol=1e-7)
    # To zero, and not beyond.
    assert np.any(after == 0) and not np.all(after == 0)


@pytest.mark.parametrize("critical", [0.0, 1.0])
def test_all_or_none_are_critical(critical):
  updates, grads, params = flat_updates()
  method = create_method("lion", SPEC, critical=critical, shrinkage=0)
  adjusted = method.adjust_updates(updates, params=params, grads=grads, lr=0.1)
  for name, update in adjusted.items():
    expected = updates[name] if critical or not name.endswith("_kernel") else 0
    np.testing.assert_array_equal(update, expected * np.ones_like(update))


def test_what_starts_at_zero_leaves_it():
  """At first all scores are zero: V is, and so is the gradient of W and U."""
  updates, grads, _ = flat_updates()
  params = trees.flatten({"prompter": start()["prompter"], "head": start()["head"]})
  grads = {
    name: grad if name.endswith("output_kernel") else 0 * grad
    for name, grad in grads.items()
  }
  method = create_method("lion", SPEC)
  adjusted = method.adjust_updates(updates, params=params, grads=grads, lr=0.1)
  for name, update in adjusted.items():
    np.testing.assert_array_equal(update, updates[name], err_msg=name)


def test_evaluation_prunes_and_says_what_survives():
  below = 0.05
  method, params = create_method("lion", SPEC, prune_below=below), moved()
  pruned = jax.tree_util.tree_map_with_path(
    lambda path, leaf: (
      np.where(np.abs(leaf) < below, 0, leaf)
      if path[-1].key.endswith("_kernel")
      else leaf
    ),
    params["prompter"],
  )
  counts = method.surviving(params["prompter"])
  flat = trees.flatten(pruned)
  assert counts == {
    name: (np.count_nonzero(leaf), leaf.size)
    for name, leaf in flat.items()
    if name.endswith("_kernel")
  }
  # Entries that training has brought to zero are none that survive.
  unpruned = create_method("lion", SPEC, prune_below=0)
  assert unpruned.surviving(jax.tree.map(jnp.asarray, pruned)) == counts
  kept, total = np.sum(list(counts.values()), axis=0)
  assert len(counts) == 6 and 0 < kept < total

  def logits(below, prompter, **kwargs):
    apply = jax.jit(functools.partial(model(prune_below=below).apply, **kwargs))
    return apply({"params": {**params, "prompter": prompter}}, digits())

  whole = params["prompter"]
  evaluated = logits(below, whole)
  np.testing.assert_array_equal(evaluated, logits(0.0, pruned))
  trained = logits(below, whole, train=True)
  np.testing.assert_array_equal(trained, logits(0.0, whole))
  assert not np.allclose(evaluated, trained)


@pytest.mark.parametrize("layer", ["pixels", "feature"])
def test_one_of_the_layers_alone(layer):
  alone = model(layers=(layer,))
  params = jax.jit(alone.init)(jax.random.key(0), digits())["params"]
  assert set(params["prompter"]) == {layer}
  images = jax.jit(functools.partial(alone.apply, method="prompts"))(
    {"params": params}, digits()
  )
  assert set(images) == ({"image"} if layer == "pixels" else set())
  updates, grads, flat = flat_updates()

  def keep(tree):
    return {name: leaf for name, leaf in tree.items() if f"prompter/{layer}" in name}

  adjusted = alone.prompter.adjust_updates(
    keep(updates), params=keep(flat), grads=keep(grads), lr=0.1
  )
  assert set(adjusted) == set(keep(flat))


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"contraction": 1.0}, "contraction is 1.0, expected a number between 0 and 1"),
    ({"critical": 1.5}, "critical is 1.5, expected a share"),
    ({"shrinkage": -1}, "shrinkage is -1, expected a number of at least 0"),
    ({"gradient": "implicid"}, "Did you mean 'implicit'"),
    ({"solver": "anderson", "gradient": "unrolled"}, "set solver=iteration"),
    ({"layers": ()}, "layers is"),
  ],
)
def test_bad_input_is_one_clear_line(kwargs, message):
  with pytest.raises(ValueError, match=message) as error:
    create_method("lion", SPEC, **kwargs)
  assert "\n" not in str(error.value)

"""LION: fixed points, their gradients, and training that prunes."""

import functools
import types

from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import datasets
from tiny_training import metrics, prepare, tiny_config

from insvp_jax import trees
from insvp_jax.logs.writers import Writers
from insvp_jax.methods import BackboneSpec, create_method, lion
from insvp_jax.methods.lion import cell, contract
from insvp_jax.methods.ops import conv_forms
from insvp_jax.methods.ops import fixed_point as fp
from insvp_jax.models.classifier import create_model
from insvp_jax.train import batches, trainer
from insvp_jax.train import program as program_lib
from insvp_jax.train.steps import METRICS, create_multi_step
from insvp_jax.train.timing import Timer

SPEC = BackboneSpec(
  width=16, depth=1, mlp_dim=16, num_heads=2, patch_size=4, image_size=16
)
SIZES = {"width": 16, "depth": 1, "mlp_dim": 16, "num_heads": 2}
UNROLLED, ITERATIONS = 200, create_method("lion", SPEC).iterations
PIXELS, FEATURE = (3, 8, (2, 8, 8, 8)), (1, 64, (2, 1, 1, 64))


@functools.cache
def digits():
  """Returns six scans of digits, [6, 16, 16, 3] in [-1, 1]."""
  small = datasets.load_digits().images[:6] / 8 - 1
  return np.kron(small, np.ones((2, 2)))[..., None].repeat(3, -1).astype(np.float32)


def model(name="lion", **kwargs):
  return create_model(
    "mu/4",
    name,
    num_classes=5,
    image_size=16,
    backbone_kwargs=SIZES,
    method_kwargs=kwargs,
    head_init="torch",
  )


@functools.cache
def compiled(name="lion", *, method=None, train=False, mutable=False, **kwargs):
  """Returns `(params, images) -> outputs` of a model, compiled once for all tests."""
  apply = model(name, **kwargs).apply
  options = {"train": train} if method is None else {"method": method}

  @jax.jit
  def function(params, images):
    return apply({"params": params}, images, mutable=mutable, **options)

  return function


@functools.cache
def start():
  params = jax.jit(model().init)(jax.random.key(0), digits())["params"]
  return jax.device_get(params)


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
  return tuple(x.astype(np.float32) for x in (kernel, injected, direction))


def loss(options, kernel, injected, direction):
  operands = (contract(kernel, 0.9), injected)
  z = fp.fixed_point(cell, operands, jnp.zeros_like(injected), **dict(options))
  return jnp.vdot(direction, z)


@functools.partial(jax.jit, static_argnums=0)
def compiled_grad(options, arrays):
  return jax.value_and_grad(loss, argnums=(1, 2))(options, *arrays)


def value_and_grads(arrays, iterations=ITERATIONS, **options):
  options = tuple({"iterations": iterations, **options}.items())
  return jax.device_get(compiled_grad(options, arrays))


def errors(grads, expected):
  return [
    np.max(np.abs(grad - other)) / np.max(np.abs(other))
    for grad, other in zip(grads, expected, strict=True)
  ]


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("sizes", [PIXELS, FEATURE])
def test_the_implicit_gradient_is_that_of_200_steps(sizes, scale):
  arrays = weights(*sizes, scale=scale)
  value, expected = value_and_grads(arrays, iterations=UNROLLED, gradient="unrolled")
  for options in ({}, {"solver": "anderson"}):
    found, grads = value_and_grads(arrays, **options)
    np.testing.assert_allclose(found, value, rtol=1e-4)
    assert max(errors(grads, expected)) < 1e-4
  # Phantom gradients are approximations of it, in its direction.
  found, grads = value_and_grads(arrays, gradient="phantom")
  np.testing.assert_allclose(found, value, rtol=1e-4)
  assert 1e-4 < max(errors(grads, expected)) < 0.5
  for grad, other in zip(grads, expected, strict=True):
    norms = np.linalg.norm(grad) * np.linalg.norm(other)
    assert np.vdot(grad, other) / norms > 0.95


def test_anderson_finds_the_same_point_and_helps_where_iteration_is_slow():
  _, injected, _ = weights(*FEATURE)
  # Almost linear and at its bound in all directions: the worst there is.
  kernel = 9 * np.eye(64, dtype=np.float32)[None, None]

  @jax.jit
  def solve(kernel, injected):
    operands = (contract(kernel, 0.9), 0.1 * injected)

    def point(**options):
      z = fp.fixed_point(cell, operands, jnp.zeros_like(injected), **options)
      return z, fp.residual(cell, operands, z)

    slow, fast = point(iterations=25), point(iterations=25, solver="anderson")
    return point(iterations=400), slow, fast

  (exact, _), (_, far), (fast, near) = solve(kernel, injected)
  np.testing.assert_allclose(fast, exact, rtol=1e-5, atol=1e-6)
  assert np.all(far > 100 * near)


def test_one_cpu_computes_the_same_gradients_in_its_own_form(monkeypatch):
  arrays, options, forms = weights(*PIXELS), (("iterations", ITERATIONS),), []

  def nhwc(*args):
    forms.append("nhwc")
    return conv_forms.nhwc(*args)

  _, expected = value_and_grads(arrays)
  monkeypatch.setattr(lion, "is_one_cpu", lambda: True)
  monkeypatch.setattr(lion, "conv_forms", types.SimpleNamespace(nhwc=nhwc))
  gradient = jax.jit(jax.grad(functools.partial(loss, options), argnums=(0, 1)))
  found = gradient(*arrays)
  assert forms and max(errors(jax.device_get(found), expected)) < 1e-4


@pytest.mark.parametrize("gradient", fp.GRADIENTS)
def test_gradients_under_vmap_and_remat(gradient):
  trials = [weights(*PIXELS, seed=seed) for seed in range(2)]
  options = {"iterations": ITERATIONS, "gradient": gradient}
  stored = jax.checkpoint(functools.partial(loss, tuple(options.items())))
  grad = jax.jit(jax.vmap(jax.grad(stored, argnums=(0, 1))))
  together = grad(*(np.stack(leaves) for leaves in zip(*trials, strict=True)))
  for i, arrays in enumerate(trials):
    _, alone = value_and_grads(arrays, **options)
    for leaf, other in zip(together, alone, strict=True):
      np.testing.assert_allclose(leaf[i], other, rtol=1e-4, atol=1e-5)


@jax.jit
def bound_and_jacobian(kernel, units):
  """Returns the bound, and a step's Jacobian by the state, applied to the units."""
  operands = (contract(kernel, 0.9), jnp.zeros(1))
  columns = jax.jvp(lambda z: cell(operands, z), (0 * units,), (units,))[1]
  return fp.spectral_bound(kernel), columns


@given(
  sizes=st.sampled_from([(1, 8), (3, 1), (3, 4)]),
  log_scale=st.floats(-6, 6),
  rank_one=st.booleans(),
  seed=st.integers(0, 2**16),
)
def test_a_step_is_a_contraction_whatever_the_weights(sizes, log_scale, rank_one, seed):
  taps, width = sizes
  rng = np.random.default_rng(seed)
  shape = (taps, taps, width, 1 if rank_one else width)
  kernel = (10**log_scale * rng.standard_normal(shape)).astype(np.float32)
  kernel = np.broadcast_to(kernel, (taps, taps, width, width))
  # The matrix of the whole linear map, by its action on unit vectors: exact.
  size = 4 if taps > 1 else 1
  units = np.eye(size**2 * width, dtype=np.float32).reshape(-1, size, size, width)
  bound, columns = bound_and_jacobian(kernel, units)
  norms = np.linalg.norm(kernel.astype(np.float64), 2, axis=(2, 3))
  # Never below the norm, nor far above it.
  assert np.all(bound >= norms * (1 - 1e-5))
  assert np.all(bound <= norms * width ** (1 / 64) * (1 + 1e-5) + 1e-5)
  assert np.linalg.norm(np.asarray(columns).reshape(len(units), -1), 2) < 0.9 + 1e-4


def test_the_gradient_of_a_zero_kernel_is_finite():
  kernel, injected, direction = weights(*PIXELS)
  _, grads = value_and_grads((0 * kernel, injected, direction))
  assert all(np.all(np.isfinite(grad)) for grad in grads)


def test_starts_as_the_identity_bit_for_bit():
  # Behind the plain backbone the same head.
  params = {part: start()[part] for part in ("backbone", "head")}
  expected = compiled("linear")(params, digits())
  np.testing.assert_array_equal(compiled()(start(), digits()), expected)
  prompts = compiled(method="prompts")
  assert not np.any(prompts(start(), digits())["image"])
  changed = prompts(moved(), digits())["image"]
  assert changed.shape == digits().shape and np.all(np.std(changed, axis=(1, 2)) > 0)


def test_the_residuals_of_both_layers_are_read_and_small():
  for params in (start(), moved()):
    logits, found = compiled(mutable="measures")(params, digits())
    for layer in ("pixels", "feature"):
      residual = found["measures"]["prompter"][layer]["residual"]
      assert residual.shape == (6,) and 0 < np.max(residual) < 1e-4
  # It is not there where nobody asks, and changes nothing.
  plain = compiled()(moved(), digits())
  np.testing.assert_allclose(plain, logits, rtol=1e-6, atol=1e-6)
  _, found = compiled(mutable="measures", iterations=2)(moved(), digits())
  assert np.min(found["measures"]["prompter"]["pixels"]["residual"]) > 1e-4


def test_a_training_logs_residuals_and_iterations(tmp_path):
  """Shapes alone: a train step, a call of many; and what is logged of one."""
  config = tiny_config("lion", lion__iterations=5)
  program = prepare(config).program
  layers = [f"prompter/{layer}" for layer in ("pixels", "feature")]
  names = {f"{layer}/{kind}" for layer in layers for kind in ("residual", "iterations")}
  state = program_lib.abstract_state(config, program)
  batch = batches.abstract_batch(config, program, 8, train=True)
  _, found = jax.eval_shape(program.functions.train, state, batch)
  assert names == set(found) - {*METRICS, "step"}
  assert all(found[name].shape == () for name in names)
  many = create_multi_step(
    program.functions,
    program.carried,
    batch_size=8,
    sharding=program.state_sharding.step,
  )
  arrays = {name: np.zeros(x.shape, x.dtype) for name, x in batch.items()}
  assert set(jax.eval_shape(many, state, arrays, np.uint32(0), 3)[1]) == set(found)

  numbers = {name: np.float32(i) for i, name in enumerate(sorted(found))}
  with Writers(tmp_path, total_steps=2, tensorboard=False) as writers:
    trainer._log(config, program, numbers, {}, writers, Timer(), 1)
  (row,) = metrics(tmp_path)
  assert {name: row[name] for name in names} == {name: numbers[name] for name in names}


@pytest.mark.parametrize("solver", fp.SOLVERS)
def test_an_order_of_images_changes_nothing(solver):
  apply = compiled(**({} if solver == "iteration" else {"solver": solver}))
  logits = np.asarray(apply(moved(), digits()))
  order = np.array([3, 0, 5, 1, 4, 2])
  permuted = apply(moved(), digits()[order])
  np.testing.assert_array_equal(permuted, logits[order])
  # Nor do the others, however far they are from their fixed points.
  others = np.concatenate([digits()[:2], 100 * digits()[2:]])
  np.testing.assert_array_equal(apply(moved(), others)[:2], logits[:2])


def flat_updates(seed=0):
  """Returns (updates, params, grads) by whole name, as a train step has them."""
  rng = np.random.default_rng(seed)
  params = trees.flatten({"prompter": moved()["prompter"], "head": start()["head"]})

  def draw():
    return {
      n: rng.standard_normal(p.shape).astype(np.float32) for n, p in params.items()
    }

  return draw(), draw(), params


@functools.partial(jax.jit, static_argnums=0)
def adjust(methods, updates, params, grads, lr):
  """Returns what the train step of each of some methods adds."""
  return [
    method.adjust_updates(updates, params=params, grads=grads, lr=lr)
    for method in methods
  ]


def test_critical_entries_step_and_the_others_shrink():
  updates, grads, params = flat_updates()
  method = create_method("lion", SPEC, critical=0.25, shrinkage=0.5)
  (adjusted,) = adjust((method,), updates, params, grads, np.float32(0.1))
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


def test_all_or_none_are_critical():
  updates, grads, params = flat_updates()
  methods = tuple(
    create_method("lion", SPEC, critical=critical, shrinkage=0) for critical in (0, 1)
  )
  none, everything = adjust(methods, updates, params, grads, 0.1)
  for name, update in updates.items():
    np.testing.assert_array_equal(everything[name], update)
    expected = 0 * update if name.endswith("_kernel") else update
    np.testing.assert_array_equal(none[name], expected)


def test_what_starts_at_zero_leaves_it():
  """At first all scores are zero: V is, and so is the gradient of W and U."""
  updates, grads, _ = flat_updates()
  params = trees.flatten({"prompter": start()["prompter"], "head": start()["head"]})
  grads = {
    name: grad if name.endswith("output_kernel") else 0 * grad
    for name, grad in grads.items()
  }
  method = create_method("lion", SPEC)
  (adjusted,) = adjust((method,), updates, params, grads, 0.1)
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
  assert unpruned.surviving(pruned) == counts
  kept, total = np.sum(list(counts.values()), axis=0)
  assert len(counts) == 6 and 0 < kept < total

  def logits(below, prompter, **kwargs):
    apply = compiled(prune_below=below, **kwargs)
    return apply({**params, "prompter": prompter}, digits())

  whole = params["prompter"]
  evaluated = logits(below, whole)
  np.testing.assert_array_equal(evaluated, logits(0.0, pruned))
  trained = logits(below, whole, train=True)
  np.testing.assert_array_equal(trained, logits(0.0, whole))
  assert not np.allclose(evaluated, trained)


@pytest.mark.parametrize("layer", ["pixels", "feature"])
def test_one_of_the_layers_alone(layer):
  alone = model(layers=(layer,))
  shapes = jax.eval_shape(alone.init, jax.random.key(0), digits())
  assert set(shapes["params"]["prompter"]) == {layer}
  prompts = functools.partial(alone.apply, method="prompts")
  images = jax.eval_shape(prompts, shapes, digits())
  assert set(images) == ({"image"} if layer == "pixels" else set())
  updates, grads, flat = flat_updates()

  def keep(tree):
    return {name: leaf for name, leaf in tree.items() if f"prompter/{layer}" in name}

  method = create_method("lion", SPEC, layers=(layer,))
  arrays = map(keep, (updates, flat, grads))
  adjusted = jax.eval_shape(functools.partial(adjust, (method,)), *arrays, 0.1)
  assert set(adjusted[0]) == set(keep(flat))


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

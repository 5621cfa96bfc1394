"""Fixed points z = f(operands, z) of contractions, and gradients through them.

Source: Bai et al. 2019, "Deep Equilibrium Models"; Anderson's acceleration as in Walker
and Ni 2011; phantom gradients: Geng et al. 2021, "On Training Implicit Models".

The number of iterations is fixed. A tolerance would have to be met by a whole batch,
and so what becomes of an image would depend on those beside it, on how a batch is split
over devices, and on the other trials of a population.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# `(operands, state) -> state`; examples are the first axis of the state.
Function = Callable[[Any, Array], Array]
GRADIENTS = ("implicit", "phantom", "unrolled")
# Steps of the phantom gradient and their size, as published.
_PHANTOM_STEPS, _PHANTOM_SIZE = 5, 0.5
# States that Anderson's acceleration combines, and its relative ridge.
_MEMORY, _RIDGE = 5, 1e-5
_TINY = 1e-12


def spectral_bound(
  matrices: Float[Array, "*n d d"], squarings: int = 5
) -> Float[Array, "*n"]:
  """Returns an upper bound of the spectral norm of each matrix.

  It is the Schatten norm of order 2^(squarings + 1), at most d^(1 / that order) times
  the spectral norm: 7% above it for 64 x 64. Unlike a power iteration it is never
  below, and unlike a singular value decomposition it is made of products alone.
  """
  product = functools.partial(jnp.matmul, precision="highest")
  power = product(jnp.swapaxes(matrices, -1, -2), matrices)
  log_bound = jnp.zeros(power.shape[:-2])
  for i in range(squarings + 1):
    power = product(power, power) if i else power
    # Powers are divided by their traces, or they would vanish.
    trace = jnp.trace(power, axis1=-2, axis2=-1) + _TINY
    power /= trace[..., None, None]
    log_bound += jnp.log(trace) / 2**i
  return jnp.exp(log_bound / 2)


def iterate(step: Callable[[Array], Array], start: Array, iterations: int) -> Array:
  """Returns the state after so many steps."""
  return jax.lax.scan(lambda z, _: (step(z), None), start, length=iterations)[0]


def anderson(step: Callable[[Array], Array], start: Array, iterations: int) -> Array:
  """Returns the state after so many steps, each from a combination of the last ones.

  Every example has its own weights of the combination. It keeps ten times the state.
  """
  history = jnp.zeros((_MEMORY, len(start), start[0].size))

  def body(carry, i):
    z, values, residuals = carry
    value = step(z).reshape(history.shape[1:])
    values = values.at[i % _MEMORY].set(value)
    residuals = residuals.at[i % _MEMORY].set(value - z.reshape(value.shape))
    gram = jnp.einsum("mbn,kbn->bmk", residuals, residuals, precision="highest")
    gram /= jnp.trace(gram, axis1=1, axis2=2)[:, None, None] + _TINY**2
    # Rows that are not there yet are zero: with the ridge their weight is 0.
    there = jnp.broadcast_to(jnp.arange(_MEMORY) <= i, gram.shape[:2])
    weights = jnp.linalg.solve(
      gram + _RIDGE * jnp.eye(_MEMORY), there[..., None].astype(gram.dtype)
    )
    weights /= jnp.sum(weights, axis=1, keepdims=True)
    combined = jnp.einsum("bmo,mbn->bn", weights, values, precision="highest")
    return (combined.reshape(start.shape), values, residuals), None

  # The last step is a plain one: what comes out is a value of f.
  carry = (start, history, history)
  (z, _, _), _ = jax.lax.scan(body, carry, jnp.arange(iterations - 1))
  return step(z)


SOLVERS = {"iteration": iterate, "anderson": anderson}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def _implicit(
  f: Function, operands: Any, start: Array, solver: str, iterations: int
) -> Array:
  return SOLVERS[solver](lambda z: f(operands, z), start, iterations)


def _implicit_forward(f, operands, start, solver, iterations):
  fixed = _implicit(f, operands, start, solver, iterations)
  return fixed, (operands, fixed)


def _implicit_backward(f, solver, iterations, saved, gradient):
  """Solves u = gradient + J^T u, J of f by the state, the way the state was solved."""
  operands, fixed = saved
  # Two functions: in the loop no gradient of operands is computed.
  _, to_state = jax.vjp(lambda z: f(operands, z), fixed)
  _, to_operands = jax.vjp(lambda o: f(o, fixed), operands)
  solved = SOLVERS[solver](lambda u: gradient + to_state(u)[0], gradient, iterations)
  return to_operands(solved)[0], jnp.zeros_like(fixed)


_implicit.defvjp(_implicit_forward, _implicit_backward)


def fixed_point(
  f: Function,
  operands: Any,
  start: Float[Array, "b ..."],
  *,
  iterations: int,
  solver: str = "iteration",
  gradient: str = "implicit",
) -> Float[Array, "b ..."]:
  """Returns the state z with z = f(operands, z).

  Args:
    f: a contraction of the state, a function that closes over no array.
    operands: a tree of arrays, with respect to which gradients are taken.
    start: the first state.
    iterations: how often f is evaluated, and its Jacobian in the backward pass.
    solver: a key of `SOLVERS`.
    gradient: "implicit" (exact at the fixed point, which is all that is kept),
      "phantom" (through 5 damped steps from the fixed point) or "unrolled" (through
      all iterations, all of which are kept).
  """
  if gradient == "implicit":
    return _implicit(f, operands, start, solver, iterations)
  if gradient == "unrolled":
    return SOLVERS[solver](lambda z: f(operands, z), start, iterations)
  fixed = _implicit(f, jax.lax.stop_gradient(operands), start, solver, iterations)

  def damped(z: Array) -> Array:
    return z + _PHANTOM_SIZE * (f(operands, z) - z)

  return iterate(damped, jax.lax.stop_gradient(fixed), _PHANTOM_STEPS)


def residual(f: Function, operands: Any, z: Float[Array, "b ..."]) -> Float[Array, "b"]:
  """Returns |f(z) - z| / |f(z)| of each example: how far z is from a fixed point."""
  value = f(operands, z)

  def norm(x: Array) -> Array:
    return jnp.linalg.norm(x.reshape(len(x), -1), axis=1)

  return norm(value - z) / (norm(value) + _TINY)

"""Several steps in one call, where the training examples live on the devices.

One compiled program serves any number of steps, which is data: how a run is divided
into calls never changes a bit of its result.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from insvp_jax import trees
from insvp_jax.train.steps import METRICS, Metrics, TrainState


def create_train_call(
  train_step: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
  mask: Mapping[str, Any],
  *,
  order: Callable[..., Any],
  gather: Callable[..., Any],
  batch_size: int,
  sharding: jax.sharding.Sharding,
) -> Callable[..., tuple[TrainState, Metrics, Any]]:
  """Returns `train_call(state, arrays, seed, count) -> (state, metrics, at)`.

  `arrays` are of all examples (see `resident.take_batch`), `seed` is of their order,
  and `count`, int32 [] and at least 1, says how many steps are taken.

  Args:
    train_step: takes one step.
    mask: bool tree, True where trainable.
    order: `(seed, epoch, number of examples) -> order`; see `resident.epoch_order`.
    gather: `(arrays, order, seed, step) -> batch`; see `resident.take_batch`.
    batch_size: b.
    sharding: of a batch.

  Returns:
    A pure function. Its metrics are those of step `at` (int32), counted from 1: of the
    first step whose metrics are not all finite, or else of the last one. For stacked
    members both are [m].
  """

  def train_call(state: TrainState, arrays: Mapping, seed: Any, count: Any):
    number = arrays["labels"].shape[0]
    per_epoch = number // batch_size
    # Out of the loop's carry: XLA need not find out that they never change.
    trainable, frozen = trees.split(state.params, mask)

    def body(_, carry):
      state, ordered, metrics, at = carry
      ordered = jax.lax.cond(
        state.step % per_epoch == 0,
        lambda: order(seed, state.step // per_epoch, number),
        lambda: ordered,
      )
      batch = gather(arrays, ordered, seed, state.step)
      batch = jax.lax.with_sharding_constraint(batch, sharding)
      whole = state.replace(params=trees.merge(state.params, frozen))
      whole, found = train_step(whole, batch)
      state = whole.replace(params=trees.split(whole.params, mask)[0])
      fine = jnp.all(jnp.stack([jnp.isfinite(x) for x in metrics.values()]), axis=0)
      metrics = {n: jnp.where(fine, found[n], x) for n, x in metrics.items()}
      return state, ordered, metrics, jnp.where(fine, state.step, at)

    none = jnp.zeros(jnp.shape(state.peak_lr), jnp.float32)
    first = order(seed, state.step // per_epoch, number)
    carry = state.replace(params=trainable), first, dict.fromkeys(METRICS, none)
    carry = *carry, none.astype(jnp.int32)
    state, _, metrics, at = jax.lax.fori_loop(0, count, body, carry)
    state = state.replace(params=trees.merge(state.params, frozen))
    return state, metrics, at

  return train_call


def next_end(
  step: int, limit: int, periods: Sequence[int], marks: Sequence[int]
) -> int:
  """Returns the last step of the call after a step.

  Args:
    step: number of steps taken.
    limit: beyond which it must not go.
    periods: a call ends at their multiples; 0 is never.
    marks: a call ends there, too.
  """
  ends = [(step // every + 1) * every for every in periods if every]
  return min([limit, *ends, *(mark for mark in marks if mark > step)])

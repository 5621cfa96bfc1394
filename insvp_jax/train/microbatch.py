"""How many images are computed at once, and the gradient of a batch in parts.

The activations of a batch of images are many times what a CPU's caches hold, and the
operating system clears their pages at each step. A CPU is faster with few images at a
time, whose memory the next ones use again; benchmarks/README.md has the numbers. On any
device a part needs less memory than the whole, and the step is the same.
"""

from collections.abc import Callable, Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict

from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.methods.base import BackboneSpec
from insvp_jax.models import quantized

# More of them at once are slower on a CPU, and much fewer too.
_PATCHES_AT_ONCE = 1024
# What a backbone of several stages counts as: its first patches are small and cheap.
_STAGED_PATCH_SIZE = 16


def images_at_once(spec: BackboneSpec) -> int:
  """Returns how many images a CPU should compute at once, at least 1.

  Args:
    spec: of the backbone.
  """
  patch_size = spec.patch_size if len(spec.stages) == 1 else _STAGED_PATCH_SIZE
  patches = max(1, spec.image_size // patch_size) ** 2
  return max(1, _PATCHES_AT_ONCE // patches)


def num_parts(
  config: ConfigDict, spec: BackboneSpec, mesh: jax.sharding.Mesh, *, needs_whole: bool
) -> int:
  """Returns in how many parts a train step computes its gradient.

  Args:
    config: the whole configuration: `batch_size` and `microbatch_size`, of which 0 is
      automatic: parts of about `images_at_once` on one CPU, elsewhere the whole batch.
    spec: of the backbone.
    mesh: where batches lie.
    needs_whole: whether a step sets parameters from the whole batch, as BatchNorm does.

  Raises:
    ValueError: the parts would not be equal, or the step needs the whole batch.
  """
  batch_size, size = config.batch_size, config.microbatch_size
  if size == 0:
    is_one_cpu = mesh.size == 1 and mesh_lib.platform(mesh) == "cpu"
    if needs_whole or not is_one_cpu:
      return 1
    return batch_size // _nearest_divisor(batch_size, images_at_once(spec))
  if size >= batch_size:
    return 1
  if needs_whole:
    raise ValueError(
      f"config.microbatch_size is {size}, but here a step sets parameters without a "
      "gradient, such as BatchNorm's, from the whole batch; expected 0."
    )
  if batch_size % size or size % mesh.size:
    devices = f" on {mesh.size} devices" if mesh.size > 1 else ""
    fits = [n for n in _divisors(batch_size)[:-1] if n % mesh.size == 0]
    expected = ", ".join(map(str, ["0 (automatic)", *fits]))
    raise ValueError(
      f"config.microbatch_size is {size}, which does not divide batches of "
      f"{batch_size}{devices} evenly; expected {expected}."
    )
  return batch_size // size


def mean_gradient(gradient: Callable[..., Any], number: int) -> Callable[..., Any]:
  """Returns a function as `gradient`, of a whole batch in equal parts, one by one.

  Args:
    gradient: `(trainable, frozen, batch, key) -> ((loss, (accuracy, measures,
      updated)), grads)`, of means over a batch, and of the largest `measures`.
      `updated` is empty.
    number: of parts. Each has a key of its own.
  """

  def split(x: Array) -> Array:
    # Each device has rows of all parts.
    return jnp.swapaxes(x.reshape(-1, number, *x.shape[1:]), 0, 1)

  def mean(
    trainable: Mapping[str, Array], frozen: Mapping[str, Any], batch: Any, key: Array
  ) -> Any:
    def add(total: Any, part: Any) -> tuple[Any, Any]:
      batch, index = part
      held, index = quantized.hold(frozen, index)
      part_key = jax.random.fold_in(key, index)
      (loss, (accuracy, measures, _)), grads = gradient(
        trainable, held, batch, part_key
      )
      return jax.tree.map(jnp.add, total, grads), (loss, accuracy, measures)

    zeros = jax.tree.map(jnp.zeros_like, trainable)
    parts = jax.tree.map(split, batch)
    total, found = jax.lax.scan(add, zeros, (parts, jnp.arange(number)))
    losses, accuracies, measures = found
    largest = jax.tree.map(lambda x: jnp.max(x, axis=0), measures)
    grads = jax.tree.map(lambda x: x / number, total)
    return (jnp.mean(losses), (jnp.mean(accuracies), largest, {})), grads

  return mean


def _divisors(number: int) -> list[int]:
  return [n for n in range(1, number + 1) if number % n == 0]


def _nearest_divisor(number: int, wanted: int) -> int:
  """Returns the divisor of a number whose ratio to another number is nearest to 1."""
  return min(_divisors(number), key=lambda n: abs(math.log(n / wanted)))

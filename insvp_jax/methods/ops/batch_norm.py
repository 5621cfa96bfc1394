"""Batch normalisation whose running statistics are parameters without a gradient."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

EPS = 1e-5
_MOMENTUM = 0.9


class BatchNorm(nn.Module):
  """Normalises each channel over all other axes; PyTorch's `BatchNorm1d` and `2d`.

  Under `jit` these axes are those of the whole batch, on however many devices it lies:
  the statistics are what PyTorch calls synchronised.

  "mean" and "var" are parameters that do not train, so that they are stored, loaded and
  stacked like all others. In training the new values are sown in the collection
  "updated" under the same names (see `Method.updated_patterns`).

  Source: Ioffe and Szegedy 2015, "Batch Normalization", algorithms 1 and 2.
  """

  @nn.compact
  def __call__(self, x: Float[Array, "*b d"], *, train: bool) -> Float[Array, "*b d"]:
    """Returns x normalised by its own statistics in training, else by the running."""
    shape = (x.shape[-1],)
    scale = self.param("scale", nn.initializers.ones, shape)
    bias = self.param("bias", nn.initializers.zeros, shape)
    running = {
      "mean": self.param("mean", nn.initializers.zeros, shape),
      "var": self.param("var", nn.initializers.ones, shape),
    }
    used = running
    if train:
      axes = tuple(range(x.ndim - 1))
      used = {"mean": jnp.mean(x, axis=axes), "var": jnp.var(x, axis=axes)}
      # The running variance is that of a population: unbiased.
      count = x.size // x.shape[-1]
      unbiased = count / max(count - 1, 1)
      new = {"mean": used["mean"], "var": used["var"] * unbiased}
      for name, value in new.items():
        value = _MOMENTUM * running[name] + (1 - _MOMENTUM) * value
        value = jax.lax.stop_gradient(value)
        self.sow("updated", name, value, reduce_fn=lambda _, x: x, init_fn=lambda: None)
    return (x - used["mean"]) * jax.lax.rsqrt(used["var"] + EPS) * scale + bias

"""LION: an equilibrium layer before the frozen backbone and one behind it.

Source: Wang et al. 2024, "LION: Implicit Vision Prompt Tuning" (AAAI), its abstract and
what readers wrote about it. From there are: two implicit (deep equilibrium) layers, one
in front of the input, whose prompt joins the image, one behind the output, whose prompt
joins the feature; training that splits parameters at a threshold into critical ones,
updated as usual, and others, driven to zero; pruning.

Neither code nor the layers' equations, widths, solver, gradient, threshold or learning
rates could be read. All of these are a design of this package; its accuracy is not the
paper's:

- z = tanh(W z + U x + b), x <- x + V z + c; W, U are 3 x 3 convolutions on the pixels
  and matrices on the feature. V, c start at zero: the layer is the identity. The second
  layer reads the feature; by one reader's notes it reads the image, too.
- W is scaled to a spectral norm of at most gamma < 1 (`contraction`); of a convolution
  to a sum of its taps' norms. So the fixed point is unique and iterations converge.
- A fixed number of iterations in float32; the implicit gradient; see `ops.fixed_point`.
- Critical (`critical`, a share) are the kernels' entries with the largest
  |weight x gradient|, of both layers together, as in CDR (Xia et al. 2021). The others
  take no step but shrink by lr * `shrinkage`, to zero and not beyond.
- Evaluation takes entries of kernels below `prune_below` for zero, after every epoch;
  `LION.surviving` counts the others. What is trained and stored is not pruned.

Parameters: 9 k^2 + 31 k + 3 on the pixels (k `channels`), r^2 + 2 d r + r + d on the
feature (r `hidden`), d the width. ViT-B/16: 827 + 103,232.

How well the equations are solved, for each image of a batch:

    _, found = model.apply({"params": params}, images, mutable=["measures"])
    found["measures"]["prompter"]["pixels"]["residual"]  # and "feature": [b]

In training the largest residual of each layer in a batch and the iterations are logged.
"""

from collections.abc import Mapping, Sequence
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from insvp_jax import trees
from insvp_jax.methods import checks
from insvp_jax.methods.base import BackboneSpec, Method, sow_measure
from insvp_jax.methods.fields import field
from insvp_jax.methods.ops import conv_forms
from insvp_jax.methods.ops import fixed_point as fp
from insvp_jax.methods.ops.conv import is_one_cpu
from insvp_jax.methods.ops.initializers import torch_uniform

LAYERS = ("pixels", "feature")
_KERNELS = rf"prompter/({'|'.join(LAYERS)})/.*_kernel"


def _product(x: Array, kernel: Array) -> Array:
  """Returns a convolution with zero padding, in full float32."""
  if len(kernel) == 1:
    return jnp.matmul(x, kernel[0, 0], precision="highest")
  # A fixed point is a loop, and so are several train steps in one call.
  convolve = conv_forms.nhwc if is_one_cpu() else conv_forms.plain
  return convolve(x, kernel, 1, "highest")


def cell(operands: tuple[Array, Array], z: Array) -> Array:
  """Returns the next state tanh(W z + x): `fixed_point.Function`."""
  kernel, injected = operands
  return jnp.tanh(_product(z, kernel) + injected)


def contract(kernel: Float[Array, "s s k k"], bound: float) -> Float[Array, "s s k k"]:
  """Returns the kernel, scaled where its norm may exceed the bound.

  A shift with zero padding lengthens nothing, so the norm of a convolution is at most
  the sum of its taps' norms.
  """
  norm = jnp.sum(fp.spectral_bound(kernel))
  return kernel * (bound / jnp.maximum(norm, bound))


class Equilibrium(nn.Module):
  """One layer: what is added to x [b, h, w, c]; a feature is an image of one pixel.

  Attributes:
    inputs: c.
    width: of the state, k or r.
    taps: pixels per side of the kernels.
    contraction: gamma.
    prune_below: in evaluation kernel entries below it are zero.
    options: of `fixed_point.fixed_point`.
  """

  inputs: int
  width: int
  taps: int
  contraction: float
  prune_below: float
  options: Mapping[str, Any]

  def setup(self) -> None:
    """Creates W [s, s, k, k], U [s, s, c, k], b, V [1, 1, k, c] and c."""
    area = (self.taps, self.taps)
    init, zeros = torch_uniform, nn.initializers.zeros
    fan_in, state = self.taps**2 * self.inputs, self.taps**2 * self.width
    self.state_kernel = self.param(
      "state_kernel", init(state), (*area, self.width, self.width)
    )
    self.input_kernel = self.param(
      "input_kernel", init(fan_in), (*area, self.inputs, self.width)
    )
    self.bias = self.param("bias", init(fan_in), (self.width,))
    self.output_kernel = self.param(
      "output_kernel", zeros, (1, 1, self.width, self.inputs)
    )
    self.output_bias = self.param("output_bias", zeros, (self.inputs,))

  def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Array:
    """Returns V z + c, float32."""
    kernels = (self.state_kernel, self.input_kernel, self.output_kernel)
    if not train:
      kernels = (prune(kernel, self.prune_below) for kernel in kernels)
    state, inject, output = kernels
    injected = _product(x.astype(jnp.float32), inject) + self.bias
    operands = (contract(state, self.contraction), injected)
    z = fp.fixed_point(cell, operands, jnp.zeros_like(injected), **self.options)
    if self.is_mutable_collection("measures") and not self.is_initializing():
      residual = fp.residual(cell, *jax.lax.stop_gradient((operands, z)))
      sow_measure(self, "residual", residual)
      sow_measure(self, "iterations", jnp.float32(self.options["iterations"]))
    return _product(z, output) + self.output_bias


def prune(kernel: Array, below: float) -> Array:
  """Returns the kernel with its entries below a size as zeros."""
  return jnp.where(jnp.abs(kernel) < below, 0.0, kernel)


class LION(Method):
  """Trains a layer on the pixels, one on the feature, and the head."""

  layers: Sequence[str] = field(
    LAYERS, "which of the two layers there are", check=checks.some_of(*LAYERS)
  )
  channels: int = field(
    8, "channels k of the state on the pixels", check=checks.positive_int
  )
  hidden: int = field(
    64, "width r of the state on the feature", check=checks.positive_int
  )
  contraction: float | int = field(
    0.9, "bound gamma of the norm of W", check=checks.below_one
  )
  iterations: int = field(
    16, "iterations, forward and backward", check=checks.positive_int
  )
  solver: str = field(
    "iteration", "iteration or anderson", check=checks.one_of(*fp.SOLVERS)
  )
  gradient: str = field(
    "implicit", "implicit, phantom or unrolled", check=checks.one_of(*fp.GRADIENTS)
  )
  critical: float | int = field(
    0.7, "share of kernel entries that take a normal update", check=checks.share
  )
  shrinkage: float | int = field(
    5e-4, "the others shrink by lr times this", check=checks.not_negative
  )
  prune_below: float | int = field(
    1e-4,
    "in evaluation kernel entries below this are zero",
    check=checks.not_negative,
  )

  @classmethod
  def resolve(cls, spec: BackboneSpec, values):
    resolved = super().resolve(spec, values)
    if resolved["gradient"] == "unrolled" and resolved["solver"] == "anderson":
      raise ValueError(
        "gradient is 'unrolled' and solver 'anderson', whose combinations of states "
        "are not meant to be differentiated; set solver=iteration or gradient=implicit."
      )
    return resolved

  def setup(self) -> None:
    """Creates the layers."""
    options = {key: getattr(self, key) for key in ("iterations", "solver", "gradient")}
    shared = (self.contraction, self.prune_below, options)
    if "pixels" in self.layers:
      self.pixels = Equilibrium(3, self.channels, 3, *shared)
    if "feature" in self.layers:
      self.feature = Equilibrium(self.spec.width, self.hidden, 1, *shared)

  def prompt_image(self, images, *, train=False):
    if "pixels" not in self.layers:
      return images
    return images + self.pixels(images, train=train).astype(images.dtype)

  def adapt_feature(self, feature, images, *, train=False):
    del images
    if "feature" not in self.layers:
      return feature
    prompt = self.feature(feature[:, None, None], train=train)
    return feature + prompt[:, 0, 0].astype(feature.dtype)

  def prompts(self, images: Float[Array, "b h w c"]) -> dict[str, Array]:
    """Returns {"image": what is added to the normalised images, [b, h, w, 3]}."""
    if "pixels" not in self.layers:
      return {}
    return {"image": self.pixels(images, train=False)}

  @nn.nowrap
  def measures(self) -> tuple[str, ...]:
    kinds = ("residual", "iterations")
    return tuple(f"prompter/{layer}/{kind}" for layer in self.layers for kind in kinds)

  @nn.nowrap
  def adjust_updates(self, updates, *, params, grads, lr):
    """Lets the critical entries of the kernels step and the others shrink."""
    names = [name for name in updates if re.fullmatch(_KERNELS, name)]
    scores = {name: jnp.abs(params[name] * grads[name]) for name in names}
    ordered = jnp.sort(jnp.concatenate([score.ravel() for score in scores.values()]))
    first = round((1 - self.critical) * len(ordered))
    # Equals are critical: at first all scores are 0, as V and W's gradients are.
    threshold = ordered[first] if first < len(ordered) else jnp.inf
    adjusted = dict(updates)
    for name, score in scores.items():
      size = jnp.abs(params[name])
      shrunk = -jnp.sign(params[name]) * jnp.minimum(lr * self.shrinkage, size)
      adjusted[name] = jnp.where(score >= threshold, updates[name], shrunk)
    return adjusted

  @nn.nowrap
  def surviving(self, params: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Returns {kernel: (how many of its entries evaluation keeps, of how many)}.

    Args:
      params: the method's own: `run.params["prompter"]`.
    """
    sizes = {
      name: np.abs(leaf)
      for name, leaf in trees.flatten(params).items()
      if name.endswith("_kernel")
    }
    return {
      name: (int(np.sum((size > 0) & (size >= self.prune_below))), size.size)
      for name, size in sizes.items()
    }

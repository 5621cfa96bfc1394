"""Initialisations of prompts and prompters, as the published code draws them."""

import math

import jax
import jax.numpy as jnp

Initializer = jax.nn.initializers.Initializer


def symmetric_uniform(bound: float) -> Initializer:
  """Returns U(-bound, bound)."""

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def torch_uniform(fan_in: int) -> Initializer:
  """Returns PyTorch's default for kernels and biases: U(+-1 / sqrt(fan_in))."""
  return symmetric_uniform(1 / math.sqrt(fan_in))


def vpt_bound(patch_size: int, prompt_width: int) -> float:
  """Returns the bound of VPT's uniform distribution: Xavier over patch and prompt.

  Source: Jia et al. 2022, "Visual Prompt Tuning", published code:
  sqrt(6 / (3 * patch_size^2 + prompt_width)); 0.0625 for ViT-B/16.
  """
  return math.sqrt(6 / (3 * patch_size**2 + prompt_width))


def vpt_uniform(patch_size: int, prompt_width: int) -> Initializer:
  """Returns VPT's distribution of prompts: uniform within `vpt_bound`."""
  return symmetric_uniform(vpt_bound(patch_size, prompt_width))

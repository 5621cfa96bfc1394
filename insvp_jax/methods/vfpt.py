"""VFPT: deep prompts, some of them seen through a Fourier transform.

Source: Zeng et al. 2024, "Visual Fourier Prompt Tuning", eq. 3 to 5; published code for
the order of dropout and transform.

The first f = floor(alpha p) prompts of each block, after dropout, become the real part
of their unnormalised 2-D discrete Fourier transform, over these f tokens and their
channels, or over one of the two axes. So they are linear in the parameters, and up to
f d times as large. The transform is computed in float32 at least.

Parameters: as VPT, l p d.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from insvp_jax.methods import checks
from insvp_jax.methods.base import Method
from insvp_jax.methods.fields import field
from insvp_jax.methods.hooks import Adaptation, BlockPrompts
from insvp_jax.methods.ops.dropout import Dropout, drop_per_sample
from insvp_jax.methods.ops.initializers import vpt_uniform

# The axes of [..., p, d] that are transformed.
_AXES = {"all": (-2, -1), "hidden": (-1,), "sequence": (-2,)}


def real_fourier(
  tokens: Float[Array, "... p d"], num_rows: int, dimension: str
) -> Float[Array, "... p d"]:
  """Returns the tokens with the first rows transformed, jointly."""
  if not num_rows:
    return tokens
  first = jnp.fft.fftn(tokens[..., :num_rows, :], axes=_AXES[dimension]).real
  return jnp.concatenate([first, tokens[..., num_rows:, :]], axis=-2)


class VFPT(Method):
  """VPT with Fourier prompts."""

  prompt_length: int = field(50, "prompt tokens p per block", check=checks.positive_int)
  fourier_fraction: float | int = field(
    0.5, "share alpha of the prompts that are transformed", check=checks.share
  )
  dimension: str = field(
    "all",
    "what is transformed over: all, hidden (channels) or sequence (prompts)",
    check=checks.one_of(*_AXES),
  )
  deep: bool = field(
    True,
    "fresh prompts for each block, not one set that is carried along",
    check=checks.boolean,
  )
  dropout: float | int = field(
    0.1, "rate on the prompts, drawn for each image", check=checks.rate, hparam=True
  )

  @nn.nowrap
  def claims(self) -> frozenset[str]:
    return super().claims() | {"prompts"}

  def setup(self) -> None:
    """Creates the prompts [l, p, d], as VPT's."""
    spec = self.spec
    init = vpt_uniform(spec.patch_size, spec.width)
    shape = (spec.depth if self.deep else 1, self.prompt_length, spec.width)
    self.common_prompt = self.param("common_prompt", init, shape)
    self.prompt_dropout = Dropout(self.hparam("dropout"))

  def adapt(self, images, prompted, *, embed=None, train=False) -> Adaptation:
    del prompted, embed
    tokens = drop_per_sample(
      self.prompt_dropout, self.common_prompt[:, None], images.shape[0], train=train
    )
    num_rows = int(self.fourier_fraction * self.prompt_length)
    return Adaptation(
      prompts=BlockPrompts(real_fourier(tokens, num_rows, self.dimension))
    )

  def prompts(self, images: Float[Array, "b h w c"]) -> dict[str, Array]:
    """Returns {"feature": [l, b, p, d]}, the same prompts for every image."""
    tokens = self.adapt(images, images).prompts.tokens
    return {"feature": jnp.repeat(tokens, len(images), axis=1)}

"""Gated prompts: VPT-Shallow, with a gate after each block and a temperature in each.

Source: Yoo et al. 2023, "Improving Visual Prompt Tuning for Self-supervised Vision
Transformers", eq. 3 to 6, and its published code.

The prompts that enter block i + 1 are g p_out + (1 - g) p_in, g = sigmoid(gate_i), of
what left and entered block i; block i divides its attention's logits by temperature_i.
Parameters: p d + (l - 1) + l, l the blocks.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from insvp_jax.methods import checks
from insvp_jax.methods.base import BackboneSpec, Method
from insvp_jax.methods.fields import field
from insvp_jax.methods.hooks import Adaptation, BlockPrompts, Hooks
from insvp_jax.methods.ops.dropout import Dropout, drop_per_sample
from insvp_jax.methods.ops.initializers import vpt_uniform

_TEMPERATURE = "prompter/temperature"


@dataclasses.dataclass(frozen=True)
class GatedHooks(Hooks):
  """Applies temperatures and gates.

  Attributes:
    num_prompts: p; rows after these are prompts of another method.
    num_prefix: of the backbone.
    mean: whether the feature is the norm of the mean of patches and prompts.
  """

  num_prompts: int = 0
  num_prefix: int = 1
  mean: bool = False

  def overrides(self, name: str) -> bool:
    return self.mean if name == "pool" else super().overrides(name)

  def qkv(self, p, q, k, v):
    return q / p.block["temperature"], k, v

  def leave(self, p, x, prompts, before):
    gate, num = p.block["gate"], self.num_prompts
    entered = before[1][:, :num].astype(prompts.dtype)
    own = gate * prompts[:, :num] + (1 - gate) * entered
    return x, jnp.concatenate([own, prompts[:, num:]], axis=1), None

  def pool(self, p, norm, tokens, prompts):
    rows = jnp.concatenate([tokens[:, self.num_prefix :], prompts], axis=1)
    return norm(jnp.mean(rows, axis=1))


class Gated(Method):
  """Prompts that are carried from block to block, each block changing them a little."""

  prompt_length: int = field(100, "prompt tokens p", check=checks.positive_int)
  gate_init: float | int = field(
    5.0, "gates start at sigmoid(-gate_init)", check=checks.finite_number
  )
  temperature_min: float | int = field(
    0.01, "least temperature", check=checks.finite_number
  )
  temperature_max: float | int = field(
    10.0, "largest temperature", check=checks.finite_number
  )
  pool: str = field(
    "cls",
    "what the head reads: cls (the backbone's own, its class token; as on MoCo v3) or "
    "mean (the norm of the mean of patches and prompts; as on MAE)",
    check=checks.one_of("cls", "mean"),
  )
  dropout: float | int = field(
    0.1, "rate on the prompts, drawn for each sample", check=checks.rate, hparam=True
  )

  @classmethod
  def resolve(cls, spec: BackboneSpec, values):
    resolved = super().resolve(spec, values)
    least, largest = resolved["temperature_min"], resolved["temperature_max"]
    if not 0 < least <= 1 <= largest:
      raise ValueError(
        f"temperature_min is {least} and temperature_max {largest}, expected positive "
        "numbers with 1, where temperatures start, between them."
      )
    return resolved

  @nn.nowrap
  def hooks(self) -> Hooks:
    return GatedHooks(
      pools_prompts=self.pool == "mean",
      num_prompts=self.prompt_length,
      num_prefix=self.spec.num_prefix,
      mean=self.pool == "mean",
    )

  @nn.nowrap
  def claims(self) -> frozenset[str]:
    return super().claims() | {"prompts"}

  def setup(self) -> None:
    """Creates the prompts [1, p, d], gates [l - 1] and temperatures [l]."""
    spec = self.spec
    init = vpt_uniform(spec.patch_size, spec.width)
    shape = (1, self.prompt_length, spec.width)
    self.common_prompt = self.param("common_prompt", init, shape)
    if spec.depth > 1:
      gate_init = nn.initializers.constant(-self.gate_init)
      self.gate = self.param("gate", gate_init, (spec.depth - 1,))
    self.temperature = self.param("temperature", nn.initializers.ones, (spec.depth,))
    self.prompt_dropout = Dropout(self.hparam("dropout"))

  def adapt(self, images, prompted, *, embed=None, train=False) -> Adaptation:
    del prompted, embed
    tokens = self.common_prompt[:, None]  # [1, 1, p, d]
    tokens = drop_per_sample(self.prompt_dropout, tokens, images.shape[0], train=train)
    # The last block has no gate: its prompts leave it as they are.
    gate = jnp.ones(1)
    if self.spec.depth > 1:
      gate = jnp.concatenate([jax.nn.sigmoid(self.gate), gate])
    # The gradient is that at the clipped temperature, as if it had not been clipped.
    temperature = self.temperature
    temperature += jax.lax.stop_gradient(self._clip(temperature) - temperature)
    return Adaptation(
      blocks={"gate": gate, "temperature": temperature}, prompts=BlockPrompts(tokens)
    )

  def prompts(self, images: Float[Array, "b h w c"]) -> dict[str, Array]:
    """Returns {"feature": [1, b, p, d]}, the same prompts for every image."""
    return {"feature": jnp.repeat(self.common_prompt[:, None], len(images), axis=1)}

  @nn.nowrap
  def adjust_updates(self, updates, *, params, grads, lr):
    """Keeps the temperatures within their bounds."""
    del grads, lr
    before = params[_TEMPERATURE]
    after = self._clip(before + updates[_TEMPERATURE])
    return {**updates, _TEMPERATURE: after - before}

  @nn.nowrap
  def _clip(self, temperature: Array) -> Array:
    return jnp.clip(temperature, self.temperature_min, self.temperature_max)

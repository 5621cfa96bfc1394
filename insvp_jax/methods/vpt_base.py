"""What VPT's shallow and deep variant share; see `vpt`."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from insvp_jax.methods import checks
from insvp_jax.methods.base import BackboneSpec, Method
from insvp_jax.methods.fields import field
from insvp_jax.methods.hooks import PROMPTS, Adaptation, BlockPrompts, Hooks
from insvp_jax.methods.ops import patch_tokens, stage_prompts
from insvp_jax.methods.ops.class_means import class_means
from insvp_jax.methods.ops.dropout import Dropout, drop_per_sample
from insvp_jax.methods.ops.initializers import (
  torch_uniform,
  vpt_uniform,
)
from insvp_jax.methods.vpt_pixels import PIXEL_PROMPTS

# Where prompts that are tokens can be.
TOKEN_LOCATIONS = ("prepend", "add", "add-1")
# Where prompts join the sequence.
_JOINING = ("prepend", "prepend-pixel")
# Starts that are tokens of the frozen backbone.
_OF_TOKENS = ("patch_tokens", "class_means")
# What these fields are where the stages of a backbone differ in width.
_BY_STAGE = {
  **{"project": None, "deep_shared": False, "prompted_from": "first", "expand": True},
}


@dataclasses.dataclass(frozen=True)
class VPTHooks(Hooks):
  """Adds prompts to tokens and pools the tokens, as far as asked for.

  Attributes:
    adds: whether prompts are added to the tokens that enter a block.
    rows: the tokens whose mean is the feature; "cls" leaves it to the backbone.
    num_prefix: of the backbone.
  """

  adds: bool = False
  rows: str = "cls"
  num_prefix: int = 1

  def overrides(self, name: str) -> bool:
    used = {"enter": self.adds, "after": bool(self.at), "pool": self.rows != "cls"}
    return used.get(name, False)

  def enter(self, p, x, prompts):
    return x + p.block, prompts

  def after(self, p, name, x, y):
    return y + p.shared.astype(y.dtype)

  def pool(self, p, norm, tokens, prompts):
    patches = tokens[:, self.num_prefix :]
    rows = {"image": (patches,), "prompt": (prompts,), "both": (patches, prompts)}
    return jnp.mean(norm(jnp.concatenate(rows[self.rows], axis=1)), axis=1)


class _ReadClassTokens(Hooks):
  """Reads the class token that leaves each block."""

  def leave(self, p, x, prompts, before):
    return x, prompts, x[:, 0]


class VPT(Method):
  """What the variants share; each has the fields `dropout` and `location` too.

  VPT searches a prompt length of 1, 5, 10, 50, 100 or 200 for each task; the default is
  the middle of it and the paper's example.
  """

  BY_STAGE = True

  prompt_length: int = field(50, "prompt tokens p per block", check=checks.positive_int)
  project: int | None = field(
    None,
    "width of the prompts before a dense layer that all blocks share; None: no layer",
    check=checks.positive_int,
  )
  pool: str = field(
    "cls",
    "what the head reads: cls (the backbone's own, its class token) or the mean of the "
    "rows of the image, of the prompt or of both",
    check=checks.one_of("cls", "image", "prompt", "both"),
  )
  prompt_init: str = field(
    "uniform",
    "how prompt tokens start: uniform; patch_tokens of training images, see "
    "ops.patch_tokens; or class_means of the class tokens of a block, in the order of "
    "the classes and again from the first",
    check=checks.one_of("uniform", *_OF_TOKENS),
  )

  @classmethod
  def resolve(cls, spec: BackboneSpec, values: Mapping[str, Any]) -> dict[str, Any]:
    resolved = super().resolve(spec, values)
    location, pool = resolved["location"], resolved["pool"]
    if location in _JOINING and PROMPTS not in spec.sites:
      raise ValueError(
        f"location is {location!r}, but this backbone has no tokens that prompts could "
        "join; of VPT it takes vpt_shallow with location='pad'."
      )
    for name, value in _BY_STAGE.items() if len(spec.stages) > 1 else ():
      if resolved.get(name, value) != value:
        raise ValueError(
          f"{name} is {resolved[name]!r}, but the stages of this backbone differ in "
          f"width; leave {name} out."
        )
    if resolved["project"] is not None and location in PIXEL_PROMPTS:
      raise ValueError(
        f"project is {resolved['project']}, but prompts with location {location!r} are "
        "pixels, which are not projected; leave project out."
      )
    if pool in ("prompt", "both") and location not in _JOINING:
      raise ValueError(
        f"pool is {pool!r}, but with location {location!r} no prompts are among the "
        "tokens; pool 'cls' or 'image'."
      )
    if (init := resolved["prompt_init"]) in _OF_TOKENS:
      if location != "prepend" or resolved["project"] is not None:
        raise ValueError(
          f"prompt_init is {init!r}, tokens as wide as the backbone's; it needs "
          "location='prepend' and no project."
        )
      patch_tokens.check("prompt_init", init, spec)
      if init == "class_means" and not spec.num_prefix:
        raise ValueError(
          "prompt_init is 'class_means' of class tokens, but the backbone has none; "
          "use 'uniform'."
        )
    return resolved

  @nn.nowrap
  def _blocks(self) -> range:
    """Returns the blocks that have prompts of their own."""
    return range(1)

  @nn.nowrap
  def _num_sets(self) -> int:
    """Returns how many sets of prompts there are for these blocks."""
    return 1

  @nn.nowrap
  def _carry(self) -> bool:
    """Returns whether blocks after these carry the prompts on."""
    return True

  @nn.nowrap
  def hooks(self) -> Hooks:
    return VPTHooks(
      at=("embedding",) if self.location == "below" else (),
      pools_prompts=self.pool in ("prompt", "both"),
      adds=self.location in ("add", "add-1"),
      rows=self.pool,
      num_prefix=self.spec.num_prefix,
    )

  @nn.nowrap
  def claims(self) -> frozenset[str]:
    return super().claims() | ({"prompts"} if self.location in _JOINING else set())

  def setup(self) -> None:
    """Creates the prompts [l, p, d] and, if asked for, their projection."""
    width = self.project or self.spec.stages[0].width
    init = vpt_uniform(self.spec.patch_size, width)
    self.prompt_dropout = Dropout(self.hparam("dropout"))
    if len(self.spec.stages) > 1:
      if self.location == "prepend":
        self.stage_prompts = stage_prompts.create(
          self, init, len(self._blocks()), self.prompt_length
        )
      return
    num_tokens = {
      "add": self.spec.num_prefix + self.spec.num_patches,
      "add-1": 1,
    }.get(self.location, self.prompt_length)
    shape = (self._num_sets(), num_tokens, width)
    self.common_prompt = self.param("common_prompt", init, shape)
    if self.project is not None:
      # Kaiming normal over the fan-out, as published.
      self.projection = nn.Dense(
        self.spec.width,
        kernel_init=nn.initializers.normal(math.sqrt(2 / self.spec.width)),
        bias_init=torch_uniform(width),
      )

  def _tokens(self, num_samples: Any, train: bool) -> list[Array]:
    """Returns the prompts [l, b or 1, p, d] of blocks that have own, by stage."""
    if len(self.spec.stages) > 1:
      return stage_prompts.drop(
        self.prompt_dropout, self.stage_prompts, num_samples, train=train
      )
    tokens = self.common_prompt
    if self.project is not None:
      tokens = self.projection(tokens)
    tokens = jnp.expand_dims(tokens, 1)  # [l, 1, p, d]
    tokens = jnp.broadcast_to(tokens, (len(self._blocks()), *tokens.shape[1:]))
    return [drop_per_sample(self.prompt_dropout, tokens, num_samples, train=train)]

  def adapt(self, images, prompted, *, embed=None, train=False) -> Adaptation:
    """Returns the prompts; their batch axis is 1 unless dropout is on."""
    del prompted, embed
    tokens, blocks = self._tokens(images.shape[0], train), self._blocks()
    if self.location == "prepend" and len(self.spec.stages) > 1:
      return Adaptation(prompts=stage_prompts.join(self.spec, tokens))
    (tokens,) = tokens
    if self.location == "prepend":
      return Adaptation(prompts=BlockPrompts(tokens, blocks.start, self._carry()))
    # Nothing is added in the other blocks.
    others = (blocks.start, self.spec.depth - blocks.stop)
    return Adaptation(blocks=jnp.pad(tokens, (others, (0, 0), (0, 0), (0, 0))))

  def prompts(self, images: Float[Array, "b h w c"]) -> dict[str, Array]:
    """Returns {"feature": [l, b, p, d]}, the same prompts for every image.

    Of several stages "feature_0", "feature_1" and so on.
    """
    tokens = stage_prompts.for_each(images, self._tokens(1, False))
    return stage_prompts.named(self.spec, "feature", tokens)

  @nn.nowrap
  def prepares(self) -> bool:
    return self.prompt_init in _OF_TOKENS

  @nn.nowrap
  def prepare(self, params, batches, apply):
    """Returns the parameters, with tokens of the backbone as prompts.

    Class means are those of the class tokens that enter the prompts' block. Those that
    enter block 0 are all the same, so it takes those that leave it.
    """
    if self.prompt_init == "patch_tokens":
      blocks = self._blocks()[: self._num_sets()]
      return patch_tokens.start_prompts(self.spec, params, batches, apply, blocks)

    def class_tokens(images: Any) -> np.ndarray:
      probe = Adaptation(hooks=_ReadClassTokens())
      _, reads = apply.backbone(params, images, probe)
      return np.stack([np.asarray(read) for read in reads], axis=1)  # [b, l, d]

    means = np.stack(list(class_means(batches(), class_tokens).values()))  # [k, l, d]
    sources = np.maximum(np.asarray(self._blocks()) - 1, 0)[: self._num_sets()]
    classes = np.arange(self.prompt_length) % len(means)
    prompts = means[classes][:, sources].swapaxes(0, 1).astype(np.float32)
    return {**params, "prompter": {**params["prompter"], "common_prompt": prompts}}

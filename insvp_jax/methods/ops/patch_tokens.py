"""Prompts that start in the directions of patch tokens.

Source: Wang et al. 2024, "Revisiting the Power of Prompt for Visual Prompt Tuning",
which starts prompts as prototypes of patch tokens. Here they are single tokens, and as
large as prompts drawn at random: what attends to a prompt sees its direction alone, but
how fast that turns at a learning rate depends on its size.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from insvp_jax.methods.base import Apply, BackboneSpec
from insvp_jax.methods.hooks import Adaptation, Hooks

# Training images that tokens are taken from.
_NUM_IMAGES = 16


class _ReadTokens(Hooks):
  """Reads the tokens that enter each block and those that leave it, of some images."""

  def leave(self, p, x, prompts, before):
    return x, prompts, (before[0][:_NUM_IMAGES], x[:_NUM_IMAGES])


def check(name: str, value: str, spec: BackboneSpec) -> None:
  """Checks that tokens of a backbone can be read, and become prompts of any block.

  Args:
    name: of the field that asks for it.
    value: of that field.
    spec: of the backbone.

  Raises:
    ValueError: they cannot.
  """
  if "leave" not in spec.sites or len(spec.stages) > 1:
    raise ValueError(
      f"{name} is {value!r}, which needs tokens between blocks of one width; of this "
      "backbone they cannot be had. Take another start."
    )


def start_prompts(
  spec: BackboneSpec,
  params: Mapping[str, Any],
  batches: Callable[..., Iterable[Mapping[str, Any]]],
  apply: Apply,
  blocks: Sequence[int],
) -> dict[str, Any]:
  """Returns the parameters, with patch tokens that enter these blocks as prompts.

  Prompt i of each block is the same patch of the same training image, on its way
  through the plain backbone, scaled to the root mean square of the prompts as they
  were drawn. Which patches these are follows from the drawn prompts, and so from the
  run's seed.

  Args:
    spec: of the backbone.
    params: of the model; "common_prompt" of the prompter are the prompts as drawn, and
      become float32 [l, p, d].
    batches: as for `Method.prepare`.
    apply: likewise.
    blocks: the l blocks.
  """
  own = params["prompter"]
  drawn = np.asarray(own["common_prompt"], np.float32)
  count = drawn.shape[1]
  rng = np.random.default_rng(np.ascontiguousarray(drawn[0, 0, :4]).view(np.uint32))
  batch = next(iter(batches(_NUM_IMAGES)))
  reading = Adaptation(hooks=_ReadTokens())
  _, reads = apply.backbone(params, batch["images"], reading)
  images = rng.integers(0, int(np.sum(batch["mask"][:_NUM_IMAGES])), count)
  places = spec.num_prefix + rng.integers(0, spec.num_patches, count)
  # The last block may get only tokens that are read. What it comes from is whole.
  entering = [reads[block - 1][1] if block else reads[0][0] for block in blocks]
  tokens = np.stack([np.asarray(x, np.float32)[images, places] for x in entering])
  prompts = tokens * (_rms(drawn, None) / np.maximum(_rms(tokens, -1), 1e-6))
  return {**params, "prompter": {**own, "common_prompt": prompts}}


def _rms(x: np.ndarray, axis: int | None) -> np.ndarray:
  return np.sqrt(np.mean(np.square(x), axis=axis, keepdims=True))

"""Partial tuning: the last blocks, the last norm and the head train.

Source: Yosinski et al. 2014, "How transferable are features in deep neural networks?";
the baselines Partial-1, -2 and -4 of Jia et al. 2022, "Visual Prompt Tuning". The last
norm trains too, as in VPT's code for supervised ViTs. Parameters on ViT-B/16:
7,087,872 k + 1,536.
"""

import flax.linen as nn

from insvp_jax.methods import checks
from insvp_jax.methods.base import Method
from insvp_jax.methods.fields import field


class Partial(Method):
  """Trains the last k blocks of the backbone, its last norm, and the head."""

  blocks: int = field(
    1, "how many blocks train, the last ones", check=checks.block_count
  )

  @nn.nowrap
  def trainable_patterns(self) -> tuple[str, ...]:
    """Returns the patterns of the blocks, of the norm and of the head.

    Raises:
      ValueError: the backbone's blocks share their leaves.
    """
    if not self.spec.block_patterns:
      raise ValueError(
        "the method 'partial' trains some blocks and freezes others, but with "
        "backbone.scan the blocks share their leaves; set backbone.scan=False."
      )
    blocks = self.spec.block_patterns[-self.blocks :]
    # A ResNet has no norm after its blocks.
    return (*blocks, *self.spec.norm_patterns[-1:], "head/.*")

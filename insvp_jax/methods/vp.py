"""VP: a prompt that is added to the pixels, the same for every image.

Source: Bahng et al. 2022, "Exploring Visual Prompts for Adapting Large-Scale Models",
and its published code, with which it shares start and place: values from N(0, 1), added
to the normalised image, not clipped.

x' = x + prompt, where the prompt is a border of k pixels ("padding"), a square of k x k
pixels in the top left corner ("fixed_patch"), or that square anywhere ("random_patch").
Published without a head of its own: the first k classes the backbone was trained on
stand for the task's (`classifier="source"`); here a head is trained by default.
Parameters of a border: 12 k (S - k), S pixels per side of an image; of a square: 3 k^2.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from insvp_jax.methods import checks
from insvp_jax.methods.base import BackboneSpec, Method
from insvp_jax.methods.fields import field
from insvp_jax.methods.ops import border
from insvp_jax.methods.ops.label_mapping import check_enough

_PADDING, _FIXED, _RANDOM = LOCATIONS = ("padding", "fixed_patch", "random_patch")


class VP(Method):
  """Adds one prompt to the pixels of all images."""

  location: str = field(
    _PADDING,
    f"where the prompt is: {', '.join(LOCATIONS)} (a place for each batch in training, "
    "the middle in evaluation, where the published code draws one, too)",
    check=checks.one_of(*LOCATIONS),
  )
  prompt_size: int | None = field(
    border.default_size,
    "pixels k: of the border's width, of the square's side; None: 30, or a quarter of "
    "the side of smaller images",
    check=checks.positive_int,
  )
  classifier: str = field(
    "trained",
    "trained (a linear head) or source (the first classes of the backbone's own head)",
    check=checks.one_of("trained", "source"),
  )
  meta: str = field(
    "",
    "an .npz file of `insvp meta_init` with the border to start from; empty: N(0, 1)",
    check=checks.path,
  )

  def __post_init__(self) -> None:
    """Checks that there are as many source classes as classes."""
    super().__post_init__()
    if self.reads_source_head() and self.spec.head_classes:
      check_enough(self.spec.head_classes, self.num_classes, 1)

  @classmethod
  def resolve(cls, spec: BackboneSpec, values):
    resolved = super().resolve(spec, values)
    is_border = resolved["location"] == _PADDING
    largest = 0 if is_border else spec.image_size
    border.check_size(spec, resolved["prompt_size"], largest=largest)
    if resolved["meta"] and not is_border:
      raise ValueError(
        f"meta is {resolved['meta']!r}, which has a border, but location is "
        f"{resolved['location']!r}; leave one of them out."
      )
    return resolved

  def setup(self) -> None:
    """Creates up, down [k, S, 3], left, right [S - 2k, k, 3]; or patch [k, k, 3]."""
    side, k = self.spec.image_size, self.prompt_size
    is_border = self.location == _PADDING
    shapes = border.shapes(side, k) if is_border else {"patch": (k, k, 3)}
    init = nn.initializers.normal(1.0)
    self.leaves = {name: self.param(name, init, s) for name, s in shapes.items()}

  def _prompt(self, *, train: bool = False) -> Float[Array, "h w c"]:
    """Returns the prompt as an image that is zero elsewhere."""
    p, side, k = self.leaves, self.spec.image_size, self.prompt_size
    if self.location == _PADDING:
      return border.image(p)
    corner = jnp.zeros(2, jnp.int32)
    if self.location == _RANDOM:
      corner = jnp.full(2, (side - k) // 2, jnp.int32)
      if train:
        corner = jax.random.randint(
          self.make_rng("dropout"), (2,), 0, side - k + 1, jnp.int32
        )
    # Products with ones and zeros: `dynamic_update_slice` cannot be stacked over trials
    # whose parameters are split.
    rows, columns = jnp.arange(side)[None, :, None] == corner[
      :, None, None
    ] + jnp.arange(k)
    return jnp.einsum(
      "ip,jq,pqc->ijc",
      *(place.astype(p["patch"].dtype) for place in (rows, columns)),
      p["patch"],
      precision=jax.lax.Precision.HIGHEST,
    )

  def prompt_image(self, images, *, train=False):
    return images + self._prompt(train=train).astype(images.dtype)

  @nn.nowrap
  def reads_source_head(self) -> bool:
    return self.classifier == "source"

  def adapt_logits(self, logits, *, train=False):
    del train
    return logits[:, : self.num_classes] if self.reads_source_head() else logits

  @nn.nowrap
  def prepares(self) -> bool:
    return bool(self.meta)

  @nn.nowrap
  def prepare(self, params, batches, apply):
    del batches, apply
    leaves = border.read(self.meta, self.spec.image_size, self.prompt_size)
    return {**params, "prompter": {**params["prompter"], **leaves}}

  @nn.nowrap
  def trainable_patterns(self) -> tuple[str, ...]:
    """Returns the patterns of the prompt and, where one trains, the head."""
    head = () if self.reads_source_head() else ("head/.*",)
    return ("prompter/.*", *head)

  def prompts(self, images: Float[Array, "b h w c"]) -> dict[str, Array]:
    """Returns {"image": [b, h, w, 3]}, the same prompt for every image."""
    return {"image": jnp.broadcast_to(self._prompt(), images.shape)}

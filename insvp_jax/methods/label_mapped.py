"""What ILM-VP and AutoVP share: a frame around a small image, and mapped classes.

No head is trained: the classes that the backbone was trained on stand for those of the
task, by a mapping that is stored with the adapter, as int32 [k, m] or as a dense layer.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from insvp_jax import files
from insvp_jax.methods.base import Apply, BackboneSpec, Method
from insvp_jax.methods.ops import label_mapping
from insvp_jax.methods.ops.initializers import torch_uniform

FIXED, FREQUENCY, ITERATIVE, SEMANTIC, FULL = (
  *("fixed", "frequency", "iterative", "semantic", "full"),
)
_LEAF = "label_mapping"


def default_inner_size(spec: BackboneSpec) -> int:
  """Returns the published 128 of 224 pixels, in that proportion."""
  return max(1, spec.image_size * 4 // 7)


def check_inner_size(name: str, value: Any, spec: BackboneSpec) -> int:
  """Checks the field of that name; see `fields.Check`."""
  is_int = isinstance(value, int) and not isinstance(value, bool)
  if not is_int or not 1 <= value <= spec.image_size:
    raise ValueError(
      f"{name} is {value!r}, but the backbone's images have {spec.image_size} pixels "
      f"per side; expected an integer from 1 to {spec.image_size}."
    )
  return value


class LabelMapped(Method):
  """Base of both; the fields are declared by each.

  Attributes:
    inner_size: pixels per side of the images that the method gets.
    mapping: "fixed" (the first m k source classes in their order), "frequency" (counted
      once before training), "iterative" (counted before each epoch), "semantic" (by
      given embeddings) or "full" (a dense layer).
    sources_per_target: m.
    embeddings: of "semantic", path of an .npz file.
  """

  def __post_init__(self) -> None:
    """Checks that there are source classes enough."""
    super().__post_init__()
    if self.spec.head_classes and self.mapping != FULL:
      label_mapping.check_enough(
        self.spec.head_classes, self.num_classes, self.sources_per_target
      )
    if self.mapping == SEMANTIC and not self.embeddings:
      raise ValueError(
        "mapping is 'semantic', which compares embeddings of the classes' names: set "
        "embeddings to an .npz file with the arrays source [s, e] and target [k, e]."
      )

  def setup(self) -> None:
    """Creates the prompt [S, S, 3] at zero, and the mapping."""
    side = self.spec.image_size
    self.delta = self.param("delta", nn.initializers.zeros, (side, side, 3))
    if self.mapping == FULL:
      init = torch_uniform(self.spec.head_classes)
      self.dense = nn.Dense(self.num_classes, kernel_init=init, bias_init=init)
    else:
      shape = (self.num_classes, self.sources_per_target)
      self.sources = self.param(_LEAF, _in_order, shape)

  def border(self) -> Float[Array, "t t c"]:
    """Returns the prompt in normalised units, zero where the image is."""
    raise NotImplementedError

  def prompts(self, images: Float[Array, "b h w c"]) -> dict[str, Array]:
    """Returns {"frame": [b, S, S, 3]}, the same for every image."""
    border = self.border()
    return {"frame": jnp.broadcast_to(border, (len(images), *border.shape))}

  @nn.nowrap
  def black(self) -> Float[Array, "c"]:
    """Returns a black pixel, normalised."""
    return -jnp.asarray(self.spec.mean) / jnp.asarray(self.spec.std)

  @nn.nowrap
  def input_size(self) -> int:
    return self.inner_size

  @nn.nowrap
  def reads_source_head(self) -> bool:
    return True

  def adapt_logits(self, logits, *, train=False):
    del train
    if self.mapping == FULL:
      return self.dense(logits)
    return label_mapping.map_logits(logits, self.sources)

  @nn.nowrap
  def prepares(self) -> bool:
    return self.mapping in (FREQUENCY, SEMANTIC)

  @nn.nowrap
  def prepare(self, params, batches, apply):
    if self.mapping == FREQUENCY:
      return self._counted(params, batches, apply)
    arrays = files.read_npz(self.embeddings, ["source", "target"])
    expected = (self.spec.head_classes, self.num_classes)
    if (actual := tuple(map(len, arrays.values()))) != expected:
      raise ValueError(
        f"{self.embeddings} has embeddings of {actual[0]} source and {actual[1]} "
        f"target classes, expected {expected[0]} and {expected[1]}."
      )
    return _with_mapping(
      params, label_mapping.semantic_mapping(*arrays.values(), self.sources_per_target)
    )

  @nn.nowrap
  def refresh_every_epochs(self) -> int:
    return 1 if self.mapping == ITERATIVE else 0

  @nn.nowrap
  def refresh(self, params, batches, apply):
    # A combination calls it where another method is refreshed, too.
    if self.mapping != ITERATIVE:
      return params
    return self._counted(params, batches, apply)

  @nn.nowrap
  def _counted(
    self, params: Mapping[str, Any], batches: Any, apply: Apply
  ) -> Mapping[str, Any]:
    """Returns all parameters with the mapping of what is predicted as what."""
    sizes = self.spec.head_classes, self.num_classes
    counts = np.zeros(sizes, np.int64)
    each: Iterable[Mapping[str, Any]] = batches()
    for batch in each:
      logits = jax.device_get(apply.source_logits(params, batch["images"]))
      is_image = np.asarray(batch["mask"]) > 0
      predictions = np.argmax(logits, axis=-1)[is_image]
      labels = np.asarray(batch["labels"])[is_image]
      counts += label_mapping.count_predictions(predictions, labels, *sizes)
    return _with_mapping(
      params, label_mapping.greedy_mapping(counts, self.sources_per_target)
    )

  @nn.nowrap
  def trainable_patterns(self) -> tuple[str, ...]:
    """Returns the patterns of the prompt and of a dense mapping."""
    return ("prompter/delta", *(("prompter/dense/.*",) if self.mapping == FULL else ()))

  @nn.nowrap
  def updated_patterns(self) -> tuple[str, ...]:
    """Returns the pattern of a mapping that is counted anew."""
    return (f"prompter/{_LEAF}",) if self.mapping == ITERATIVE else ()


def _in_order(key: jax.Array, shape: tuple[int, int]) -> Int[Array, "k m"]:
  del key
  return jnp.arange(shape[0] * shape[1], dtype=jnp.int32).reshape(shape)


def _with_mapping(
  params: Mapping[str, Any], mapping: Int[np.ndarray, "k m"]
) -> Mapping[str, Any]:
  return {**params, "prompter": {**params["prompter"], _LEAF: mapping}}

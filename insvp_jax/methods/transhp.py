"""TransHP: prompts for the coarse classes of a hierarchy, and losses that tell them.

Source: Wang et al. 2023, "TransHP: Image Classification with Hierarchical Prompting",
eq. 2 to 6, and its published code, there with a backbone that trains.

Level j has C_j coarse classes and one more for "no label". Its C_j + 1 prompts join the
sequence in one block; the score of coarse class c is the dot product of the output of
prompt c and row c of a matrix. The loss gains w_j times the level's cross-entropy.
Parameters: 2 d sum_j (C_j + 1).
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from insvp_jax.methods import checks
from insvp_jax.methods.base import BackboneSpec, Method
from insvp_jax.methods.fields import field
from insvp_jax.methods.hooks import Adaptation, Hooks
from insvp_jax.methods.ops.class_means import class_means

# A coarse class of CIFAR-100 has so many classes.
_CLASSES_PER_COARSE = 5


class TransHPHooks(Hooks):
  """Appends a level's prompts in its block and reads their scores."""

  def enter(self, p, x, prompts):
    if p.block is None:
      return x, prompts
    own = p.block["prompt"][None]
    if prompts is None:
      return x, own
    own = jnp.broadcast_to(own, (len(prompts), *own.shape[1:]))
    return x, jnp.concatenate([prompts, own.astype(prompts.dtype)], axis=1)

  def leave(self, p, x, prompts, before):
    if p.block is None:
      return x, prompts, None
    num_others = prompts.shape[1] - len(p.block["prompt"])
    own = prompts[:, num_others:].astype(jnp.float32)
    logits = jnp.sum(own * p.block["matrix"].astype(jnp.float32), axis=-1)
    prompts = prompts[:, :num_others] if num_others else None
    return x, prompts, {"logits": logits, "weight": p.block["weight"]}


def level_loss(
  logits: Float[Array, "b c"], targets: Float[Array, "b c"]
) -> Float[Array, ""]:
  """Returns the mean cross-entropy of a level in nats."""
  return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1))


_LEVEL = "the coarse class of each class, from 0 on, or -1 for none"


def _check_hierarchy(name: str, value: Any, spec: BackboneSpec) -> Any:
  if not isinstance(value, tuple | list) or not value:
    raise ValueError(f"{name} is {value!r}, expected a tuple for each level: {_LEVEL}.")
  check = checks.integers(-1, f"a tuple, {_LEVEL}")
  return tuple(check(f"level {i} of {name}", v, spec) for i, v in enumerate(value))


class TransHP(Method):
  """Hierarchical prompting of a frozen backbone.

  The hierarchy is given, or found in the training images before the first step: the
  classes' mean features are merged, nearest first (Ward), until as many coarse classes
  are left as a level has. It is stored with the parameters then.
  """

  hierarchy: Sequence[Any] | None = field(
    None,
    "for each level the coarse class of each class, from 0 on, or -1 for no label; "
    "None: clusters of the classes",
    check=_check_hierarchy,
  )
  levels: Sequence[int] | None = field(
    None,
    "numbers of coarse classes to cluster the classes into, one for each level; None: "
    "one level, of a fifth of the classes",
    check=checks.integers(1, "a tuple of integers of at least 1"),
  )
  level_blocks: Sequence[int] | None = field(
    None,
    "the block of each level, from 0 on; None: one after the other, the last level at "
    "two thirds of the depth",
    check=checks.integers(0, "a tuple of blocks, from 0 on"),
  )
  level_weights: Sequence[float | int] | None = field(
    None,
    "the weight of each level's loss; None: 1 each",
    check=checks.finite_numbers(),
    hparam=True,
  )

  @classmethod
  def resolve(cls, spec: BackboneSpec, values: Mapping[str, Any]) -> dict[str, Any]:
    resolved = super().resolve(spec, values)
    hierarchy, levels = resolved["hierarchy"], resolved["levels"]
    if hierarchy is not None and levels is not None:
      raise ValueError(
        "hierarchy and levels are both set: a hierarchy is either given or found by "
        "clustering; leave one of them out."
      )
    num_levels = len(hierarchy or levels or (None,))
    start = max(2 * spec.depth // 3 - num_levels + 1, 0)
    defaults = {
      "level_blocks": tuple(range(start, start + num_levels)),
      "level_weights": (1.0,) * num_levels,
    }
    for name, default in defaults.items():
      resolved[name] = resolved[name] or default
      if len(resolved[name]) != num_levels:
        raise ValueError(
          f"{name} is {resolved[name]!r}, expected one for each of {num_levels} levels."
        )
    blocks = resolved["level_blocks"]
    if len(set(blocks)) < num_levels or max(blocks) >= spec.depth:
      raise ValueError(
        f"level_blocks is {blocks!r}, expected {num_levels} different blocks of the "
        f"backbone's {spec.depth}, which are numbered from 0."
      )
    return resolved

  def __post_init__(self) -> None:
    """Checks the levels against the classes, where these are known."""
    super().__post_init__()
    for i, level in enumerate(self.hierarchy or ()):
      if self.num_classes and len(level) != self.num_classes:
        raise ValueError(
          f"level {i} of hierarchy covers {len(level)} classes, but there are "
          f"{self.num_classes}; give the coarse class, or -1 for none, of each."
        )
    if self.num_classes and max(self.levels or (0,)) > self.num_classes:
      raise ValueError(
        f"levels is {self.levels!r}, but there are only {self.num_classes} classes to "
        "cluster into coarse ones."
      )

  @nn.nowrap
  def level_sizes(self) -> tuple[int, ...]:
    """Returns the number C_j of coarse classes of each level."""
    if self.hierarchy is not None:
      return tuple(max(level) + 1 for level in self.hierarchy)
    fifth = math.ceil(self.num_classes / _CLASSES_PER_COARSE)
    return self.levels or (max(fifth, 2),)

  @nn.nowrap
  def hooks(self) -> Hooks:
    return TransHPHooks(reads_prompts=True)

  def setup(self) -> None:
    """Creates prompts and matrix [C_j + 1, d] of each level, and a found hierarchy."""
    sizes = self.level_sizes()
    self.tables = [self._tables(f"level_{i}", size) for i, size in enumerate(sizes)]
    if self.hierarchy is None:
      # Labels [levels, k], for now none; floats as all that JAX differentiates by.
      init, shape = nn.initializers.constant(-1.0), (len(sizes), self.num_classes)
      self.param("hierarchy", init, shape)

  def _tables(self, name: str, num_coarse: int) -> dict[str, Array]:
    normal = nn.initializers.normal(0.02)

    def init(key):
      keys = jax.random.split(key)
      shape = (num_coarse + 1, self.spec.width)
      return {
        n: normal(k, shape) for n, k in zip(("prompt", "matrix"), keys, strict=True)
      }

    return self.param(name, init)

  def adapt(self, images, prompted, *, embed=None, train=False) -> Adaptation:
    del images, prompted, embed, train
    blocks: list[Any] = [None] * self.spec.depth
    weights = self.hparam("level_weights")
    for i, (block, tables) in enumerate(
      zip(self.level_blocks, self.tables, strict=True)
    ):
      blocks[block] = {**tables, "weight": weights[i]}
    return Adaptation(blocks=blocks)

  @nn.nowrap
  def extra_loss(self, params, reads, targets):
    labels = self.hierarchy if self.hierarchy is not None else params["hierarchy"]
    total = 0.0
    for i, (block, size) in enumerate(
      zip(self.level_blocks, self.level_sizes(), strict=True)
    ):
      coarse = jnp.asarray(labels[i], jnp.int32)
      # The last row is for classes without a label.
      one_hot = jax.nn.one_hot(jnp.where(coarse < 0, size, coarse), size + 1)
      level = reads[block]
      weight = level["weight"].astype(jnp.float32)
      total += weight * level_loss(level["logits"], targets @ one_hot)
    return total

  @nn.nowrap
  def prepares(self) -> bool:
    return self.hierarchy is None

  @nn.nowrap
  def prepare(self, params, batches, apply):
    """Returns the parameters, with the hierarchy that the features' means give."""
    # Slow to import.
    from sklearn.cluster import AgglomerativeClustering

    means = class_means(batches(), lambda images: apply.backbone(params, images)[0])
    classes, features = list(means), np.stack(list(means.values()))
    hierarchy = np.full((len(self.level_sizes()), self.num_classes), -1.0, np.float32)
    for level, size in zip(hierarchy, self.level_sizes(), strict=True):
      labels = np.arange(len(classes))
      if size < len(classes):
        labels = AgglomerativeClustering(size).fit_predict(features)
      level[classes] = labels
    return {**params, "prompter": {**params["prompter"], "hierarchy": hierarchy}}

  @nn.nowrap
  def trainable_patterns(self) -> tuple[str, ...]:
    return ("prompter/level_.*", "head/.*")

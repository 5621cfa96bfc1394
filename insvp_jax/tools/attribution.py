"""Where a run looks: Grad-CAM of any backbone, attention roll-out of a ViT.

run = insvp_jax.load_run("runs/one")
maps = attribution.grad_cam(run, ["photo.jpg"])           # [1, rows, columns]
maps = attribution.attention_rollout(run, ["photo.jpg"])  # the same of a ViT

Both read the model as it is, by hooks beside those of the run's own method: its
prompts, adapters and heads are in force. A map has one value for each position of the
grid that is read, row by row; where the method changes the size of an image it is one
of the image as the backbone sees it (`Run.prompted`).
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int
import numpy as np

from insvp_jax.methods.hooks import (
  Adaptation,
  CombinedHooks,
  HookArrays,
  Hooks,
  block_of,
)
from insvp_jax.models.classifier import PromptedClassifier
from insvp_jax.models.layers import Attention
from insvp_jax.models.vit import ViT
from insvp_jax.run import BATCH_SIZES, Run

# Stands for the class that the run predicts.
_PREDICTED = -1


def grad_cam(
  run: Run, images: Any, class_index: int | Sequence[int] | np.ndarray | None = None
) -> Float32[np.ndarray, "b gh gw"]:
  """Returns by how much each position speaks for a class.

  With A the activations [gh, gw, d] of one layer and y the class's logit, the weight of
  channel k is the mean over positions of dy / dA_k, and the map is the positive part of
  the weighted sum of the channels: in logits, and 0 where a position speaks against the
  class. Divide by the largest value to compare images.

  The layer is the last one whose positions are still apart and are read:

  - of a CNN and a Swin, what leaves the last stage;
  - of a ViT that pools all tokens ("gap", "map"), the tokens as they are pooled:
    normalised, or before the norm where the feature is normalised instead;
  - of a ViT whose class token is the feature, or whose method pools: the normalised
    tokens that the last block attends to. What leaves that block's patches is read by
    nobody, and its gradient is 0.

  Args:
    run: from `load_run`, of any method and backbone.
    images: as for `Run.predict`.
    class_index: the class, or one for each image; None for the one predicted.

  Raises:
    ValueError: there is no such class, not one for each image, or a value that is not
      finite.

  Source: Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via
  Gradient-based Localization", eq. 1 and 2.
  """
  inputs = run.preprocess(images)
  classes = _check_classes(class_index, len(inputs), len(run.class_names))

  model = _unscheduled(run.model)

  def maps(params: Any, inputs: Array, classes: Array) -> Array:
    return _class_maps(model, params, inputs, classes)

  found = _in_batches(run, "grad_cam", maps, inputs, classes)
  return _check_finite(found, "Grad-CAM", run)


def attention_rollout(run: Run, images: Any) -> Float32[np.ndarray, "b gh gw"]:
  """Returns how much of the feature comes from each patch, by attention alone.

  With W_l the attention of block l, a mean over heads, tokens mix as
  A_l = (W_l + I) / 2, and the roll-out is the product A_L ... A_1. The map is the row
  of what is pooled: the class token, the mean of the patches ("gap"), what the pool's
  own attention weights ("map"), or what the method pools.

  Prompts are tokens of that product: they are not dropped, and no row is normalised
  again. A prompt that is new in a block is a source of its own, as a patch is, and one
  that blocks carry along passes on what it got. Without the prompts, rows that are
  normalised again would count attention for more than the residual connection. So a
  map's sum is at most 1, and what it lacks comes from prompts and prefix tokens.

  What a method does besides attention (adapters, gates) is left out, as MLPs are.

  Args:
    run: from `load_run`, of a ViT.
    images: as for `Run.predict`.

  Raises:
    ValueError: the backbone is no ViT, or a value is not finite.

  Source: Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers",
  section 3, eq. 1.
  """
  if not isinstance(run.model.backbone, ViT):
    raise ValueError(
      "attention roll-out needs a ViT, whose tokens attend to all others; the run's "
      f"backbone is a {type(run.model.backbone).__name__}. Grad-CAM works on any."
    )
  # All rows of the last block are read here.
  model = _unscheduled(run.model)
  model = model.clone(backbone=model.backbone.clone(skip_unread=False))

  def maps(params: Any, inputs: Array) -> Array:
    return _rolled_out(model, params, inputs)

  found = _in_batches(run, "attention_rollout", maps, run.preprocess(images))
  return _check_finite(found, "attention roll-out", run)


# --- What both share.


def _unscheduled(model: PromptedClassifier) -> PromptedClassifier:
  """Returns the model without `remat`: what a probe has seen could not leave it."""
  return model.clone(backbone=model.backbone.clone(remat=False))


def _check_classes(
  class_index: Any, number: int, num_classes: int
) -> Int[np.ndarray, "b"]:
  """Returns a class for each image."""
  if class_index is None:
    return np.full(number, _PREDICTED, np.int32)
  classes = np.asarray(class_index)
  if classes.dtype.kind not in "iu" or classes.shape not in ((), (number,)):
    raise ValueError(
      f"class_index is {class_index!r}, expected a class, or one for each of {number} "
      f"images, from 0 to {num_classes - 1}."
    )
  if classes.min() < 0 or classes.max() >= num_classes:
    wrong = int(classes.min() if classes.min() < 0 else classes.max())
    raise ValueError(
      f"class_index is {wrong}, expected a class from 0 to {num_classes - 1}."
    )
  return np.broadcast_to(classes, (number,)).astype(np.int32)


def _check_finite(maps: np.ndarray, what: str, run: Run) -> np.ndarray:
  """Returns the maps, which have to be finite."""
  if not np.isfinite(maps).all():
    wrong = int(np.flatnonzero(~np.isfinite(maps).all(axis=(1, 2)))[0])
    raise ValueError(
      f"{what} of image {wrong} is not finite: the run at {run.workdir} has diverged; "
      "train it with a smaller lr."
    )
  return maps


def _in_batches(
  run: Run, name: str, function: Callable[..., Array], *arrays: np.ndarray
) -> Float32[np.ndarray, "b gh gw"]:
  """Returns `function(params, *arrays)` of all examples, computed in few shapes."""
  compiled = run.compiled(name, function)
  number, outputs = len(arrays[0]), []
  for start in range(0, number, BATCH_SIZES[-1]):
    stop = min(start + BATCH_SIZES[-1], number)
    size = next(size for size in BATCH_SIZES if size >= stop - start)
    # The last one again, for padding.
    rows = np.minimum(np.arange(start, start + size), number - 1)
    output = compiled(run.params, *(array[rows] for array in arrays))
    outputs.append(np.asarray(output, np.float32)[: stop - start])
  return np.concatenate(outputs)


def _beside(
  adaptation: Adaptation, probe: Hooks, depth: int, shared: Any = None, last: Any = None
) -> Adaptation:
  """Returns an adaptation with a probe after the method's own hooks.

  Args:
    adaptation: the method's.
    probe: sees what the method made of each site.
    depth: number of blocks.
    shared: what the probe gets everywhere.
    last: what it gets in the last block alone.
  """
  # A list, so that blocks are applied one by one even where they are scanned.
  blocks = [
    {
      "method": block_of(adaptation.blocks, i),
      "probe": last if i + 1 == depth else None,
    }
    for i in range(depth)
  ]
  hooks = CombinedHooks.of((("method", adaptation.hooks), ("probe", probe)))
  return adaptation.replace(
    blocks=blocks,
    shared={"method": adaptation.shared, "probe": shared},
    hooks=hooks,
  )


def _probed_logits(
  model: PromptedClassifier, images: Array, change: Callable[[Adaptation], Adaptation]
) -> Array:
  """Returns the logits [b, k] as `PromptedClassifier` does, under more hooks."""
  prompted, adaptation = model.adapt(images)
  adaptation = change(adaptation)
  size = model.prompter.prompted_size()
  tokens = model.backbone.embed(prompted, adaptation, size=size)
  feature = model.backbone.encode(tokens, adaptation)
  return model.classify(model.prompter.adapt_feature(feature, images))


# --- Grad-CAM.


def _class_maps(
  model: PromptedClassifier, params: Any, inputs: Array, classes: Array
) -> Float[Array, "b gh gw"]:
  logits_of = _vit_logits if isinstance(model.backbone, ViT) else _staged_logits

  def score(added: Array | None) -> tuple[Array, Array]:
    """Returns (sum of the images' logits, A), with `added` joined to A."""
    logits, activations = logits_of(model, params, inputs, added)
    chosen = jnp.where(classes == _PREDICTED, jnp.argmax(logits, axis=-1), classes)
    # A sum, as no image's logits depend on another's activations.
    return jnp.sum(jnp.take_along_axis(logits, chosen[:, None], 1)), activations

  shape = jax.eval_shape(lambda: score(None)[1]).shape
  grads, activations = jax.grad(score, has_aux=True)(jnp.zeros(shape))
  grads, activations = (
    x.astype(jnp.float32).reshape(len(inputs), -1, shape[-1])
    for x in (grads, activations)
  )
  weights = jnp.mean(grads, axis=1, keepdims=True)  # [b, 1, d]
  return _grid(jax.nn.relu(jnp.sum(weights * activations, axis=-1)))


def _grid(values: Float[Array, "b n"]) -> Float[Array, "b gh gw"]:
  """Returns values of positions, row by row, as the square that they are of."""
  side = math.isqrt(values.shape[1])
  return values.reshape(-1, side, side)


@dataclasses.dataclass(frozen=True)
class _PatchProbe(Hooks):
  """Reads the patch tokens at one place, and adds to them what it is given.

  Attributes:
    start: the first patch token.
    count: of patch tokens.
    leaves: whether the place is the end of the last block, not the operation `at`.
    seen: gets the tokens.
  """

  start: int = 0
  count: int = 0
  leaves: bool = False
  seen: list[Array] = dataclasses.field(default_factory=list, compare=False)

  def overrides(self, name: str) -> bool:
    return name == ("leave" if self.leaves else "after")

  def _look(self, tokens: Array, given: Any) -> Array:
    rows = slice(self.start, self.start + self.count)
    self.seen.append(tokens[:, rows])
    if given["added"] is None:
      return tokens
    return tokens.at[:, rows].add(given["added"].astype(tokens.dtype))

  def after(self, p, name, x, y):
    given = p.block if name == "norm1" else p.shared
    # Prompts that are keys alone pass the norm after the tokens.
    return y if given is None or self.seen else self._look(y, given)

  def leave(self, p, x, prompts, before):
    return (x if p.block is None else self._look(x, p.block)), prompts, None


def _vit_logits(
  model: PromptedClassifier, params: Any, inputs: Array, added: Array | None
) -> tuple[Array, Array]:
  """Returns (logits [b, k], patch tokens [b, n, d] of the layer of `grad_cam`)."""
  vit, size = model.backbone, model.prompter.prompted_size()
  pools_tokens = vit.pool != "tok" and not model.prompter.hooks().overrides("pool")
  # Where the feature is normalised, the tokens are pooled as they leave the last block.
  leaves = pools_tokens and vit.fc_norm
  is_normed = pools_tokens and not vit.fc_norm
  probe = _PatchProbe(
    at=() if leaves else ("encoder_norm",) if is_normed else ("norm1",),
    start=vit.num_prefix,
    count=(size // vit.patch_size) ** 2,
    leaves=leaves,
  )
  # The last norm is in no block.
  places = {"shared" if is_normed else "last": {"added": added}}

  def apply(model: PromptedClassifier, images: Array) -> Array:
    return _probed_logits(
      model, images, lambda adaptation: _beside(adaptation, probe, vit.depth, **places)
    )

  logits = model.apply({"params": params}, inputs, method=apply)
  return logits, probe.seen[0]


def _staged_logits(
  model: PromptedClassifier, params: Any, inputs: Array, added: Array | None
) -> tuple[Array, Array]:
  """Returns (logits [b, k], what leaves the last stage: [b, h, w, d] or [b, n, d])."""
  last = ("backbone", f"stage_{len(model.backbone.depths) - 1}")
  seen = []

  # These backbones have no hooks within; Flax's interceptors see each module's calls.
  def intercept(call, args, kwargs, context):
    outputs = call(*args, **kwargs)
    if context.module.path != last or context.method_name != "__call__":
      return outputs
    # A Swin's stage returns its prompts, too.
    x, *others = outputs if isinstance(outputs, tuple) else (outputs,)
    seen.append(x)
    if added is not None:
      x = x + added.astype(x.dtype)
    return (x, *others) if isinstance(outputs, tuple) else x

  with nn.intercept_methods(intercept):
    logits = model.apply({"params": params}, inputs)
  return logits, seen[-1]


# --- Attention roll-out.


@dataclasses.dataclass(frozen=True)
class _AttentionProbe(Hooks):
  """Reads the attention of each block, [b, q, k]: means over heads."""

  seen: list[Array] = dataclasses.field(default_factory=list, compare=False)

  def qkv(self, p, q, k, v):
    self.seen.append(_mean_attention(q, k))
    return q, k, v


def _mean_attention(
  q: Float[Array, "b q h e"], k: Float[Array, "b n h e"]
) -> Float[Array, "b q n"]:
  """Returns the softmax that `models.layers.attend` weights by, a mean over heads."""
  q, k = (x.astype(jnp.float32) for x in (q, k))
  logits = jnp.einsum("bqhe,bnhe->bhqn", q * q.shape[-1] ** -0.5, k)
  return jnp.mean(jax.nn.softmax(logits, axis=-1), axis=1)


def _rolled_out(
  model: PromptedClassifier, params: Any, inputs: Array
) -> Float[Array, "b gh gw"]:
  vit, size = model.backbone, model.prompter.prompted_size()
  num_tokens = vit.num_prefix + (size // vit.patch_size) ** 2
  probe, pooling, adapted = _AttentionProbe(), [], []

  def change(adaptation: Adaptation) -> Adaptation:
    adapted.append(adaptation)
    return _beside(adaptation, probe, vit.depth)

  def intercept(call, args, kwargs, context):
    is_pool = context.module.path[:2] == ("backbone", "MAPHead_0")
    if not (is_pool and isinstance(context.module, Attention)):
      return call(*args, **kwargs)
    if context.method_name != "__call__":
      return call(*args, **kwargs)

    def look(q, k, v):
      pooling.append(_mean_attention(q, k))
      return q, k, v

    return call(*args, **kwargs, change_qkv=look)

  with nn.intercept_methods(intercept):
    model.apply(
      {"params": params},
      inputs,
      method=lambda model, images: _probed_logits(model, images, change),
    )
  (adaptation,) = adapted
  tokens, prompts = _roll(probe.seen, num_tokens, adaptation)
  hooks = adaptation.hooks
  if hooks.overrides("pool"):
    # The method's own pool, on rows in place of tokens: what it gives each of them.
    pooled = prompts if hooks.pools_prompts else None
    arrays = HookArrays(None, adaptation.shared)
    row = hooks.pool(arrays, lambda rows: rows, tokens, pooled)
  elif vit.pool == "map":
    row = (pooling[0] @ tokens)[:, 0]
  elif vit.pool == "gap":
    row = jnp.mean(tokens[:, vit.num_prefix :], axis=1)
  else:
    row = tokens[:, 0]
  return _grid(row[:, vit.num_prefix :])


def _roll(
  attentions: Sequence[Array], num_tokens: int, adaptation: Adaptation
) -> tuple[Float[Array, "b m m"], Float[Array, "b p m"]]:
  """Returns the rows of tokens and prompts after the last block, over the first's m.

  Args:
    attentions: [b, q, k] of each block. First stand the m prefix and patch tokens, then
      prompts; among the keys also such as are no query.
    num_tokens: m.
    adaptation: the method's, which says where prompts are new.
  """
  number = len(attentions[0])
  tokens = jnp.broadcast_to(jnp.eye(num_tokens), (number, num_tokens, num_tokens))
  prompts = tokens[:, :0]
  for i, weights in enumerate(attentions):
    num_queries, num_keys = weights.shape[1:]
    if _are_new(adaptation, i):
      prompts = prompts[:, :0]
    prompts = prompts[:, : num_keys - num_tokens]
    # A new prompt has nothing of the tokens.
    num_new = num_keys - num_tokens - prompts.shape[1]
    rows = jnp.concatenate([tokens, prompts], axis=1)
    rows = jnp.pad(rows, [(0, 0), (0, num_new), (0, 0)])
    rows = (weights @ rows + rows[:, :num_queries]) / 2
    tokens, prompts = rows[:, :num_tokens], rows[:, num_tokens:]
  return tokens, prompts


def _are_new(adaptation: Adaptation, block: int) -> bool:
  """Returns whether a block does not read what the one before made of its prompts."""
  prompts = adaptation.prompts
  if prompts is None or adaptation.hooks.makes_prompts or not prompts.carry:
    return True
  return block < prompts.first + len(prompts.tokens)

"""A prompted model taken apart: prompts replaced, attention read, gradients by part.

By Flax's interceptors, which see each call of a module, so that no model needs a switch
to be measured.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from insvp_jax import trees
from insvp_jax.methods.insvp_prompters import SpecificPrompter
from insvp_jax.models.classifier import PromptedClassifier
from insvp_jax.models.layers import Attention
from insvp_jax.models.vit import ViT
from insvp_jax.train import losses

# Images of one call, so that each function is compiled once.
BATCH_SIZE = 50


class Programs:
  """The compiled functions of one model; parameters are data of all of them.

  Inputs are normalised images [n, h, w, 3] of any number n.

  A method's prompts are a dict: "image" [n, h, w, 3], what it adds to the input, and
  "specific", a list with tokens [n, p, d] for each stage, as far as they exist.
  """

  def __init__(self, model: PromptedClassifier):
    """Compiles nothing yet.

    Args:
      model: the classifier.
    """
    # What an interceptor has seen could not leave a block that is computed again.
    if getattr(model.backbone, "remat", False):
      model = model.clone(backbone=model.backbone.clone(remat=False))
    self.model = model
    self._plain = jax.jit(self._apply_plain)
    self._prompts = jax.jit(self._make_prompts)
    self._prompted = jax.jit(self._apply_prompted)
    self._gradient = jax.jit(jax.grad(self._loss))

  def plain(self, params: Mapping[str, Any], inputs: np.ndarray) -> dict[str, Any]:
    """Returns the plain backbone's "feature" [n, d]; see `prompted` for the others."""
    return _in_batches(
      lambda x: self._plain({"backbone": params["backbone"]}, x), inputs
    )

  def prompts(self, params: Mapping[str, Any], inputs: np.ndarray) -> dict[str, Any]:
    """Returns the prompts that the method makes for the inputs."""
    return _in_batches(lambda x: self._prompts(params, x), inputs)

  def prompted(
    self, params: Mapping[str, Any], inputs: np.ndarray, prompts: Mapping[str, Any]
  ) -> dict[str, Any]:
    """Applies the model with these prompts in place of its own.

    Returns:
      "feature" [n, d] as the head sees it and "logits" [n, k]. Of a ViT that is not
      scanned also the "entropy" of its attention [n], in nats, and the "share" [n] of
      it that prompt tokens get: means over blocks, heads and the tokens that are
      pooled (the class token, or the patches).
    """
    return _in_batches(lambda x: self._prompted(params, *x), (inputs, dict(prompts)))

  def gradient(
    self,
    trainable: Mapping[str, Array],
    frozen: Mapping[str, Array],
    batch: tuple[Array, Array],
    key: Array,
    rates: Mapping[str, float],
  ) -> dict[str, np.ndarray]:
    """Returns the gradient of the loss on one batch, by name of the parameter.

    Args:
      trainable: parameters, from `trees.split`, as are `frozen`.
      frozen: the others.
      batch: (inputs [b, h, w, 3], labels [b]).
      key: of dropout.
      rates: of dropout, by name of the method's field.
    """
    return jax.device_get(self._gradient(trainable, frozen, batch, key, rates))

  def dropout_rates(self) -> dict[str, float]:
    """Returns the method's rates of dropout by name of its field."""
    prompter = self.model.prompter
    return {n: getattr(prompter, n) for n in prompter.HPARAMS if "dropout" in n}

  def _apply_plain(self, params, inputs):
    seen: dict[str, Any] = {}
    with nn.intercept_methods(self._interceptor({}, seen)):
      feature = self.model.apply(
        {"params": params}, inputs, method=lambda model, x: model.backbone(x)
      )
    return {"feature": feature, **_attention_of(seen)}

  def _make_prompts(self, params, inputs):
    seen: dict[str, Any] = {}
    with nn.intercept_methods(self._interceptor({}, seen)):
      self.model.apply({"params": params}, inputs, method="adapt")
    return seen

  def _apply_prompted(self, params, inputs, prompts):
    seen: dict[str, Any] = {}

    def apply(model, images):
      feature = model.features(images)
      return {"feature": feature, "logits": model.classify(feature)}

    with nn.intercept_methods(self._interceptor(prompts, seen)):
      outputs = self.model.apply({"params": params}, inputs, method=apply)
    return {**outputs, **_attention_of(seen)}

  def _loss(self, trainable, frozen, batch, key, rates):
    inputs, labels = batch
    variables: dict[str, Any] = {"params": trees.merge(trainable, frozen)}
    if rates:
      placed = self.model.prompter.place_hparams(rates)
      variables["hparams"] = {"prompter": placed}
    logits = self.model.apply(variables, inputs, train=True, rngs={"dropout": key})
    targets = losses.targets(labels, logits.shape[-1])
    return jnp.mean(losses.cross_entropy(logits, targets))

  def _interceptor(
    self, replaced: Mapping[str, Any], seen: dict[str, Any]
  ) -> Callable[..., Any]:
    """Returns what Flax calls in place of each module's methods.

    Args:
      replaced: prompts that stand for those that the method would make.
      seen: gets the prompts that it makes, and "attention", a pair (entropy, share) for
        each block.
    """

    def intercept(call, args, kwargs, context):
      module, is_call = context.module, context.method_name == "__call__"
      if context.method_name == "prompt_image" and module.path == ("prompter",):
        if "image" in replaced:
          return args[0] + replaced["image"]
        output = call(*args, **kwargs)
        if output.shape == args[0].shape:
          seen["image"] = output - args[0]
        return output
      if is_call and isinstance(module, SpecificPrompter):
        if "specific" not in replaced:
          seen["specific"] = call(*args, **kwargs)
        return replaced.get("specific", seen.get("specific"))
      if is_call and isinstance(module, Attention) and self._is_block(module):
        *tokens, after, change = args

        def look(q, k, v):
          q, k, v = (q, k, v) if change is None else change(q, k, v)
          seen.setdefault("attention", []).append(self._look(q, k))
          return q, k, v

        return call(*tokens, after, look, **kwargs)
      return call(*args, **kwargs)

    return intercept

  def _is_block(self, module: nn.Module) -> bool:
    """Returns whether an attention is that of a ViT's block, and can be read."""
    backbone = self.model.backbone
    is_vit = isinstance(backbone, ViT) and not backbone.scan
    return is_vit and module.path[:2] == ("backbone", "Transformer")

  def _look(self, q: Array, k: Array) -> tuple[Array, Array]:
    """Returns the entropy [n] and the share of prompts [n] of queries [n, q, h, e]."""
    vit = self.model.backbone
    size = self.model.prompter.prompted_size()
    num_tokens = vit.num_prefix + (size // vit.patch_size) ** 2
    rows = {"tok": slice(1), "gap": slice(vit.num_prefix, num_tokens)}
    q = q[:, rows.get(vit.pool, slice(num_tokens))]
    logits = jnp.einsum("bqhe,bnhe->bhqn", q * q.shape[-1] ** -0.5, k)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    probs = jnp.exp(log_probs)
    # Prompts stand last.
    shares = jnp.sum(probs[..., num_tokens:], axis=-1)
    entropies = -jnp.sum(probs * log_probs, axis=-1)
    return jnp.mean(entropies, axis=(1, 2)), jnp.mean(shares, axis=(1, 2))


def _attention_of(seen: Mapping[str, Any]) -> dict[str, Array]:
  """Returns "entropy" and "share", means over the blocks; nothing if none was seen."""
  if "attention" not in seen:
    return {}
  entropies, shares = (jnp.stack(part) for part in zip(*seen["attention"], strict=True))
  return {"entropy": jnp.mean(entropies, axis=0), "share": jnp.mean(shares, axis=0)}


def _in_batches(function: Callable[[Any], Any], arrays: Any) -> Any:
  """Returns the outputs for all examples, computed `BATCH_SIZE` at a time.

  Args:
    function: of a tree of arrays [b, ...]; returns another one.
    arrays: a tree of arrays [n, ...]; the last batch is padded.
  """
  number, outputs = len(jax.tree.leaves(arrays)[0]), []
  for start in range(0, number, BATCH_SIZE):
    rows = np.arange(start, start + BATCH_SIZE) % number
    batch = jax.tree.map(lambda array, rows=rows: array[rows], arrays)
    outputs.append(jax.device_get(function(batch)))
  return jax.tree.map(lambda *parts: np.concatenate(parts)[:number], *outputs)

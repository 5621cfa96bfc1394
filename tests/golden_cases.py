"""Recomputes what a golden file pins, with the public model.

`compute` takes any golden file of a known family, whatever its sizes, and returns what
the file holds beside its inputs, under the file's own names. What is special about a
family stands in `golden_prompts`, `golden_adapters`, `golden_tokens`, `golden_pixels`
and `golden_backbones`.
"""

from collections.abc import Mapping
import dataclasses
import json
from pathlib import Path
import tempfile
import types
from typing import Any

import golden_adapters
import golden_backbones
from golden_family import Family
import golden_pixels
import golden_prompts
import golden_tokens
import golden_torch
import jax
import jax.numpy as jnp
import numpy as np

from insvp_jax import trees
from insvp_jax.models.classifier import PromptedClassifier, create_model
from insvp_jax.models.weights.load import load_backbone

FAMILIES = {
  **golden_adapters.FAMILIES,
  **golden_backbones.FAMILIES,
  **golden_pixels.FAMILIES,
  **golden_prompts.FAMILIES,
  **golden_tokens.FAMILIES,
  **golden_torch.FAMILIES,
}


def family_of(config: Mapping[str, Any]) -> Family:
  """Returns the family of a golden file by its config.

  Raises:
    KeyError: none of the families here.
  """
  name = config.get("method", "")
  if not name and "patch_hidden" in config:
    name = "insvp_release"
  elif not name and "prompt_length" in config and "vit" in config:
    name = "vpt"
  elif not name and "patch_tokens_sample" in config:
    name = "dinov2"
  elif not name and "vit" in config and "pool" in config:
    name = "vit_torch"
  elif not name and "swin" in config:
    name = "swin"
  # "vpt_add_deep" is of the family "vpt".
  prefixes = [family for family in FAMILIES if name.startswith(family)]
  if not prefixes:
    raise KeyError(f"no family of golden files for {name!r}")
  return FAMILIES[max(prefixes, key=len)](config)


def compute(
  arrays: Mapping[str, Any], recipe: types.ModuleType, **fields: Any
) -> dict[str, np.ndarray]:
  """Returns everything that a golden file pins, by the file's own names.

  Args:
    arrays: what the file holds: name -> array, its "config" (JSON) included.
    recipe: the module golden/recipe.py, which draws the parameters.
    **fields: of the method, beside those that the file asks for.
  """
  config = arrays["config"]
  if not isinstance(config, Mapping):
    config = json.loads(str(config))
  arrays = {**arrays, "config": config}
  family = family_of(config)
  family = dataclasses.replace(family, fields={**family.fields, **fields})
  if family.method:
    case = Case(family, arrays, recipe)
    results = case.results()
  else:
    case = types.SimpleNamespace(arrays=arrays, config=config, recipe=recipe)
    results = {}
  for extra in family.extras:
    results |= extra(case)
  return {name: np.asarray(value) for name, value in results.items()}


class Case:
  """A golden file, with the model and the parameters that it was made from.

  Attributes:
    arrays: the file's content, "config" parsed.
    config: of the file.
    recipe: the module golden/recipe.py.
    model: the classifier.
    params: its parameters, as drawn.
    images: normalised, [b, h, w, 3].
    labels: [b].
  """

  def __init__(self, family: Family, arrays: Mapping[str, Any], recipe):
    """Builds the model by `create_model` and draws its parameters."""
    self.family, self.arrays, self.recipe = family, arrays, recipe
    self.config = config = arrays["config"]
    seed, sizes = config["seed"], dict(config["vit"])
    num_classes, size = sizes.pop("num_classes"), sizes["image_size"]
    self.weights = recipe.vit(seed, num_classes=num_classes, **sizes)
    kwargs = {"num_classes": num_classes, **family.model}
    more = kwargs.pop("backbone_kwargs", {})
    self.model = create_model(
      "B/16",
      family.method,
      image_size=size,
      backbone_kwargs={k: v for k, v in sizes.items() if k != "image_size"} | more,
      method_kwargs=family.fields,
      **kwargs,
    )
    if family.images:
      self.images = jnp.asarray(family.images(recipe, config))
    else:
      shape = (config["batch"], size, size, 3)
      self.images = jnp.asarray(recipe.images(shape, seed))
    self.labels = jnp.asarray(arrays["labels"])
    # By way of a file, as a user's weights come.
    with tempfile.TemporaryDirectory() as folder:
      path = Path(folder) / "backbone.npz"
      np.savez(path, **self.weights)
      backbone = load_backbone(path, self.model)
    shapes = jax.eval_shape(self.model.init, jax.random.key(0), self.images)["params"]
    self.shapes = trees.flatten(shapes.get("prompter", {}))
    names = family.names or {name: name for name in self.shapes}
    missing = set(self.shapes) ^ set(names) - set(family.constants)
    assert not missing - set(family.constants), sorted(missing)
    self.names = names
    prompter = {ours: self._draw(ours, theirs) for ours, theirs in names.items()}
    prompter |= family.constants
    self.params = {"backbone": backbone}
    if "head" in shapes:
      head = {leaf: self.weights[f"head/{leaf}"] for leaf in ("kernel", "bias")}
      self.params["head"] = head
    if prompter:
      self.params["prompter"] = trees.unflatten(prompter)

  def file_shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of a parameter by its name in the file."""
    known = self.config.get("parameters", {})
    if name in known:
      return tuple(known[name])
    return np.shape(self.arrays[f"grad/{name}"])

  def draw(self, name: str) -> np.ndarray:
    """Returns a parameter by its name in the file."""
    if name in self.arrays:
      return np.asarray(self.arrays[name], np.float32)
    return self.recipe.draw(name, self.file_shape(name), self.config["seed"])

  def _draw(self, ours: str, theirs: Any) -> np.ndarray:
    """Returns one of our parameters; a list of names is stacked over the blocks."""
    shape = self.shapes[ours].shape
    if isinstance(theirs, str):
      return self.draw(theirs).reshape(shape).astype(self.shapes[ours].dtype)
    # A block that has no such parameter in the file.
    nothing = np.zeros(shape[1:], np.float32)
    return np.stack(
      [nothing if n is None else self.draw(n).reshape(shape[1:]) for n in theirs]
    )

  def loss(self, params: Mapping[str, Any], images: Any) -> tuple[Any, Any]:
    """Returns (loss, logits) as the file has them."""
    logits, collections = self.model.apply(
      {"params": params}, images, mutable=["reads"]
    )
    log_probs = jax.nn.log_softmax(logits)
    loss = -jnp.mean(log_probs[jnp.arange(len(self.labels)), self.labels])
    if self.family.extra_loss:
      reads = collections["reads"]["backbone"]["Transformer"]["blocks"]
      loss += self.family.extra_loss(self, params, reads)
    return loss, logits

  def results(self) -> dict[str, Any]:
    """Returns logits, loss and all gradients, by the file's names."""
    extra = self.family.trains_backbone
    trained = {k: v for k, v in self.params.items() if k != "backbone"}
    backbone = trees.flatten(self.params["backbone"])
    trained["backbone"] = {n: x for n, x in backbone.items() if n in extra}
    # Integers, such as a mapping of labels, have no gradient.
    prompter = trees.flatten(trained.get("prompter", {}))
    integers = {n: x for n, x in prompter.items() if np.asarray(x).dtype.kind == "i"}
    trained["prompter"] = {n: x for n, x in prompter.items() if n not in integers}

    # Weights are arguments: as constants they would be compiled in.
    def loss_fn(trained, backbone, images):
      whole = trees.unflatten({**backbone, **trained["backbone"]})
      prompter = trees.unflatten({**trained["prompter"], **integers})
      params = {**trained, "backbone": whole, "prompter": prompter}
      return self.loss({k: v for k, v in params.items() if v}, images)

    grad_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, logits), grads = grad_fn(trained, backbone, self.images)
    results = {"logits": logits, "loss": loss}
    for leaf, value in grads.get("head", {}).items():
      results[f"grad/head/{leaf}"] = value
    flat = grads["prompter"]
    for ours, theirs in self.names.items():
      if ours in integers:
        continue
      if isinstance(theirs, str):
        results[f"grad/{theirs}"] = flat[ours].reshape(self.file_shape(theirs))
        continue
      for i, name in enumerate(theirs):
        if name is not None:
          results[f"grad/{name}"] = flat[ours][i].reshape(self.file_shape(name))
    self.backbone_grads, self.results_of = grads["backbone"], results
    return results

  def plain_logits(self) -> Any:
    """Returns the logits of the backbone and the head alone."""
    vit = self.model.backbone
    kwargs = {"num_classes": self.model.head.num_classes, "image_size": vit.image_size}
    linear = create_model(
      "B/16", "linear", backbone_kwargs=self.backbone_kwargs(), **kwargs
    ).prompter
    model = PromptedClassifier(vit, linear, self.model.head)
    params = {k: self.params[k] for k in ("backbone", "head")}
    return jax.jit(model.apply)({"params": params}, self.images)

  def backbone_kwargs(self) -> dict[str, int]:
    """Returns the sizes of the backbone."""
    skipped = ("num_classes", "image_size")
    return {k: v for k, v in self.config["vit"].items() if k not in skipped}

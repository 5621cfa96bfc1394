"""What a run shows of its image prompts in TensorBoard: one panel per image."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from insvp_jax.data import preprocess, splits
from insvp_jax.data.splits import Split
from insvp_jax.models.classifier import PromptedClassifier

# The prompts that are images, in the order in which they are shown.
NAMES = ("patch", "global", "image")


def prompt_panels(
  model: PromptedClassifier,
  params: Mapping[str, Any],
  split: Split,
  preset: preprocess.Preset,
  number: int = 4,
) -> dict[str, np.ndarray]:
  """Returns {name: uint8 pixels [h, w, 3]}, {} where there is nothing to be drawn.

  That is of a method without image prompts, and where a backbone is split over several
  processes, of which one alone cannot compute.

  A panel holds, side by side: the image, its patch, global and fused prompt, each
  stretched to the full range around grey, and the prompted image.

  Args:
    model: the classifier.
    params: its parameters, on any number of devices and processes.
    split: evenly many of its images are shown.
    preset: how images become inputs.
    number: how many images at most.
  """
  size = model.backbone.image_size

  def draw(params: Any, stored: Any) -> tuple[Any, Any, Any]:
    inputs = preprocess.eval_preprocess(preset, stored, size)
    found = model.apply({"params": params}, inputs, method="prompts")
    prompts = {name: found[name] for name in NAMES if name in found}

    def prompt_image(bound: PromptedClassifier, inputs: Any) -> Any:
      return bound.prompter.prompt_image(inputs)

    prompted = model.apply({"params": params}, inputs, method=prompt_image)
    return inputs, prompts, prompted

  indices = np.unique(np.linspace(0, len(split) - 1, number).round().astype(int))
  local = _local(params)
  one = np.zeros((1, split.stored_size, split.stored_size, 3), np.uint8)
  if local is None or not jax.eval_shape(draw, local, one)[1]:
    return {}
  stored = splits.to_memory(split, indices).images
  inputs, prompts, prompted = jax.device_get(jax.jit(draw)(local, stored))
  std, mean = np.asarray(preset.std), np.asarray(preset.mean)
  panels = {}
  for i in range(len(indices)):
    parts = [inputs[i] * std + mean]
    for prompt in prompts.values():
      levels = prompt[i] * std
      parts.append(0.5 + levels / (2 * max(float(np.abs(levels).max()), 1e-6)))
    parts.append(prompted[i] * std + mean)
    pixels = np.clip(np.concatenate(parts, axis=1), 0, 1)
    panels[f"prompts/{i}"] = (255 * pixels).round().astype(np.uint8)
  return panels


def _local(params: Mapping[str, Any]) -> Mapping[str, Any] | None:
  """Returns the parameters as this process alone can use them, or None."""
  if all(leaf.is_fully_replicated for leaf in jax.tree.leaves(params)):
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), params)
  return params if jax.process_count() == 1 else None

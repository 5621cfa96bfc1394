"""Pictures of a run's image prompts for TensorBoard: one panel per image."""

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
  num_images: int = 4,
) -> dict[str, np.ndarray]:
  """Returns {name: uint8 pixels [h, w, 3]}.

  A panel holds, side by side: the image, its patch, global and fused prompt, each
  stretched to the full range around grey, and the prompted image.

  There are none if the method has no image prompts, or if the parameters are split over
  several processes, so that one process cannot compute by itself.

  Args:
    model: the classifier.
    params: its parameters, on any number of devices and processes.
    split: images at even distances in it are shown.
    preset: how images become inputs.
    num_images: how many at most.
  """
  size = model.input_size

  def compute(params: Any, images: Any) -> tuple[Any, Any, Any]:
    """Returns inputs, prompts by name and prompted inputs, each [b, h, w, 3]."""
    inputs = preprocess.eval_preprocess(preset, images, size)
    prompts = model.apply({"params": params}, inputs, method="prompts")
    prompts = {name: prompts[name] for name in NAMES if name in prompts}
    prompted = model.apply({"params": params}, inputs, method="prompt_image")
    return inputs, prompts, prompted

  local = _local(params)
  image = np.zeros((1, split.stored_size, split.stored_size, 3), np.uint8)
  if local is None or not jax.eval_shape(compute, local, image)[1]:
    return {}
  indices = np.linspace(0, len(split) - 1, num_images).round().astype(int)
  images = splits.to_memory(split, np.unique(indices)).images
  inputs, prompts, prompted = jax.device_get(jax.jit(compute)(local, images))
  std, mean = np.asarray(preset.std), np.asarray(preset.mean)
  panels = {}
  for i in range(len(images)):
    columns = [inputs[i] * std + mean]
    for prompt in prompts.values():
      levels = prompt[i] * std
      columns.append(0.5 + levels / (2 * max(float(np.abs(levels).max()), 1e-6)))
    columns.append(prompted[i] * std + mean)
    pixels = np.clip(np.concatenate(columns, axis=1), 0, 1)
    panels[f"prompts/{i}"] = (255 * pixels).round().astype(np.uint8)
  return panels


def _local(params: Mapping[str, Any]) -> Mapping[str, Any] | None:
  """Returns the parameters for computing on this process only; None if it cannot."""
  if all(leaf.is_fully_replicated for leaf in jax.tree.leaves(params)):
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), params)
  return params if jax.process_count() == 1 else None

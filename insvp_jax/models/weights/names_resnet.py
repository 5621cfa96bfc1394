"""ResNet's published names, torchvision's and timm's alike, and ours."""

from collections.abc import Collection, Mapping
import re
from typing import Any

import numpy as np

from insvp_jax.models.weights import torch_layout

# What is in some files, and why it is not read.
SKIPPED = {r".*\.num_batches_tracked": "for training a BatchNorm"}
# Ours -> theirs.
_OUTSIDE = {"embedding": "conv1", "embedding_norm": "bn1", "head": "fc"}
_BLOCK = {
  **{f"conv_{i}": f"conv{i + 1}" for i in range(3)},
  **{f"norm_{i}": f"bn{i + 1}" for i in range(3)},
  "shortcut": "downsample.0",
  "shortcut_norm": "downsample.1",
}


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> bool:
  """Returns whether these are the names of a ResNet of bottleneck blocks."""
  return {"conv1.weight", "layer1.0.conv3.weight"} <= set(shapes)


def owns(names: Collection[str]) -> bool:
  """Returns whether these are the leaves of one, in our names."""
  return "stage_0/block_0/conv_0/kernel" in names


def convert(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns our flat names, with one group per block, of a published file's.

  Raises:
    ValueError: a name that no ResNet has.
  """
  outside = {theirs: ours for ours, theirs in _OUTSIDE.items()}
  block = {theirs: ours for ours, theirs in _BLOCK.items()}
  leaves = {}
  for name, array in arrays.items():
    if any(re.fullmatch(pattern, name) for pattern in SKIPPED):
      continue
    module, _, leaf = name.rpartition(".")
    leaf, array = torch_layout.renamed(leaf, array)
    match = re.fullmatch(r"layer([1-9])\.([0-9]+)\.(.+)", module)
    if module in outside:
      leaves[f"{outside[module]}/{leaf}"] = array
    elif match and match[3] in block:
      stage = int(match[1]) - 1
      leaves[f"stage_{stage}/block_{match[2]}/{block[match[3]]}/{leaf}"] = array
    else:
      raise ValueError(f"{name!r} is no array of a ResNet of bottleneck blocks.")
  return leaves


def fields(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Returns the fields of `models.resnet.ResNet` that leaves tell, in our names."""
  width = np.shape(leaves["embedding/kernel"])[-1]
  return {"width": width, "depths": torch_layout.stage_depths(leaves)}


def invert(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the published names of ours, with one group per block."""
  arrays = {}
  for name, array in leaves.items():
    module, _, leaf = name.rpartition("/")
    leaf, array = torch_layout.restored(leaf, array)
    if module in _OUTSIDE:
      arrays[f"{_OUTSIDE[module]}.{leaf}"] = array
      continue
    stage, block, inner = re.fullmatch(
      r"stage_([0-9]+)/block_([0-9]+)/(.+)", module
    ).groups()
    arrays[f"layer{int(stage) + 1}.{block}.{_BLOCK[inner]}.{leaf}"] = array
  return arrays

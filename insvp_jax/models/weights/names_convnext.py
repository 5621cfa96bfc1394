"""ConvNeXt's published names: timm's and the authors', and ours."""

from collections.abc import Collection, Mapping
import re
from typing import Any

import numpy as np

from insvp_jax.models.weights import torch_layout

# Ours -> theirs, of the modules of a block; timm's.
_BLOCK = {
  "depthwise": "conv_dw",
  "norm": "norm",
  "mlp/Dense_0": "mlp.fc1",
  "mlp/Dense_1": "mlp.fc2",
}
# The authors' names in a block -> timm's.
_AUTHORS = {"dwconv": "conv_dw", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2"}
_OUTSIDE = {
  "embedding": "stem.0",
  "embedding_norm": "stem.1",
  "norm": "head.norm",
  "head": "head.fc",
}
_DOWNSAMPLE = {"norm": "0", "reduction": "1"}


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> bool:
  """Returns whether these are a ConvNeXt's names."""
  return any(
    name in shapes
    for name in ("stages.0.blocks.0.conv_dw.weight", "stages.0.0.dwconv.weight")
  )


def _timm(name: str) -> str:
  """Returns timm's name of an array that may have the authors' name."""
  rules = (
    (r"downsample_layers\.0\.(.+)", r"stem.\1"),
    (r"downsample_layers\.([0-9]+)\.(.+)", r"stages.\1.downsample.\2"),
    (r"stages\.([0-9]+)\.([0-9]+)\.(.+)", r"stages.\1.blocks.\2.\3"),
    (r"norm\.(weight|bias)", r"head.norm.\1"),
    (r"head\.(weight|bias)", r"head.fc.\1"),
  )
  for pattern, new in rules:
    if re.fullmatch(pattern, name):
      name = re.sub(pattern, new, name)
      break
  for authors, timm in _AUTHORS.items():
    name = name.replace(f".{authors}.", f".{timm}.")
  return name


def owns(names: Collection[str]) -> bool:
  """Returns whether these are the leaves of one, in our names."""
  return "stage_0/block_0/depthwise/kernel" in names


def convert(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns our flat names, with one group per block, of a published file's.

  Raises:
    ValueError: a name that no ConvNeXt has.
  """
  outside = {theirs: ours for ours, theirs in _OUTSIDE.items()}
  block = {theirs: ours for ours, theirs in _BLOCK.items()}
  downsample = {theirs: ours for ours, theirs in _DOWNSAMPLE.items()}
  leaves = {}
  for name, array in arrays.items():
    module, _, leaf = _timm(name).rpartition(".")
    leaf, array = torch_layout.renamed(leaf, array)
    if module in outside:
      leaves[f"{outside[module]}/{leaf}"] = array
      continue
    match = re.fullmatch(
      r"stages\.([0-9]+)\.(downsample\.([01])|blocks\.([0-9]+)(\..+)?)", module
    )
    inner = match and (match[5] or "").lstrip(".")
    if match and match[3]:
      leaves[f"stage_{match[1]}/downsample/{downsample[match[3]]}/{leaf}"] = array
    elif match and leaf == "gamma":
      leaves[f"stage_{match[1]}/block_{match[4]}/gamma"] = array
    elif match and inner in block:
      leaves[f"stage_{match[1]}/block_{match[4]}/{block[inner]}/{leaf}"] = array
    else:
      raise ValueError(f"{name!r} is no array of a ConvNeXt.")
  return leaves


def fields(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Returns the fields of `models.convnext.ConvNeXt` that leaves tell, in our names."""
  patch, _, _, width = np.shape(leaves["embedding/kernel"])
  depths = torch_layout.stage_depths(leaves)
  return {"width": width, "depths": depths, "patch_size": patch}


def invert(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns timm's names of ours, with one group per block; inverts `convert`."""
  arrays = {}
  for name, array in leaves.items():
    module, _, leaf = name.rpartition("/")
    leaf, array = torch_layout.restored(leaf, array)
    if module in _OUTSIDE:
      arrays[f"{_OUTSIDE[module]}.{leaf}"] = array
      continue
    stage, part, inner = re.fullmatch(r"stage_([0-9]+)/([^/]+)/?(.*)", module).groups()
    if part == "downsample":
      theirs = f"downsample.{_DOWNSAMPLE[inner]}"
    else:
      theirs = f"blocks.{part.removeprefix('block_')}"
      theirs += f".{_BLOCK[inner]}" if inner else ""
    arrays[f"stages.{stage}.{theirs}.{leaf}"] = array
  return arrays

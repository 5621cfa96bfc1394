"""Swin's published names: timm's and Microsoft's, and ours.

They differ in where the merging of tokens stands: at the start of the stage after it in
timm, at the end of the stage before it in Microsoft's files. Both order the channels of
the four tokens alike.
"""

from collections.abc import Collection, Mapping
import math
import re
from typing import Any

import numpy as np

from insvp_jax.models.weights import torch_layout

_TABLE = "attn.relative_position_bias_table"
# Ours -> theirs, of modules whose leaves are weight and bias.
_MODULES = {
  "norm1": "norm1",
  "attention/out": "attn.proj",
  "norm2": "norm2",
  "mlp/Dense_0": "mlp.fc1",
  "mlp/Dense_1": "mlp.fc2",
}
_THEIRS = {theirs: ours for ours, theirs in _MODULES.items()}
_OUTSIDE = {
  "patch_embed.proj": "embedding",
  "patch_embed.norm": "embedding_norm",
  "norm": "norm",
  "head": "head",
  "head.fc": "head",
}
# What is in some files, and why it is not read.
SKIPPED = {r".*\.(relative_position_index|attn_mask)": "follows from the sizes"}
_BLOCK = r"layers\.([0-9]+)\.blocks\.([0-9]+)\.(.+)\.(weight|bias)"
_MERGING = r"layers\.([0-9]+)\.downsample\.(norm|reduction)"
_PROJECTIONS = ("query", "key", "value")


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> bool:
  """Returns whether these are a Swin Transformer's names."""
  return f"layers.0.blocks.0.{_TABLE}" in shapes and "patch_embed.proj.weight" in shapes


def _is_microsoft(names: Mapping[str, object]) -> bool:
  return any(name.startswith("layers.0.downsample.") for name in names)


def owns(names: Collection[str]) -> bool:
  """Returns whether these are the leaves of one, in our names."""
  return "stage_0/block_0/attention/relative_position_bias" in names


def convert(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns our flat names, with one group per block, of a published file's.

  Raises:
    ValueError: a name that no Swin Transformer has.
  """
  later = int(_is_microsoft(arrays))
  leaves: dict[str, np.ndarray] = {}
  heads = {}
  for name, array in arrays.items():
    if name.endswith(_TABLE):
      stage, block = re.findall("[0-9]+", name)
      leaves[f"stage_{stage}/block_{block}/attention/relative_position_bias"] = array
      heads[stage] = array.shape[-1]
  for name, array in arrays.items():
    if name.endswith(_TABLE) or any(re.fullmatch(p, name) for p in SKIPPED):
      continue
    module, _, leaf = name.rpartition(".")
    if module in _OUTSIDE:
      leaf, array = torch_layout.renamed(leaf, array)
      leaves[f"{_OUTSIDE[module]}/{leaf}"] = array
    elif match := re.fullmatch(_MERGING, module):
      leaf, array = torch_layout.renamed(leaf, array)
      leaves[f"stage_{int(match[1]) + later}/downsample/{match[2]}/{leaf}"] = array
    elif match := re.fullmatch(_BLOCK, name):
      prefix = f"stage_{match[1]}/block_{match[2]}"
      if match[3] == "attn.qkv":
        for part, piece in zip(_PROJECTIONS, np.split(array, 3), strict=True):
          # [h e] or [h e, d] to [h, e] or [d, h, e].
          shape = (heads[match[1]], -1)
          piece = piece.T.reshape(*piece.shape[1:], *shape)
          kind = "kernel" if leaf == "weight" else "bias"
          leaves[f"{prefix}/attention/{part}/{kind}"] = piece
        continue
      leaf, array = torch_layout.renamed(leaf, array)
      if match[3] == "attn.proj" and leaf == "kernel":
        array = array.reshape(heads[match[1]], -1, array.shape[-1])
      leaves[f"{prefix}/{_THEIRS[match[3]]}/{leaf}"] = array
    else:
      raise ValueError(f"{name!r} is no array of a Swin Transformer.")
  return leaves


def fields(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Returns the fields of `models.swin.Swin` that leaves tell, in our names."""
  depths = torch_layout.stage_depths(leaves)
  table = "stage_{}/block_0/attention/relative_position_bias"
  tables = [np.shape(leaves[table.format(i)]) for i in range(len(depths))]
  patch, _, _, width = np.shape(leaves["embedding/kernel"])
  return {
    "width": width,
    "depths": depths,
    "num_heads": tuple(shape[1] for shape in tables),
    # The last stage's grid may be smaller than a window.
    "window": (math.isqrt(tables[0][0]) + 1) // 2,
    "patch_size": patch,
  }


def invert(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns timm's names of ours, with one group per block; inverts `convert`."""
  outside = {ours: theirs for theirs, ours in _OUTSIDE.items()}  # "head.fc", timm's
  arrays: dict[str, np.ndarray] = {}
  for name, array in leaves.items():
    module, _, leaf = name.rpartition("/")
    if module in outside:
      leaf, array = torch_layout.restored(leaf, array)
      arrays[f"{outside[module]}.{leaf}"] = array
      continue
    match = re.fullmatch(r"stage_([0-9]+)/(?:block_([0-9]+)/)?(.+)", module)
    if match is None:
      raise KeyError(name)
    stage, block, module = match.groups()
    if block is None:
      leaf, array = torch_layout.restored(leaf, array)
      arrays[f"layers.{stage}.{module.replace('/', '.')}.{leaf}"] = array
      continue
    prefix = f"layers.{stage}.blocks.{block}"
    if leaf == "relative_position_bias":
      arrays[f"{prefix}.{_TABLE}"] = array
    elif module == "attention/query":
      parts = [leaves[f"{name.replace('/query/', f'/{p}/')}"] for p in _PROJECTIONS]
      width = parts[0].shape[0] if leaf == "kernel" else 1
      flat = [part.reshape(width, -1).T for part in parts]
      joined = np.concatenate(flat)
      kind = "weight" if leaf == "kernel" else "bias"
      arrays[f"{prefix}.attn.qkv.{kind}"] = joined if leaf == "kernel" else joined[:, 0]
    elif module not in ("attention/key", "attention/value"):
      if module == "attention/out" and leaf == "kernel":
        array = array.reshape(-1, array.shape[-1])
      leaf, array = torch_layout.restored(leaf, array)
      arrays[f"{prefix}.{_MODULES[module]}.{leaf}"] = array
  return arrays

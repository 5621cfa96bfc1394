"""A method folded into its backbone: the same function, as a plain backbone.

A method sees operations, not parameters (`Method.merge`). Here is which parameters an
operation has.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from insvp_jax import trees
from insvp_jax.models.classifier import PromptedClassifier
from insvp_jax.models.weights import npz

_BLOCK = "Transformer/encoderblock"
_ATTENTION = f"{_BLOCK}/MultiHeadDotProductAttention_0"
# The module of each operation; blocks are stacked.
_MODULES = {
  "embedding": "embedding",
  "norm1": f"{_BLOCK}/LayerNorm_0",
  **{name: f"{_ATTENTION}/{name}" for name in ("query", "key", "value", "out")},
  "norm2": f"{_BLOCK}/LayerNorm_1",
  "fc1": f"{_BLOCK}/MlpBlock_0/Dense_0",
  "fc2": f"{_BLOCK}/MlpBlock_0/Dense_1",
  "encoder_norm": "Transformer/encoder_norm",
}
# Of operations that several axes go into, how many; and which ones read a norm.
_INPUT_AXES = {"embedding": 3, "out": 2}
_READERS = {"norm1": ("query", "key", "value"), "norm2": ("fc1",)}


def _stacked(params_backbone: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Returns the leaves by name, on the host, with the blocks stacked."""
  flat = trees.flatten(params_backbone)
  return npz.stack({name: np.asarray(leaf) for name, leaf in flat.items()})


def _module_of(name: str, leaves: Mapping[str, Any]) -> str:
  """Returns the module of an operation; the last norm may be the feature's."""
  if name == "encoder_norm" and "fc_norm/scale" in leaves:
    return "fc_norm"
  return _MODULES[name]


def read_sites(params_backbone: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
  """Returns the backbone's operations as `Method.merge` takes them, in float64.

  Args:
    params_backbone: of either layout, scanned or not.

  Returns:
    Of each of `hooks.OPERATIONS` {"kernel" [in, out], "bias" [out]}, or {"scale" [d],
    "bias" [d]} of a norm; of those in blocks with the blocks as first axis.
  """
  leaves = _stacked(params_backbone)
  sites = {}
  for name, module in _MODULES.items():
    lead = 1 if module.startswith(_BLOCK) else 0
    axes = lead + _INPUT_AXES.get(name, 1)
    sites[name] = {}
    module = _module_of(name, leaves)
    for leaf in ("kernel", "scale", "bias"):
      if (value := leaves.get(f"{module}/{leaf}")) is None:
        continue
      ins = (int(np.prod(value.shape[lead:axes])),) if leaf == "kernel" else ()
      shape = (*value.shape[:lead], *ins, -1)
      sites[name][leaf] = value.astype(np.float64).reshape(shape)
  return sites


def write_sites(
  params_backbone: Mapping[str, Any], sites: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, Any]:
  """Returns the backbone with other operations; the inverse of `read_sites`.

  A norm may have a "kernel" [l, d, d] in place of its "scale". It goes into the
  operations that read the norm, whose own scale is 1 and bias 0 then.

  Args:
    params_backbone: the backbone that `sites` were read from: names, shapes, types.
    sites: as from `read_sites`.
  """
  sites = dict(sites)
  for norm, readers in _READERS.items():
    if "kernel" not in sites[norm]:
      continue
    kernel, bias = sites[norm]["kernel"], sites[norm]["bias"]
    sites[norm] = {"scale": np.ones_like(bias), "bias": np.zeros_like(bias)}
    for name in readers:
      sites[name] = {
        "kernel": kernel @ sites[name]["kernel"],
        "bias": sites[name]["bias"] + (bias[:, None] @ sites[name]["kernel"])[:, 0],
      }
  leaves = _stacked(params_backbone)
  for name, module in _MODULES.items():
    module = _module_of(name, leaves)
    for leaf, value in sites[name].items():
      old = leaves[f"{module}/{leaf}"]
      leaves[f"{module}/{leaf}"] = value.reshape(old.shape).astype(old.dtype)
  names = trees.flatten(params_backbone)
  if not names.keys() <= leaves.keys():
    leaves = npz.unroll(leaves)
  return trees.unflatten({name: leaves[name] for name in names})


def merge(model: PromptedClassifier, params: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the parameters of a plain backbone that computes what the model does.

  Args:
    model: the classifier.
    params: {"backbone", "prompter", "head"}.

  Raises:
    ValueError: the method cannot be folded into a backbone.
  """
  prompter = jax.tree.map(
    lambda leaf: np.asarray(leaf, np.float64), params.get("prompter", {})
  )
  backbone = params["backbone"]
  return write_sites(backbone, model.prompter.merge(prompter, read_sites(backbone)))

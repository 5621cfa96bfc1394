"""The names that others give to the parameters of a Vision Transformer, as tables.

A table has their name on the left and ours on the right. "{i}" is a block; "*" stands
for "weight" and "bias" of a layer, which are our "kernel" (or, of a norm, "scale") and
"bias". Several names on the right: the layer is theirs joined on the outputs.

Sources: the published checkpoints of timm, DeiT, MoCo-v3, MAE, DINO, DINOv2, OpenAI's
CLIP and SigLIP, and those that Hugging Face's transformers writes.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import re
from typing import Any

import numpy as np

from insvp_jax.models.weights import npz

_BLOCK = "Transformer/encoderblock_{i}"
_ATTENTION = f"{_BLOCK}/MultiHeadDotProductAttention_0"
_MLP = f"{_BLOCK}/MlpBlock_0"
_MAP = "MAPHead_0"
_MAP_ATTENTION = f"{_MAP}/MultiHeadDotProductAttention_0"
_NORM = "Transformer/encoder_norm"


def _qkv(module: str, names: str = "query key value") -> tuple[str, ...]:
  return tuple(f"{module}/{name}" for name in names.split())


def _in_blocks(prefix: str, table: Mapping[str, Any]) -> dict[str, Any]:
  return {f"{prefix}.{{i}}.{name}": ours for name, ours in table.items()}


_TIMM = {
  "cls_token": "cls",
  "pos_embed": "pos_embedding",
  "reg_token": "registers",
  "register_tokens": "registers",
  "dist_token": "registers",
  "patch_embed.proj.*": "embedding",
  "norm_pre.*": "pre_norm",
  "norm.*": _NORM,
  "fc_norm.*": "fc_norm",
  "head.*": "head",
  "attn_pool.latent": f"{_MAP}/probe",
  "attn_pool.q.*": f"{_MAP_ATTENTION}/query",
  "attn_pool.kv.*": _qkv(_MAP_ATTENTION, "key value"),
  "attn_pool.proj.*": f"{_MAP_ATTENTION}/out",
  "attn_pool.norm.*": f"{_MAP}/LayerNorm_0",
  "attn_pool.mlp.fc1.*": f"{_MAP}/MlpBlock_0/Dense_0",
  "attn_pool.mlp.fc2.*": f"{_MAP}/MlpBlock_0/Dense_1",
} | _in_blocks(
  "blocks",
  {
    "norm1.*": f"{_BLOCK}/LayerNorm_0",
    "attn.qkv.*": _qkv(_ATTENTION),
    "attn.proj.*": f"{_ATTENTION}/out",
    "ls1.gamma": f"{_BLOCK}/LayerScale_0/scale",
    "norm2.*": f"{_BLOCK}/LayerNorm_1",
    "mlp.fc1.*": f"{_MLP}/Dense_0",
    "mlp.fc2.*": f"{_MLP}/Dense_1",
    "mlp.w12.*": f"{_MLP}/Dense_0",
    "mlp.w3.*": f"{_MLP}/Dense_1",
    "ls2.gamma": f"{_BLOCK}/LayerScale_1/scale",
  },
)
_HF = {
  "embeddings.cls_token": "cls",
  "embeddings.register_tokens": "registers",
  "embeddings.distillation_token": "registers",
  "embeddings.position_embeddings": "pos_embedding",
  "embeddings.patch_embeddings.projection.*": "embedding",
  "layernorm.*": _NORM,
  "classifier.*": "head",
}
_HF_ATTENTION = {
  "attention.attention.query.*": f"{_ATTENTION}/query",
  "attention.attention.key.*": f"{_ATTENTION}/key",
  "attention.attention.value.*": f"{_ATTENTION}/value",
  "attention.output.dense.*": f"{_ATTENTION}/out",
}
_HF_VIT = _HF | _in_blocks(
  "encoder.layer",
  {
    "layernorm_before.*": f"{_BLOCK}/LayerNorm_0",
    **_HF_ATTENTION,
    "layernorm_after.*": f"{_BLOCK}/LayerNorm_1",
    "intermediate.dense.*": f"{_MLP}/Dense_0",
    "output.dense.*": f"{_MLP}/Dense_1",
  },
)
_HF_DINOV2 = _HF | _in_blocks(
  "encoder.layer",
  {
    "norm1.*": f"{_BLOCK}/LayerNorm_0",
    **_HF_ATTENTION,
    "layer_scale1.lambda1": f"{_BLOCK}/LayerScale_0/scale",
    "norm2.*": f"{_BLOCK}/LayerNorm_1",
    "mlp.fc1.*": f"{_MLP}/Dense_0",
    "mlp.fc2.*": f"{_MLP}/Dense_1",
    "mlp.weights_in.*": f"{_MLP}/Dense_0",
    "mlp.weights_out.*": f"{_MLP}/Dense_1",
    "layer_scale2.lambda1": f"{_BLOCK}/LayerScale_1/scale",
  },
)
_OPENAI_CLIP = {
  "class_embedding": "cls",
  "positional_embedding": "pos_embedding",
  "conv1.*": "embedding",
  "ln_pre.*": "pre_norm",
  "ln_post.*": _NORM,
  "proj": "projection/kernel",
} | _in_blocks(
  "transformer.resblocks",
  {
    "ln_1.*": f"{_BLOCK}/LayerNorm_0",
    "attn.in_proj_*": _qkv(_ATTENTION),
    "attn.out_proj.*": f"{_ATTENTION}/out",
    "ln_2.*": f"{_BLOCK}/LayerNorm_1",
    "mlp.c_fc.*": f"{_MLP}/Dense_0",
    "mlp.c_proj.*": f"{_MLP}/Dense_1",
  },
)
_HF_TOWER = {
  "embeddings.class_embedding": "cls",
  "embeddings.position_embedding.weight": "pos_embedding",
  "embeddings.patch_embedding.*": "embedding",
  # Spelled like this in the files.
  "pre_layrnorm.*": "pre_norm",
  "post_layernorm.*": _NORM,
  "visual_projection.*": "projection",
  "head.probe": f"{_MAP}/probe",
  "head.attention.in_proj_*": _qkv(_MAP_ATTENTION),
  "head.attention.out_proj.*": f"{_MAP_ATTENTION}/out",
  "head.layernorm.*": f"{_MAP}/LayerNorm_0",
  "head.mlp.fc1.*": f"{_MAP}/MlpBlock_0/Dense_0",
  "head.mlp.fc2.*": f"{_MAP}/MlpBlock_0/Dense_1",
} | _in_blocks(
  "encoder.layers",
  {
    "layer_norm1.*": f"{_BLOCK}/LayerNorm_0",
    "self_attn.q_proj.*": f"{_ATTENTION}/query",
    "self_attn.k_proj.*": f"{_ATTENTION}/key",
    "self_attn.v_proj.*": f"{_ATTENTION}/value",
    "self_attn.out_proj.*": f"{_ATTENTION}/out",
    "layer_norm2.*": f"{_BLOCK}/LayerNorm_1",
    "mlp.fc1.*": f"{_MLP}/Dense_0",
    "mlp.fc2.*": f"{_MLP}/Dense_1",
  },
)


@dataclasses.dataclass(frozen=True)
class Layout:
  """One way of naming.

  Attributes:
    name: in words.
    table: their names -> ours.
    needs: names that tell it from other ways.
  """

  name: str
  table: Mapping[str, Any]
  needs: tuple[str, ...]


LAYOUTS = {
  "timm": Layout(
    "timm's names",
    _TIMM,
    (
      "patch_embed.proj.weight",
      "blocks.{i}.norm1.weight",
      "blocks.{i}.attn.qkv.weight",
    ),
  ),
  "hf_vit": Layout(
    "Hugging Face's names of ViT",
    _HF_VIT,
    (
      "embeddings.patch_embeddings.projection.weight",
      "encoder.layer.{i}.layernorm_before.weight",
    ),
  ),
  "hf_dinov2": Layout(
    "Hugging Face's names of DINOv2",
    _HF_DINOV2,
    (
      "embeddings.patch_embeddings.projection.weight",
      "encoder.layer.{i}.norm1.weight",
      "encoder.layer.{i}.layer_scale1.lambda1",
    ),
  ),
  "openai_clip": Layout(
    "OpenAI's names of CLIP",
    _OPENAI_CLIP,
    (
      "conv1.weight",
      "class_embedding",
      "transformer.resblocks.{i}.attn.in_proj_weight",
    ),
  ),
  "hf_tower": Layout(
    "Hugging Face's names of CLIP and SigLIP",
    _HF_TOWER,
    ("embeddings.patch_embedding.weight", "encoder.layers.{i}.self_attn.q_proj.weight"),
  ),
}
# Of a name without its prefix, why it is left out.
SKIPPED = {
  r"(embeddings\.)?mask_token": "for pre-training",
  r"decoder_(embed|pos_embed|blocks|norm|pred)\b.*": "the decoder of pre-training",
  r"pooler\.dense\..*": "a layer that only its own head reads",
  r"head_dist\..*": "the head of the distillation token",
  r"head\.(\d+|mlp\.\d+|last_layer)\..*": "the head of pre-training",
  r"embeddings\.position_ids": "a constant",
}
# These lie beside the ViT, not in it.
BESIDE = ("classifier.weight", "classifier.bias", "visual_projection.weight")
_INDEX = re.compile(r"\b(blocks|layers?|resblocks)\.(?:\d+\.)?(\d+)\.")


def generic(name: str) -> tuple[str, int]:
  """Returns (name with "{i}" for its block, the block).

  DINOv2's large models group their blocks; the group's number is left out.
  """
  match = _INDEX.search(name)
  if not match:
    return name, 0
  return f"{name[: match.start()]}{match[1]}.{{i}}.{name[match.end() :]}", int(match[2])


def layout_of(names: Iterable[str]) -> Layout | None:
  """Returns the way in which names without a prefix are given; None if unknown."""
  known = {generic(name)[0] for name in names}
  return next((x for x in LAYOUTS.values() if known.issuperset(x.needs)), None)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> bool:
  """Returns whether these are the names of a ViT, without a prefix before them."""
  return layout_of(shapes) is not None


def generic_names() -> dict[str, list[str]]:
  """Returns {way of naming: its names}, to find the one that a file is nearest to.

  What has to be there comes first.
  """
  return {
    layout.name: list(
      dict.fromkeys((*layout.needs, *(k.replace("*", "weight") for k in layout.table)))
    )
    for layout in LAYOUTS.values()
  }


def convert(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns arrays in big_vision's names and axes.

  Heads are not split, as the arrays do not tell their number: kernels of the attention
  are [d, d]. A name that is not in the table stays as it is.

  Args:
    arrays: of names without a prefix that `recognise` knows.
  """
  table, leaves = layout_of(arrays).table, {}
  for name, array in arrays.items():
    key, i = generic(name)
    if key in table:
      leaves[table[key].format(i=i)] = _tokens(table[key], array)
      continue
    stem, leaf = re.fullmatch(r"(.*?)(weight|bias)?", key).groups()
    modules = table.get(f"{stem}*") if leaf else None
    if modules is None:
      leaves[name] = array
      continue
    modules = (modules,) if isinstance(modules, str) else modules
    for module, part in zip(modules, np.split(array, len(modules)), strict=True):
      our_leaf, part = _to_ours(leaf, part)
      leaves[f"{module.format(i=i)}/{our_leaf}"] = part
  return leaves


def invert(
  leaves: Mapping[str, np.ndarray], layout: str = "timm"
) -> dict[str, np.ndarray]:
  """Returns arrays in others' names; `convert` of it gives the same values.

  Args:
    leaves: in big_vision's names with one group per block.
    layout: a key of `LAYOUTS`.

  Raises:
    ValueError: these names have no word for one of the leaves.
  """
  left, arrays = dict(leaves), {}
  depth = npz.num_blocks(leaves)
  first = f"{_BLOCK}/LayerScale_0/scale".format(i=0)
  if layout == "hf_dinov2" and first not in left:
    # These files always have it.
    ones = np.ones_like(left["embedding/bias"])
    for i in range(depth):
      for k in (0, 1):
        left[f"{_BLOCK}/LayerScale_{k}/scale".format(i=i)] = ones
  if "cls" in left and (layout != "timm" or "registers" not in left):
    # An entry for the class token, which has it already.
    entry = [np.zeros_like(left["cls"]), left["pos_embedding"]]
    left["pos_embedding"] = np.concatenate(entry, axis=1)
  if "pre_norm/scale" in left and not left["embedding/bias"].any():
    # The patches have no bias there.
    del left["embedding/bias"]
  # transformers has names of its own for the gated MLP of DINOv2.
  others = ".mlp.fc" if layout == "hf_dinov2" and _is_gated(leaves) else "\n"
  for key, modules in LAYOUTS[layout].table.items():
    if others in key:
      continue
    modules = (modules,) if isinstance(modules, str) else modules
    for i in range(depth if "{i}" in key else 1):
      theirs, ours = key.format(i=i), [module.format(i=i) for module in modules]
      if not key.endswith("*"):
        if ours[0] in left:
          arrays[theirs] = _tokens_to_theirs(key, left.pop(ours[0]))
        continue
      for leaf in ("kernel", "scale", "bias"):
        names = [f"{module}/{leaf}" for module in ours]
        if all(name in left for name in names):
          parts = [_to_theirs(name, left.pop(name)) for name in names]
          name = theirs.replace("*", "bias" if leaf == "bias" else "weight")
          arrays[name] = np.concatenate(parts)
  if left:
    raise ValueError(
      f"{LAYOUTS[layout].name} have no word for {', '.join(sorted(left)[:3])}; write "
      "an .npz, or other names."
    )
  return arrays


def hf_layout(leaves: Mapping[str, np.ndarray]) -> str:
  """Returns the key of the layout in which transformers has such a ViT."""
  if "pre_norm/scale" in leaves or f"{_MAP}/probe" in leaves or "cls" not in leaves:
    return "hf_tower"
  has_scale = f"{_BLOCK}/LayerScale_0/scale".format(i=0) in leaves
  is_dinov2 = has_scale or "registers" in leaves or _is_gated(leaves)
  return "hf_dinov2" if is_dinov2 else "hf_vit"


def _is_gated(leaves: Mapping[str, np.ndarray]) -> bool:
  mlp = _MLP.format(i=0)
  return (
    leaves[f"{mlp}/Dense_0/bias"].shape != leaves[f"{mlp}/Dense_1/kernel"].shape[:1]
  )


def _tokens(ours: str, array: np.ndarray) -> np.ndarray:
  """Returns tokens and positions with a first axis of 1."""
  if ours in ("cls", "registers", "pos_embedding") or ours.endswith("/probe"):
    return array.reshape(1, -1, array.shape[-1])
  return array


def _tokens_to_theirs(theirs: str, array: np.ndarray) -> np.ndarray:
  """Returns tokens and positions with the axes that their name has."""
  if theirs in ("embeddings.class_embedding", "class_embedding"):
    return array[0, 0]
  if theirs in ("embeddings.position_embedding.weight", "positional_embedding"):
    return array[0]
  return array


def _to_ours(leaf: str, array: np.ndarray) -> tuple[str, np.ndarray]:
  """Returns our name of a layer's leaf and its values: [out, in] becomes [in, out]."""
  if leaf == "bias":
    return leaf, array
  if array.ndim == 1:
    return "scale", array
  return "kernel", array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _to_theirs(name: str, array: np.ndarray) -> np.ndarray:
  """Returns a leaf as PyTorch's layers have it, with the heads joined."""
  module, leaf = name.split("/")[-2:]
  if module in ("query", "key", "value"):
    array = array.reshape(array.shape[0], -1) if leaf == "kernel" else array.reshape(-1)
  if module == "out" and leaf == "kernel":
    array = array.reshape(-1, array.shape[-1])
  if leaf != "kernel":
    return array
  return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def fields(leaves: Mapping[str, np.ndarray], layout: str) -> dict[str, Any]:
  """Returns the fields of `ViT` that the names of a file tell, beside its shapes.

  Args:
    leaves: from `convert`.
    layout: in words, as `formats.read` says it.
  """
  name = next((n for n, known in LAYOUTS.items() if layout.startswith(known.name)), "")
  if not name:
    return {}
  if "pre_norm/scale" in leaves:
    # OpenAI's; open_clip's later ones have the exact GELU.
    return {"gelu": "exact" if name == "timm" else "quick", "norm_eps": 1e-5}
  has_map = f"{_MAP}/probe" in leaves
  return {"gelu": "tanh" if has_map else "exact"}

"""The `.npz` files of Vision Transformers: read safely, in one set of names.

Three layouts are in use: the original release's names (`LayerNorm_2`,
`MlpBlock_3`, a position embedding with an entry for the class token), and
big_vision's with one group per block (`encoderblock_3/...`) or with all blocks
stacked on a leading axis (`encoderblock/...`). Everything here turns them into
big_vision's names with one group per block, in float32, and back.

Source: Dosovitskiy et al. 2021; names as in google-research/big_vision.
"""

from collections.abc import Mapping
import dataclasses
import os
from pathlib import Path
import re
from typing import Any
import zipfile

import jax.numpy as jnp
import numpy as np

from insvp_jax import files

# Where a file may keep the ViT: bare, in a training state, in a two-tower model,
# or in the parameter tree of this package.
PREFIXES = ("", "params/", "opt/target/", "params/img/", "img/", "backbone/")
# Every ViT has this leaf, so it tells which prefix a file has.
EMBEDDING = "embedding/kernel"
HEAD = "head/kernel"

_STACKED = "Transformer/encoderblock/"
_BLOCK = re.compile(r"Transformer/encoderblock_(\d+)/(.*)")
_OLD_MODULES = {
  "LayerNorm_2": "LayerNorm_1",
  "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
  "MlpBlock_3": "MlpBlock_0",
}
_OLD_POS_EMBEDDINGS = (
  "Transformer/posembed_input/pos_embedding",
  "Transformer/pos_embedding",
)
# An early MAP head had no module of its own.
_OLD_MAP_HEAD = re.compile(
  r"(probe|MlpBlock_0|MultiHeadDotProductAttention_0|LayerNorm_0)(/.*)?"
)
_HEADS = ("head", "pre_logits")
# More blocks than any ViT has.
_MAX_DEPTH = 1000


@dataclasses.dataclass(frozen=True)
class BackboneFile:
  """A file's backbone, in this package's names (a ViT's are big_vision's) by block.

  Attributes:
    leaves: '/'-joined name -> float32 array.
    skipped: name in the file -> why it was not read.
    layout: the file's layout, in words.
    resize: how its positions are resampled; see `positions.resample_positions`.
    architecture: a key of `formats.NAMES`.
  """

  leaves: dict[str, np.ndarray]
  skipped: dict[str, str]
  layout: str
  resize: str = "linear"
  architecture: str = "vit"


def read_vit(
  path: str | os.PathLike[str], *, shapes_only: bool = False, with_head: bool = False
) -> BackboneFile:
  """Reads the ViT in an `.npz` file of any of the three layouts.

  Args:
    path: the file.
    shapes_only: read the headers alone. The leaves are zeros then, which take no
      memory, whatever size the headers claim.
    with_head: read the head that the ViT was trained with, too; where the file has
      none, that in `<name>_head.npz` beside it.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: not an `.npz`, pickled, damaged, or no ViT in it.
  """
  path = Path(path)
  names = _member_names(path)
  prefix = _find_prefix(path, names)
  skipped, stored_names = {}, {}  # stored_names: name in the file -> without the prefix
  for name in names:
    stored_name = name.removeprefix(prefix)
    if not name.startswith(prefix):
      skipped[name] = "not a part of the ViT"
    elif stored_name.split("/")[0] in _HEADS and not (
      with_head and stored_name.startswith("head/")
    ):
      skipped[name] = "a head of its own is trained for every task"
    else:
      stored_names[name] = stored_name
  new_names = {name: _big_vision_name(old) for name, old in stored_names.items()}
  _check_unique(new_names, path)
  arrays = _read_arrays(path, list(stored_names), shapes_only)
  leaves = {new_names[name]: array for name, array in arrays.items()}
  beside = path.with_name(f"{path.stem}_head.npz")
  if with_head and HEAD not in leaves and beside.is_file():
    leaves |= _read_arrays(beside, _member_names(beside), shapes_only)
  if any(name.startswith(_STACKED) for name in leaves):
    layout = "big_vision's names, stacked blocks"
    try:
      leaves = unroll(leaves)
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from error
  elif new_names != stored_names:
    layout = "the original release's names"
  else:
    layout = "big_vision's names"
  return BackboneFile(leaves, skipped, layout)


def _member_names(path: Path) -> list[str]:
  """Returns the names of the arrays in an `.npz` file."""
  if not path.exists():
    raise FileNotFoundError(f"there is no file {path}.")
  files.check_regular(path)
  with open(path, "rb") as file:
    start = file.read(64)
  if not start.startswith(b"PK"):
    raise ValueError(
      f"{path} is not an .npz file (it starts with {start[:16]!r}), nor .safetensors, "
      "nor PyTorch's. Expected one of these; a web page or a bare pickle is refused."
    )
  try:
    with zipfile.ZipFile(path) as archive:
      members = archive.namelist()
  except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
    raise _damaged_error(path, error) from error
  others = [name for name in members if not name.endswith(".npy")]
  if others or not members:
    raise ValueError(
      f"{path} is not an .npz file of arrays: it holds {others[:1] or 'nothing'}. "
      "A PyTorch checkpoint is a pickle inside a zip and is refused; convert it to "
      "named arrays with numpy.savez first."
    )
  return [name.removesuffix(".npy") for name in members]


def _find_prefix(path: Path, names: list[str]) -> str:
  """Returns the one of `PREFIXES` below which the file keeps the ViT."""
  for prefix in PREFIXES:
    if prefix + EMBEDDING in names:
      return prefix
  raise ValueError(
    f"{path} holds no ViT: none of its {len(names)} arrays is named {EMBEDDING!r} "
    f"(also looked for below {', '.join(p for p in PREFIXES if p)}). It starts with: "
    f"{', '.join(names[:3])}."
  )


def _big_vision_name(name: str) -> str:
  """Returns big_vision's name of a leaf that may have an older one."""
  if name in _OLD_POS_EMBEDDINGS:
    return "pos_embedding"
  if _OLD_MAP_HEAD.fullmatch(name):
    return f"MAPHead_0/{name}"
  if name.startswith("Transformer/encoderblock"):
    return "/".join(_OLD_MODULES.get(part, part) for part in name.split("/"))
  return name


def _check_unique(new_names: dict[str, str], path: Path) -> None:
  """Checks that no two arrays of a file are the same leaf."""
  names: dict[str, str] = {}
  for name, new_name in new_names.items():
    if new_name in names:
      raise ValueError(
        f"{path} holds {new_name!r} twice, as {names[new_name]!r} and {name!r}; its "
        "layouts are mixed. Keep one of them."
      )
    names[new_name] = name


def _read_arrays(
  path: Path, names: list[str], shapes_only: bool
) -> dict[str, np.ndarray]:
  try:
    if not shapes_only:
      arrays = files.read_npz(path, names)
    else:
      headers = files.npz_headers(path)
      arrays = {
        name: np.broadcast_to(np.zeros((), headers[name].dtype), headers[name].shape)
        for name in names
      }
  except (ValueError, OSError) as error:
    raise _damaged_error(path, error) from error
  return {
    name: _to_float32(array, name, path, shapes_only) for name, array in arrays.items()
  }


def _damaged_error(path: Path, error: Exception) -> ValueError:
  return ValueError(
    f"{path} cannot be read as an .npz file ({error}). It is truncated, damaged or "
    "pickled; get it again. Nothing is ever unpickled."
  )


def _to_float32(
  array: np.ndarray, name: str, path: Path, shapes_only: bool
) -> np.ndarray:
  if array.dtype == np.dtype("V2"):
    # NumPy's file format has no name for bfloat16 and stores two raw bytes.
    array = array.view(jnp.bfloat16)
  elif not np.issubdtype(array.dtype, np.floating):
    raise ValueError(
      f"{name!r} in {path} is {array.dtype}, expected a float type or bfloat16."
    )
  if shapes_only:
    return np.broadcast_to(np.float32(0), array.shape)
  array = array.astype(np.float32, copy=False)
  if not np.isfinite(array).all():
    raise ValueError(
      f"{name!r} in {path} holds NaN or infinite values; the file is unusable."
    )
  return array


def unroll(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Splits stacked blocks: `encoderblock/x` [l, ...] -> `encoderblock_i/x` [...].

  Leaves outside the blocks, and blocks that are not stacked, are kept.

  Raises:
    ValueError: the leaves are stacks of different depths, too deep, or in both layouts.
  """
  stacked = {n: leaf for n, leaf in leaves.items() if n.startswith(_STACKED)}
  depths = {name: np.shape(leaf)[:1] for name, leaf in stacked.items()}
  if too_deep := [n for n, depth in depths.items() if depth > (_MAX_DEPTH,)]:
    shape = np.shape(leaves[too_deep[0]])
    raise ValueError(
      f"{too_deep[0]} is {shape}, expected at most {_MAX_DEPTH} blocks on its first "
      "axis."
    )
  if len(set(depths.values())) > 1 or () in depths.values():
    shapes = ", ".join(f"{name} {np.shape(leaves[name])}" for name in list(depths)[:4])
    raise ValueError(f"stacked blocks of different depths: {shapes}.")
  unrolled = {name: leaf for name, leaf in leaves.items() if name not in stacked}
  for name, leaf in stacked.items():
    name_in_block = name.removeprefix(_STACKED)
    for i, block_leaf in enumerate(leaf):
      block_name = f"Transformer/encoderblock_{i}/{name_in_block}"
      if block_name in unrolled:
        raise ValueError(
          f"both {name!r} and {block_name!r} are there; keep one of them."
        )
      unrolled[block_name] = block_leaf
  return unrolled


def stack(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Stacks blocks on a leading axis; the inverse of `unroll`.

  Raises:
    ValueError: a block lacks a leaf that another one has.
  """
  depth = num_blocks(leaves)
  stacked: dict[str, np.ndarray] = {}
  by_name: dict[str, dict[int, np.ndarray]] = {}  # name in the block -> block -> leaf
  for name, leaf in leaves.items():
    if match := _BLOCK.fullmatch(name):
      by_name.setdefault(match[2], {})[int(match[1])] = leaf
    else:
      stacked[name] = leaf
  for name, blocks in by_name.items():
    if len(blocks) != depth:
      missing = next(i for i in range(depth) if i not in blocks)
      raise ValueError(
        f"block {missing} of {depth} has no {name!r}; cannot stack them."
      )
    stacked[_STACKED + name] = np.stack([blocks[i] for i in range(depth)])
  return stacked


def num_blocks(leaves: Mapping[str, Any]) -> int:
  """Returns the number of blocks in big_vision's names with one group each."""
  matches = filter(None, map(_BLOCK.fullmatch, leaves))
  return max((int(match[1]) for match in matches), default=-1) + 1


def fields(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Returns the `ViT` fields that the names and shapes of a file's leaves tell."""
  vit_fields: dict[str, Any] = {"depth": num_blocks(leaves)}
  block = "Transformer/encoderblock_0"
  kernel = leaves.get(EMBEDDING)
  if kernel is not None and kernel.ndim == 4:
    vit_fields |= {"patch_size": kernel.shape[0], "width": kernel.shape[3]}
  query = leaves.get(f"{block}/MultiHeadDotProductAttention_0/query/kernel")
  if query is not None and query.ndim == 3:
    vit_fields["num_heads"] = query.shape[1]
  hidden = leaves.get(f"{block}/MlpBlock_0/Dense_0/kernel")
  if hidden is not None and hidden.ndim == 2:
    vit_fields["mlp_dim"] = hidden.shape[1]
  head = leaves.get(HEAD)
  if head is not None and head.ndim == 2:
    vit_fields["head_classes"] = head.shape[1]
  second = leaves.get(f"{block}/MlpBlock_0/Dense_1/kernel")
  if hidden is not None and second is not None and second.ndim == 2:
    vit_fields["mlp_dim"] = second.shape[0]
    if hidden.shape[1] == 2 * second.shape[0]:
      vit_fields["mlp"] = "swiglu"
  has_map = any(name.startswith("MAPHead_0/") for name in leaves)
  vit_fields["pool"] = "map" if has_map else "tok" if "cls" in leaves else "gap"
  registers = leaves.get("registers")
  if registers is not None and registers.ndim == 3:
    vit_fields["registers"] = registers.shape[1]
  if "pre_norm/scale" in leaves:
    vit_fields["pre_norm"] = True
  if "fc_norm/scale" in leaves:
    vit_fields |= {"fc_norm": True, "pool": "gap"}
  if "cls" in leaves and vit_fields["pool"] != "tok":
    vit_fields["class_token"] = True
  if f"{block}/LayerScale_0/scale" in leaves:
    vit_fields["layer_scale"] = True
  return vit_fields

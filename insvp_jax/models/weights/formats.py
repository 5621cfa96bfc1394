"""What is in a file of weights: whose names, below which prefix, and the leaves.

`read` takes any file of `array_files` and any names that are known: the `.npz` layouts
of `npz`, and those of the modules in `NAMES`.
"""

from collections.abc import Collection, Iterable, Mapping
import os
from pathlib import Path
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from insvp_jax import array_files
from insvp_jax.models.weights import (
  names_convnext,
  names_resnet,
  names_swin,
  names_vit,
  npz,
)
from insvp_jax.models.weights.npz import BackboneFile

# Architecture -> its module: `recognise(shapes)`, `convert(arrays)`, `invert(leaves)`.
# What else the first one has, others may have.
NAMES = {
  "vit": names_vit,
  "swin": names_swin,
  "convnext": names_convnext,
  "resnet": names_resnet,
}
# Of several models in a file the one whose prefix has the first of these words, else
# the one with none of them, else the one with the last.
_PREFERRED = ("teacher", "ema", "base_encoder", "visual", "vision_model")
_LAST = ("student", "momentum_encoder", "decoder", "text")
_HEAD = r"(head|classifier|fc|head\.fc)\.(weight|bias)"
_HEAD_REASON = "a head of its own is trained for every task"


def read(
  path: str | os.PathLike[str], *, shapes_only: bool = False, with_head: bool = False
) -> BackboneFile:
  """Reads the backbone in a file.

  Args:
    path: the file.
    shapes_only: read the headers alone, as far as the format allows. The leaves are
      zeros then.
    with_head: read the head that the backbone was trained with, too.

  Raises:
    FileNotFoundError: there is no such file, or a part of it is missing.
    ValueError: it is damaged, pickled, or holds no backbone that is known.
  """
  path = Path(path)
  if not path.exists():
    raise FileNotFoundError(f"there is no file {path}.")
  kind = array_files.kind_of(path)
  file = _open_npz(path) if kind == "npz" else None
  if kind not in ("npz", ""):
    file = array_files.open_arrays(path, kind)
  if file is None:
    return npz.read_vit(path, shapes_only=shapes_only, with_head=with_head)

  def arrays_of(names: Collection[str]) -> dict[str, np.ndarray]:
    if shapes_only:
      zero = np.float32(0)
      return {name: np.broadcast_to(zero, file.shapes[name]) for name in names}
    return {n: _to_float32(a, n, path) for n, a in file.read(names).items()}

  if architecture := _owner(file.shapes):
    names = [n for n in file.shapes if with_head or not n.startswith("head/")]
    skipped = dict.fromkeys(set(file.shapes) - set(names), _HEAD_REASON)
    text = f"this package's names of {architecture}"
    return BackboneFile(arrays_of(names), skipped, text, architecture=architecture)
  prefix, architecture = find(path, file.shapes)
  module = NAMES[architecture]
  inside, skipped = _choose(file.shapes, prefix, module, with_head)
  short_arrays = {inside[name]: x for name, x in arrays_of(list(inside)).items()}
  try:
    leaves = module.convert(short_arrays)
  except (ValueError, KeyError) as error:
    raise ValueError(f"{path}: {error}") from error
  layout = getattr(module, "layout_of", lambda names: None)(short_arrays)
  text = layout.name if layout else f"the published names of {architecture}"
  if prefix:
    text += f", below {prefix!r}"
  return BackboneFile(
    leaves, skipped, text, resize="bicubic", architecture=architecture
  )


def _owner(names: Iterable[str]) -> str:
  """Returns the architecture, but not the ViT, whose names in this package these are.

  "" for none.
  """
  names = frozenset(names)
  owners = [a for a, m in NAMES.items() if hasattr(m, "owns") and m.owns(names)]
  return owners[0] if owners else ""


def published(leaves: Mapping[str, np.ndarray], names: str) -> dict[str, np.ndarray]:
  """Returns a backbone's leaves, one group per block, in published names.

  Args:
    leaves: flat, in this package's names.
    names: "timm", or "hf", Hugging Face's.

  Raises:
    ValueError: the names have no word for one of them.
  """
  if architecture := _owner(leaves):
    if names == "hf":
      raise ValueError(
        f"a {architecture} is written in timm's names alone; leave out names='hf'."
      )
    return NAMES[architecture].invert(leaves)
  return names_vit.invert(
    leaves, names_vit.hf_layout(leaves) if names == "hf" else names
  )


def _choose(
  names: Iterable[str], prefix: str, module: Any, with_head: bool
) -> tuple[dict[str, str], dict[str, str]]:
  """Returns {name: without its prefix} of what is read, {name: why not} of the rest."""
  inside, skipped = {}, {}
  for name in names:
    short = name.removeprefix(prefix)
    beside = [b for b in getattr(module, "BESIDE", ()) if f".{name}".endswith(f".{b}")]
    if beside:
      short = beside[0]
    elif not name.startswith(prefix):
      skipped[name] = "not a part of the backbone"
      continue
    known = getattr(module, "SKIPPED", {}).items()
    reason = next((why for k, why in known if re.fullmatch(k, short)), "")
    if not with_head and re.fullmatch(_HEAD, short):
      reason = _HEAD_REASON
    if reason:
      skipped[name] = reason
    else:
      inside[name] = short
  return inside, skipped


def find(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str]:
  """Returns (prefix, architecture) of the backbone among the arrays of a file.

  Raises:
    ValueError: none is known; the message names what was found and the nearest family.
  """
  found = []
  for prefix in _prefixes(shapes):
    short = {
      n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)
    }
    found += [(prefix, name) for name, m in NAMES.items() if m.recognise(short)]
  if found:
    return min(found, key=lambda item: (_rank(item[0]), len(item[0])))
  raise ValueError(f"{path} holds no backbone that is known: {_describe(shapes)}")


def _prefixes(names: Iterable[str]) -> list[str]:
  """Returns "" and all that stands before a dot and has no number in it."""
  prefixes = {""}
  for name in names:
    parts = name.split(".")
    for i in range(1, len(parts)):
      if parts[i - 1].isdigit():
        break
      prefixes.add(".".join(parts[:i]) + ".")
  return sorted(prefixes)


def _rank(prefix: str) -> int:
  words = re.split(r"[._]", prefix) + prefix.split(".")
  for i, word in enumerate(_PREFERRED):
    if word in words:
      return i
  return 10 + max((i + 1 for i, w in enumerate(_LAST) if w in words), default=0)


def _describe(shapes: Mapping[str, tuple[int, ...]]) -> str:
  """Returns what a file of no known family holds, and which family is nearest."""
  names = {re.sub(r"\.\d+\.", ".{i}.", name) for name in shapes}
  ends = {".".join(n.split(".")[i:]) for n in names for i in range(n.count(".") + 1)}
  families = {
    family: known
    for module in NAMES.values()
    if hasattr(module, "generic_names")
    for family, known in module.generic_names().items()
  }
  listed = ", ".join(f"{n} {tuple(s)}" for n, s in list(shapes.items())[:3])
  text = f"it holds {len(shapes)} arrays" + (f", such as {listed}." if shapes else ".")
  if not families or not shapes:
    return text
  shares = {f: len(ends.intersection(known)) for f, known in families.items()}
  nearest = max(families, key=lambda f: shares[f] / len(families[f]))
  lacks = ", ".join([name for name in families[nearest] if name not in ends][:2])
  if not shares[nearest]:
    return f"{text} No name is one of a known family: {', '.join(families)}."
  return (
    f"{text} The nearest known family is {nearest}: it has {shares[nearest]} of its "
    f"{len(families[nearest])} kinds of names, but not {lacks}."
  )


def _open_npz(path: Path) -> array_files.ArrayFile | None:
  """Opens an `.npz` file with names of `NAMES`; None for one that `npz` reads."""
  try:
    file = array_files.open_arrays(path, "npz")
    if _owner(file.shapes):
      return file
    find(path, file.shapes)
  except (OSError, ValueError):
    return None
  has_embedding = any(name.endswith(npz.EMBEDDING) for name in file.shapes)
  return None if has_embedding else file


def _to_float32(array: np.ndarray, name: str, path: Path) -> np.ndarray:
  is_float = np.issubdtype(array.dtype, np.floating) or array.dtype == jnp.bfloat16
  if not is_float:
    raise ValueError(f"{name!r} in {path} is {array.dtype}, expected a float type.")
  array = np.asarray(array, np.float32)
  if not np.isfinite(array).all():
    raise ValueError(
      f"{name!r} in {path} holds NaN or infinite values; the file is unusable."
    )
  return array


def fields(file: BackboneFile) -> dict[str, Any]:
  """Returns the fields of a backbone that a file's names and shapes tell.

  One that is no ViT is told by "architecture", a key of `NAMES`.
  """
  if file.architecture != "vit":
    fields = NAMES[file.architecture].fields(file.leaves)
    return {"architecture": file.architecture, **fields}
  return npz.fields(file.leaves) | names_vit.fields(file.leaves, file.layout)

"""Files of named arrays, read without running anything that they hold.

`.npz`, `.safetensors`, PyTorch's `.pth`, `.pt` and `.bin` (where torch is installed),
and the index of a file in several parts. What a file is says its content, not its name.
"""

from collections.abc import Callable, Collection, Mapping
import os
from pathlib import Path
from typing import Any, NamedTuple
import zipfile

import numpy as np

from insvp_jax import files

# The files of a repository that may hold its weights, the first one that is there.
FILES = (
  "model.safetensors",
  "model.safetensors.index.json",
  "open_clip_model.safetensors",
  "pytorch_model.bin",
  "pytorch_model.bin.index.json",
  "open_clip_pytorch_model.bin",
)
# Suffixes that a path of weights may have though there is no such file.
SUFFIXES = (
  *(".npz", ".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pth.tar"),
  ".index.json",
)
# What torch.save wrote before it wrote zip archives.
_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class ArrayFile(NamedTuple):
  """The arrays of a file.

  Attributes:
    shapes: by name.
    read: `names -> {name: array}`.
  """

  shapes: dict[str, tuple[int, ...]]
  read: Callable[[Collection[str]], dict[str, np.ndarray]]


def kind_of(path: str | os.PathLike[str]) -> str:
  """Returns "npz", "safetensors", "torch" or "index"; "" for any other file.

  Raises:
    OSError, ValueError: there is no such file.
  """
  files.check_regular(path)
  with open(path, "rb") as file:
    start = file.read(64)
  if start.startswith(_OLD_TORCH):
    return "torch"
  if start.startswith(b"PK"):
    return "torch" if _is_torch_zip(path) else "npz"
  # The length of the header, and the header: a JSON object.
  if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**40:
    return "safetensors"
  return "index" if start.lstrip().startswith(b"{") else ""


def _is_torch_zip(path: str | os.PathLike[str]) -> bool:
  try:
    with zipfile.ZipFile(path) as archive:
      return any(name.endswith("data.pkl") for name in archive.namelist())
  except Exception:
    # Damaged lists of members make zipfile stumble in many ways. Of a file that was cut
    # off that list is gone, not the first member.
    with open(path, "rb") as file:
      return b"data.pkl" in file.read(4096)


def open_arrays(path: Path, kind: str) -> ArrayFile:
  """Opens a file whose arrays are read by name.

  Args:
    path: the file.
    kind: from `kind_of`.

  Raises:
    ValueError: it is of no kind that is read, is damaged, holds more than arrays, or
      needs torch.
    FileNotFoundError: a part of it is missing.
  """
  if not kind:
    raise ValueError(
      f"{path} is none of .npz, .safetensors, a PyTorch file, or an index of parts. If "
      "it was downloaded, delete it: what came was something else."
    )
  return {
    "npz": _open_npz,
    "safetensors": _open_safetensors,
    "torch": _open_torch,
    "index": _open_index,
  }[kind](path)


def parts_of(path: Path) -> list[Path]:
  """Returns the files that a file is made of: itself, and those that it lists.

  Raises:
    ValueError: it is an index, but not a usable one.
    FileNotFoundError: one of the files is missing.
  """
  if kind_of(path) != "index":
    return [path]
  return [path, *sorted(set(_weight_map(path).values()))]


def index_files(path: Path) -> set[str]:
  """Returns the names of the files that an index lists, which need not be there.

  Raises:
    ValueError: it is not an index.
  """
  return set(_listed(path).values())


def _open_npz(path: Path) -> ArrayFile:
  headers = files.npz_headers(path)
  return ArrayFile(
    {name: header.shape for name, header in headers.items()},
    lambda names: dict(files.read_npz(path, names)),
  )


def _open_safetensors(path: Path) -> ArrayFile:
  import safetensors

  def error_of(error: Exception) -> ValueError:
    return ValueError(
      f"{path} cannot be read as a .safetensors file ({error}). It is truncated or "
      "damaged; get it again."
    )

  try:
    with safetensors.safe_open(path, "np") as file:
      shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
  except (safetensors.SafetensorError, OSError) as error:
    raise error_of(error) from error

  def read(names: Collection[str]) -> dict[str, np.ndarray]:
    try:
      with safetensors.safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in names}
    # It has no one type for a format of numbers that it does not know.
    except (safetensors.SafetensorError, OSError, TypeError, AttributeError) as error:
      raise error_of(error) from error

  return ArrayFile(shapes, read)


def _open_torch(path: Path) -> ArrayFile:
  try:
    import torch
  except ImportError as error:
    raise ValueError(
      f"{path} is a PyTorch file, and torch, which reads it, is not installed: pip "
      "install 'insvp_jax[torch]', or take the .safetensors file of the same weights."
    ) from error
  import argparse
  import pickle

  try:
    # Plain containers of a training script's options; nothing of it is run.
    with torch.serialization.safe_globals([argparse.Namespace]):
      tree = torch.load(path, map_location="cpu", weights_only=True)
  except pickle.UnpicklingError as error:
    reason = next(
      (
        line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line
      ),
      str(error).splitlines()[0],
    )
    raise ValueError(
      f"{path} holds more than arrays, and is refused: what else a pickle holds could "
      f"run code ({reason.strip()}). Take the .safetensors file of the same weights, "
      "or save its state_dict alone."
    ) from error
  except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
    raise ValueError(
      f"{path} cannot be read as a PyTorch file ({str(error).splitlines()[0]}). It is "
      "truncated or damaged; get it again."
    ) from error
  tensors = _flatten(tree)

  def read(names: Collection[str]) -> dict[str, np.ndarray]:
    return {
      # NumPy knows no bfloat16 of torch's.
      name: tensors[name].detach().float().numpy()
      for name in names
    }

  return ArrayFile({n: tuple(tensor.shape) for n, tensor in tensors.items()}, read)


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
  """Returns the tensors of nested dicts, by names joined with dots."""
  if isinstance(tree, Mapping):
    flat = {}
    for key, value in tree.items():
      flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
  return {prefix: tree} if hasattr(tree, "detach") else {}


def _listed(path: Path) -> dict[str, str]:
  """Returns {name of an array: name of the file that holds it} of an index."""
  try:
    index = files.parse_json(files.read_bytes(path))
    names = dict(index["weight_map"])
    # Beside the index, nowhere else.
    no_files = ("", ".", "..")
    if any(Path(f).name != f or f in no_files or "\0" in f for f in names.values()):
      raise ValueError("it names what is no file beside it")
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"{path} is not an index of a file in parts ({type(error).__name__}: {error}); "
      'expected {"weight_map": {name: file}}.'
    ) from error
  return names


def _weight_map(path: Path) -> dict[str, Path]:
  """Returns {name of an array: the file that holds it}; all of them are there."""
  parts = {name: path.with_name(file) for name, file in _listed(path).items()}
  if missing := sorted({str(part) for part in parts.values() if not part.is_file()}):
    raise FileNotFoundError(
      f"{path} lists {len(set(parts.values()))} files, of which {len(missing)} are "
      f"missing: {missing[0]}. Put all of them into the same folder."
    )
  return parts


def _open_index(path: Path) -> ArrayFile:
  parts = _weight_map(path)
  kinds = {part: kind_of(part) for part in set(parts.values())}
  if indices := [part for part, kind in kinds.items() if kind == "index"]:
    # Of itself, perhaps.
    raise ValueError(f"{path} lists {indices[0]}, an index again; expected arrays.")
  opened = {part: open_arrays(part, kind) for part, kind in kinds.items()}
  if lost := [name for name, part in parts.items() if name not in opened[part].shapes]:
    raise ValueError(f"{path} says that {lost[0]!r} is in {parts[lost[0]]}; it is not.")

  def read(names: Collection[str]) -> dict[str, np.ndarray]:
    arrays = {}
    for part, file in opened.items():
      arrays |= file.read([name for name in names if parts[name] == part])
    return arrays

  return ArrayFile({n: opened[part].shapes[n] for n, part in parts.items()}, read)

"""Opening files of which neither kind nor size is known.

A path may lead to a pipe, which would hang, or to a device; a header of some bytes may
claim terabytes. What is claimed is compared with a limit, and with what the file holds,
before memory is taken for it.
"""

from collections.abc import Collection, Iterator, Mapping
import contextlib
import io
import json
import math
import os
from pathlib import Path
import stat
from typing import Any, NamedTuple
import zipfile

import numpy as np

# More than any JSON file or list of this package has.
MAX_TEXT_BYTES = 2**28
# How many times smaller than in memory arrays may be on disk, where they are not small:
# zeros shrink to next to nothing, but trained weights do not.
_MOST_SHRUNK, _SMALL = 200, 2**30
# NumPy itself refuses headers above 10,000 characters.
_MAX_HEADER_BYTES = 2**16
_KINDS = {
  stat.S_IFDIR: "a folder",
  stat.S_IFIFO: "a pipe (FIFO)",
  stat.S_IFSOCK: "a socket",
  stat.S_IFCHR: "a device",
  stat.S_IFBLK: "a device",
}


def is_regular(path: str | os.PathLike) -> bool:
  """Returns whether something is there that a link to it may be followed to read."""
  with contextlib.suppress(OSError, ValueError):
    return stat.S_ISREG(os.stat(path).st_mode)
  return False


def check_regular(path: str | os.PathLike, max_bytes: float | int = math.inf) -> None:
  """Checks that a path leads to a regular file of at most some size.

  Raises:
    OSError: nothing is there, or it cannot be reached.
    ValueError: it is no regular file, or larger.
  """
  status = os.stat(path)
  if not stat.S_ISREG(status.st_mode):
    kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
    raise ValueError(f"{os.fspath(path)} is {kind}, expected a file.")
  check_size(os.fspath(path), status.st_size, max_bytes)


def check_size(name: str, num_bytes: int, max_bytes: float | int) -> None:
  """Checks that a file or a member of an archive is not larger than expected.

  Raises:
    ValueError: it is.
  """
  if num_bytes > max_bytes:
    raise ValueError(
      f"{name} has {num_bytes / 2**20:.1f} MiB, expected at most "
      f"{max_bytes / 2**20:.1f} (of images: config.data.max_file_mb)."
    )


def check_claim(num_bytes: int, on_disk: int) -> None:
  """Checks that arrays do not claim far more memory than their files have bytes.

  Raises:
    ValueError: they do.
  """
  if num_bytes > max(_SMALL, _MOST_SHRUNK * on_disk):
    raise ValueError(f"its arrays claim {num_bytes} bytes, in files of {on_disk}")


def check_writable_in_place(path: str | os.PathLike) -> None:
  """Checks that to write to a path changes no file but the one of that name.

  Raises:
    ValueError: it is a link, has another name elsewhere, or is no regular file.
  """
  status = check_replaceable(path)
  if status is not None and status.st_nlink > 1:
    raise ValueError(
      f"{os.fspath(path)} has {status.st_nlink} names (hard links), and what is "
      "written to it would change under all of them. Replace it by a copy of its own, "
      "or choose another workdir."
    )


def check_replaceable(path: str | os.PathLike) -> os.stat_result | None:
  """Checks that what lies at a path, if anything, may be a file of this package.

  Returns:
    What the system knows of it; None where nothing is there.

  Raises:
    ValueError: it is a link, or no regular file.
  """
  try:
    status = os.lstat(path)
  except FileNotFoundError:
    return None
  path = os.fspath(path)
  if stat.S_ISLNK(status.st_mode):
    raise ValueError(
      f"{path} is a link to {os.readlink(path)}, and what is written to it would be "
      "written there. Remove the link, or choose another workdir."
    )
  if not stat.S_ISREG(status.st_mode):
    kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
    raise ValueError(
      f"{path} is {kind}, expected a file of this package. Move it away, or choose "
      "another workdir."
    )
  return status


def read_bytes(path: str | os.PathLike, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
  """Returns the content of a regular file of at most some size.

  Raises:
    OSError: it is missing or cannot be read.
    ValueError: it is no regular file, or larger.
  """
  check_regular(path, max_bytes)
  return Path(path).read_bytes()


def parse_json(text: str | bytes) -> Any:
  """Returns the value of a JSON text.

  Raises:
    ValueError: it is not JSON, not UTF-8, or nested too deeply.
  """
  try:
    return json.loads(text)
  except RecursionError as error:
    raise ValueError("it is nested too deeply") from error


# --- .npz files: the claims of their headers.


class NpzHeader(NamedTuple):
  """What the header of an array in an `.npz` file claims."""

  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    """Returns the bytes that the array takes in memory."""
    return math.prod(self.shape) * self.dtype.itemsize


def npz_headers(path: str | os.PathLike) -> dict[str, NpzHeader]:
  """Returns shape and type of each array of an `.npz` file, which is not read further.

  Raises:
    OSError: it is missing or cannot be read.
    ValueError: it is damaged, holds what is no array, or claims more than it holds.
  """
  with _open_npz(path) as (archive, members):
    return {name: _header(archive, info) for name, info in members.items()}


def read_npz(
  path: str | os.PathLike,
  names: Collection[str] | None = None,
  max_bytes: float | int = math.inf,
) -> Mapping[str, np.ndarray]:
  """Returns arrays of an `.npz` file, by name; nothing is unpickled.

  Args:
    path: the file.
    names: of the arrays; None for all.
    max_bytes: what they may take in memory together.

  Raises:
    OSError: it is missing or cannot be read.
    ValueError: an array is missing or damaged, or claims more than `max_bytes` or than
      the file holds.
  """
  with _open_npz(path) as (archive, members):
    names = list(members) if names is None else list(names)
    if missing := [name for name in names if name not in members]:
      raise ValueError(f"there is no array {missing[0]!r}")
    nbytes = sum(_header(archive, members[name]).nbytes for name in names)
    if nbytes > max_bytes:
      raise ValueError(f"its arrays take {nbytes} bytes, expected at most {max_bytes}")
    arrays = {}
    for name in names:
      with archive.open(members[name]) as member:
        arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
        # Reading on to the end is what checks the checksum.
        member.read(1)
    return arrays


@contextlib.contextmanager
def _open_npz(
  path: str | os.PathLike,
) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
  """Opens an `.npz` file; whatever breaks in the with block is a ValueError."""
  check_regular(path)
  try:
    with zipfile.ZipFile(path) as archive:
      members = {info.filename: info for info in archive.infolist()}
      if others := [name for name in members if not name.endswith(".npy")]:
        raise ValueError(f"its member {others[0]!r} is no array")
      claimed = sum(info.file_size for info in members.values())
      check_claim(claimed, os.stat(path).st_size)
      yield archive, {name.removesuffix(".npy"): i for name, i in members.items()}
  except OSError:
    raise
  except Exception as error:
    # zipfile, the decompressors and NumPy raise whatever they stumble over.
    reason = str(error) if isinstance(error, ValueError | zipfile.BadZipFile) else ""
    raise ValueError(reason or f"{type(error).__name__}: {error}") from error


def _header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NpzHeader:
  with archive.open(info) as member:
    # The mark, the version and the length of what follows.
    start = member.read(12)
    width = 2 if start[6:7] == b"\x01" else 4
    length = int.from_bytes(start[8 : 8 + width], "little")
    start = io.BytesIO(start + member.read(min(length, _MAX_HEADER_BYTES)))
  version = np.lib.format.read_magic(start)
  readers = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
  }
  if version not in readers:
    raise ValueError(f"{info.filename} has the unknown format {version}")
  shape, _, dtype = readers[version](start)
  header = NpzHeader(shape, dtype)
  if dtype.hasobject:
    raise ValueError(f"{info.filename} holds pickled objects")
  if any(side < 0 for side in shape):
    raise ValueError(f"{info.filename} has the shape {shape}")
  if start.tell() + header.nbytes != info.file_size:
    raise ValueError(
      f"{info.filename} claims {dtype}{list(shape)}, {header.nbytes} bytes, but holds "
      f"{info.file_size - start.tell()}"
    )
  return header

"""Reads files of a folder or of a .zip archive alike, without extracting anything.

`open_folder_or_zip` returns a `FileTree`, whose two kinds are `_Folder` and `_Zip`.
They hand out bytes; `decode` makes pixels of them.
"""

import abc
from collections.abc import Iterable, Iterator
import contextlib
import os
from pathlib import Path
import stat
from typing import Any
import zipfile

from insvp_jax import files

# The end of messages about what config.data.root should be.
EXPECTED = (
  "expected a folder or a .zip archive with train/<class>/<image>, or with "
  "<class>/<image>"
)


class FileTree(abc.ABC):
  """The files below a folder or in an archive.

  A file's name is its path relative to the root, with "/" between the parts.

  Attributes:
    path: path of the folder or archive.
    name: last part of `path`, without .zip.
  """

  path: Path
  name: str

  @abc.abstractmethod
  def entries(self) -> tuple[list[str], list[str]]:
    """Returns the names of all (files, folders) except hidden ones."""

  @abc.abstractmethod
  def read(self, name: str, max_bytes: int = files.MAX_TEXT_BYTES) -> bytes:
    """Returns a file's content; safe to call from several threads.

    Args:
      name: of the file.
      max_bytes: the most that is read, config.data.max_file_mb for images.

    Raises:
      ValueError: if the file cannot be read, is no regular file, or is larger.
    """

  @abc.abstractmethod
  def full_path(self, name: str) -> str:
    """Returns a file's path including that of the root, for messages."""

  @abc.abstractmethod
  def sizes(self, names: Iterable[str]) -> list[int]:
    """Returns the files' sizes in bytes; -1 for what is missing or no regular file."""

  @abc.abstractmethod
  def fingerprint(self, names: Iterable[str]) -> list[Any]:
    """Returns a JSON-serialisable value that changes when one of the files does."""


@contextlib.contextmanager
def open_folder_or_zip(root: str) -> Iterator[FileTree]:
  """Opens a folder or a .zip archive.

  Args:
    root: path of the folder or archive, as config.data.root has it; "~" is expanded.

  Raises:
    FileNotFoundError: if nothing is there, or it is not readable.
    ValueError: if it is a file but no zip archive.
  """
  if not root:
    raise FileNotFoundError(
      f"config.data.root is empty; {EXPECTED}: --config.data.root=path/to/images"
    )
  path = Path(root).expanduser()
  if os.path.isdir(path):
    yield _Folder(path)
    return
  if not os.path.exists(path):
    raise FileNotFoundError(f"config.data.root: no {path}; {EXPECTED}.")
  try:
    archive = zipfile.ZipFile(path)
  except zipfile.BadZipFile as error:
    raise ValueError(
      f"config.data.root: {path} is no readable zip archive ({error}); {EXPECTED}."
    ) from error
  except OSError as error:
    raise FileNotFoundError(
      f"config.data.root: cannot read {path} ({error.strerror}); {EXPECTED}."
    ) from error
  with archive:
    yield _Zip(path, archive)


def _is_hidden(name: str) -> bool:
  """Returns whether a part of the name marks files of an operating system's own."""
  return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


class _Folder(FileTree):
  """Files on disk."""

  def __init__(self, path: Path):
    self.path = path
    # Resolved, so that "." has a name.
    self.name = path.resolve().name

  def entries(self) -> tuple[list[str], list[str]]:
    files, folders, seen = [], [], set()
    for top, inner, names in os.walk(self.path, followlinks=True, onerror=self._fail):
      real = os.path.realpath(top)
      if real in seen:  # a link that leads back to a folder around it
        inner.clear()
        continue
      seen.add(real)
      # Changed in place: os.walk descends into what stays.
      inner[:] = sorted(name for name in inner if not _is_hidden(name))
      base = Path(top).relative_to(self.path)
      folders += [(base / name).as_posix() for name in inner]
      files += [(base / name).as_posix() for name in names if not _is_hidden(name)]
    return files, folders

  def _fail(self, error: OSError):
    """Raises the error of a folder that os.walk would skip in silence."""
    raise FileNotFoundError(
      f"config.data.root: cannot read the folder {error.filename} ({error.strerror})."
    ) from error

  def read(self, name: str, max_bytes: int = files.MAX_TEXT_BYTES) -> bytes:
    try:
      return files.read_bytes(self.path / name, max_bytes)
    except OSError as error:
      raise ValueError(
        f"cannot read {self.full_path(name)} ({error.strerror})."
      ) from error

  def full_path(self, name: str) -> str:
    return str(self.path / name)

  def sizes(self, names: Iterable[str]) -> list[int]:
    sizes = []
    for name in names:
      try:
        status = (self.path / name).stat()
      except OSError:
        sizes.append(-1)
      else:
        sizes.append(status.st_size if stat.S_ISREG(status.st_mode) else -1)
    return sizes

  def fingerprint(self, names: Iterable[str]) -> list[Any]:
    rows = []
    for name in names:
      try:
        status = (self.path / name).stat()
      except OSError:  # a dangling link: the error of reading it tells more
        rows.append([name])
      else:
        rows.append([name, status.st_size, status.st_mtime_ns])
    # Two folders may hold files of equal names, sizes and times.
    return [os.fspath(self.path.resolve()), rows]


def _is_folder(info: zipfile.ZipInfo) -> bool:
  """Returns whether a member of an archive is a folder, also by Windows' separator."""
  return info.filename.endswith(("/", "\\"))


class _Zip(FileTree):
  """Members of an open archive."""

  def __init__(self, path: Path, archive: zipfile.ZipFile):
    self.path = path
    self.name = path.stem
    self._archive = archive
    # Archives made on Windows may hold backslashes; zipfile replaces them on Windows
    # only.
    self._members = {
      info.filename.replace("\\", "/").strip("/"): info for info in archive.infolist()
    }

  def entries(self) -> tuple[list[str], list[str]]:
    files, folders = [], set()
    for name, info in self._members.items():
      if _is_hidden(name):
        continue
      # Many archives have no members for folders: take those that the names imply.
      parts = name.split("/")
      folders.update("/".join(parts[:i]) for i in range(1, len(parts)))
      if _is_folder(info):
        folders.add(name)
      else:
        files.append(name)
    return files, sorted(folders)

  def read(self, name: str, max_bytes: int = files.MAX_TEXT_BYTES) -> bytes:
    info = self._members[name]
    # No more than this is unpacked, whatever else the member holds.
    files.check_size(self.full_path(name), info.file_size, max_bytes)
    try:
      return self._archive.read(info)
    except NotImplementedError as error:
      raise ValueError(f"{self.full_path(name)} is damaged: {error}.") from error
    except RuntimeError as error:  # the member is encrypted
      raise ValueError(f"cannot read {self.full_path(name)}: {error}.") from error
    except Exception as error:
      # zipfile and the decompressors raise whatever they stumble over.
      reason = str(error) or type(error).__name__
      raise ValueError(f"{self.full_path(name)} is damaged: {reason}.") from error

  def full_path(self, name: str) -> str:
    return f"{self.path}/{name}"

  def sizes(self, names: Iterable[str]) -> list[int]:
    members = [self._members.get(name) for name in names]
    return [-1 if i is None or _is_folder(i) else i.file_size for i in members]

  def fingerprint(self, names: Iterable[str]) -> list[Any]:
    # The archive's own checksums: a copy or another name of it changes nothing.
    return [
      [name, self._members[name].CRC, self._members[name].file_size] for name in names
    ]

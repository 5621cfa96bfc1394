"""Reading a folder and a .zip archive through one face, without extracting."""

import abc
from collections.abc import Iterable, Iterator
import contextlib
import os
from pathlib import Path
import stat
from typing import Any
import zipfile
import zlib

EXPECTED = (
  "expected a folder or a .zip archive with train/<class>/<image>, or with "
  "<class>/<image>"
)


class Root(abc.ABC):
  """A tree of files; names are relative, '/'-joined.

  Attributes:
    path: of the folder or archive.
    name: its last part, without .zip.
  """

  path: Path
  name: str

  @abc.abstractmethod
  def entries(self) -> tuple[list[str], list[str]]:
    """Returns the names of all (files, folders), hidden ones left out."""

  @abc.abstractmethod
  def read(self, name: str) -> bytes:
    """Returns a file's content; safe to call from several threads.

    Raises:
      ValueError: it cannot be read.
    """

  @abc.abstractmethod
  def describe(self, name: str) -> str:
    """Returns how messages name a file."""

  @abc.abstractmethod
  def sizes(self, names: Iterable[str]) -> list[int]:
    """Returns the files' sizes in bytes; -1 for what is no file or not there."""

  @abc.abstractmethod
  def fingerprint(self, names: Iterable[str]) -> list[Any]:
    """Returns what changes when the content of one of the files does."""


@contextlib.contextmanager
def open_root(root: str) -> Iterator[Root]:
  """Opens a folder or .zip archive.

  Raises:
    FileNotFoundError: nothing there, or not readable.
    ValueError: a file that is no zip archive.
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


def _hidden(name: str) -> bool:
  """Says whether a part of the name is an operating system's own."""
  return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


class _Folder(Root):
  """Files on disk."""

  def __init__(self, path: Path):
    self.path = path
    self.name = path.resolve().name

  def entries(self) -> tuple[list[str], list[str]]:
    found, folders, seen = [], [], set()
    for top, inner, names in os.walk(self.path, followlinks=True, onerror=self._fail):
      real = os.path.realpath(top)
      if real in seen:  # a link that leads back
        inner.clear()
        continue
      seen.add(real)
      inner[:] = sorted(name for name in inner if not _hidden(name))
      base = Path(top).relative_to(self.path)
      folders += [(base / name).as_posix() for name in inner]
      found += [(base / name).as_posix() for name in names if not _hidden(name)]
    return found, folders

  def _fail(self, error: OSError):
    raise FileNotFoundError(
      f"config.data.root: cannot read the folder {error.filename} ({error.strerror})."
    ) from error

  def read(self, name: str) -> bytes:
    try:
      return (self.path / name).read_bytes()
    except OSError as error:
      raise ValueError(f"cannot read {self.describe(name)} ({error.strerror}).") from (
        error
      )

  def describe(self, name: str) -> str:
    return str(self.path / name)

  def sizes(self, names: Iterable[str]) -> list[int]:
    found = []
    for name in names:
      try:
        status = (self.path / name).stat()
      except OSError:
        found.append(-1)
      else:
        found.append(status.st_size if stat.S_ISREG(status.st_mode) else -1)
    return found

  def fingerprint(self, names: Iterable[str]) -> list[Any]:
    rows = []
    for name in names:
      try:
        status = (self.path / name).stat()
      except OSError:  # a dangling link: reading it tells more
        rows.append([name])
      else:
        rows.append([name, status.st_size, status.st_mtime_ns])
    return [os.fspath(self.path.resolve()), rows]


def _is_folder(info: zipfile.ZipInfo) -> bool:
  return info.filename.endswith(("/", "\\"))


class _Zip(Root):
  """Members of an open archive."""

  def __init__(self, path: Path, archive: zipfile.ZipFile):
    self.path = path
    self.name = path.stem
    self._archive = archive
    # Archives made on Windows may hold backslashes; zipfile mends only its own.
    self._members = {
      info.filename.replace("\\", "/").strip("/"): info for info in archive.infolist()
    }

  def entries(self) -> tuple[list[str], list[str]]:
    found, folders = [], set()
    for name, info in self._members.items():
      if _hidden(name):
        continue
      parts = name.split("/")
      folders.update("/".join(parts[:i]) for i in range(1, len(parts)))
      if _is_folder(info):
        folders.add(name)
      else:
        found.append(name)
    return found, sorted(folders)

  def read(self, name: str) -> bytes:
    try:
      return self._archive.read(self._members[name])
    except RuntimeError as error:  # encrypted
      raise ValueError(f"cannot read {self.describe(name)}: {error}.") from error
    except (
      zipfile.BadZipFile,
      zlib.error,
      OSError,
      EOFError,
      NotImplementedError,
    ) as error:
      raise ValueError(f"{self.describe(name)} is damaged: {error}.") from error

  def describe(self, name: str) -> str:
    return f"{self.path}/{name}"

  def sizes(self, names: Iterable[str]) -> list[int]:
    found = [self._members.get(name) for name in names]
    return [-1 if i is None or _is_folder(i) else i.file_size for i in found]

  def fingerprint(self, names: Iterable[str]) -> list[Any]:
    return [
      [name, self._members[name].CRC, self._members[name].file_size] for name in names
    ]

"""Reads files of a folder or of a .zip archive alike, without extracting anything.

`open_folder_or_zip` returns a `FileTree`, whose two kinds are `_Folder` and `_Zip`.
They hand out bytes; `image_kinds` says which files are images, and `decode` makes
pixels of them.
"""

import abc
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import errno
import os
from pathlib import Path
import re
import stat
import struct
from typing import Any
import zipfile
import zlib

from insvp_jax import files
from insvp_jax.errors import printable

# The end of messages about what config.data.root should be.
EXPECTED = (
  "expected a folder or a .zip archive with train/<class>/<image>, or with "
  "<class>/<image>"
)
# Why entries are left out, as messages word it.
HIDDEN = "hidden"
DANGLING = "behind a link that leads nowhere"
CIRCULAR = "behind a link to a folder around it"
SPECIAL = "no regular file"
ZIP_LINK = "a link in an archive"
OUTSIDE = "outside of the archive's root"
TWICE = "replaced by a later member of the same name"
TOO_DEEP = "in too many folders"
# A large member that was more than so many times smaller is no photograph.
_MAX_RATIO = 200
# A folder that links lead to in more ways than this makes a set that never ends.
_MAX_WAYS = 1000
# Folders around a member of an archive; a file system allows for not many more.
_MAX_DEPTH = 200

# Files and folders that operating systems keep beside one's own, in lower case: nobody
# misses them, so that they are left out without a word.
_SYSTEM_NAMES = {
  *(".ds_store", ".localized", ".apdisk", ".appledouble", "icon\r", "__macosx"),
  *(".spotlight-v100", ".trashes", ".fseventsd", ".temporaryitems"),
  *(".documentrevisions-v100", ".directory", ".trash", "lost+found", "@eadir"),
  *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini"),
  *("$recycle.bin", "system volume information"),
}
# AppleDouble files, which hold what others' file systems cannot, and what Windows and
# network drives note of files.
_SYSTEM_STARTS = ("._", ".trash-")
_SYSTEM_ENDS = (":zone.identifier", "@synoeastream", "@synoresource")


@dataclasses.dataclass(frozen=True)
class Entries:
  """What there is below a folder or in an archive.

  Attributes:
    files: names of all regular files, in no order, except those left out.
    folders: names of all folders, except those left out.
    left_out: names by reason; those of folders end in "/". What is an operating
      system's own is not among them.
  """

  files: Sequence[str]
  folders: Sequence[str]
  left_out: Mapping[str, Sequence[str]]


class FileTree(abc.ABC):
  """The files below a folder or in an archive.

  A file's name is its path relative to the root, with "/" between the parts.

  Attributes:
    path: path of the folder or archive.
    name: last part of `path`, without .zip, which every terminal can show.
  """

  path: Path
  name: str

  @abc.abstractmethod
  def entries(self) -> Entries:
    """Returns what there is; links are followed, except in archives.

    Raises:
      FileNotFoundError: if a folder cannot be read.
      ValueError: if links make a set that does not end.
    """

  @abc.abstractmethod
  def head(self, name: str, size: int) -> bytes | None:
    """Returns the first bytes of a file, or None if it cannot be read."""

  @abc.abstractmethod
  def read(self, name: str, max_bytes: int = files.MAX_TEXT_BYTES) -> bytes:
    """Returns a file's content; safe to call from several threads.

    Args:
      name: of the file.
      max_bytes: the most that is read, config.data.max_file_mb for images.

    Raises:
      ValueError: if the file cannot be read, is no regular file, or is larger.
    """

  def close(self) -> None:  # noqa: B027
    """Closes what is open."""

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
  """Opens a folder or a .zip archive; closes it at the end.

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
  tree = open_path(Path(root).expanduser(), "config.data.root: ", f"; {EXPECTED}")
  with contextlib.closing(tree):
    yield tree


def open_path(path: Path, setting: str = "", expected: str = "") -> FileTree:
  """Returns a folder or a .zip archive, which is open until nothing refers to it.

  Args:
    path: of the folder or archive.
    setting: the beginning of errors.
    expected: the end of errors, before a full stop.

  Raises:
    FileNotFoundError, ValueError: as `open_folder_or_zip`.
  """
  if os.path.isdir(path):
    return _Folder(path, setting)
  if not os.path.exists(path):
    raise FileNotFoundError(f"{setting}no {path}{expected}.")
  if not os.path.isfile(path):
    # Opening a pipe would wait for whoever writes into it.
    raise ValueError(f"{setting}{path} is no regular file{expected}.")
  try:
    archive = zipfile.ZipFile(path)
  except OSError as error:
    raise FileNotFoundError(
      f"{setting}cannot read {path} ({error.strerror}){expected}."
    ) from error
  except MemoryError:
    raise
  except Exception as error:
    # A damaged directory makes zipfile stumble over its numbers in many ways.
    raise ValueError(
      f"{setting}{path} is no readable zip archive ({error}){expected}."
    ) from error
  return _Zip(path, archive)


def _is_system(part: str) -> bool:
  """Returns whether a part of a name marks files of an operating system's own."""
  part = part.lower()
  return (
    part in _SYSTEM_NAMES
    or part.startswith(_SYSTEM_STARTS)
    or part.endswith(_SYSTEM_ENDS)
  )


@dataclasses.dataclass(eq=False)
class _Around:
  """A folder on the way from the root to what is being listed.

  Attributes:
    path: of the folder.
    outer: the folder around it; None for the root.
    linked: whether a link is on the way.
  """

  path: str
  outer: "_Around | None"
  linked: bool
  _identity: tuple[int, int] | None = None

  @property
  def identity(self) -> tuple[int, int]:
    """Returns what two paths to one folder share; asked for only below links."""
    if self._identity is None:
      status = os.stat(self.path)
      self._identity = (status.st_dev, status.st_ino)
    return self._identity

  def is_around_itself(self) -> bool:
    """Returns whether this folder is one of those around it."""
    outer = self.outer
    while outer is not None:
      if outer.identity == self.identity:
        return True
      outer = outer.outer
    return False


class _Folder(FileTree):
  """Files on disk."""

  def __init__(self, path: Path, setting: str):
    self.path = path
    # Resolved, so that "." has a name.
    self.name = printable(path.resolve().name)
    self._setting = setting

  def entries(self) -> Entries:
    files: list[str] = []
    folders: list[str] = []
    left_out: dict[str, list[str]] = {}
    ways: Counter[tuple[int, int]] = Counter()
    todo = [("", _Around(os.fspath(self.path), None, False))]
    while todo:
      prefix, folder = todo.pop()
      for entry in self._scan(folder.path):
        name = prefix + entry.name
        if _is_system(entry.name):
          continue
        kind = self._kind(entry)
        if entry.name.startswith("."):
          kind, name = HIDDEN, name + "/" * (kind == "folder")
        if kind == "file":
          files.append(name)
        elif kind == "folder":
          linked = folder.linked or entry.is_symlink()
          inner = _Around(entry.path, folder, linked)
          # Only links lead back, so that other folders cost nothing.
          if linked and inner.is_around_itself():
            left_out.setdefault(CIRCULAR, []).append(f"{name}/")
            continue
          if linked:
            self._count_way(ways, inner)
          folders.append(name)
          todo.append((f"{name}/", inner))
        else:
          left_out.setdefault(kind, []).append(name)
    return Entries(files, folders, left_out)

  def _scan(self, path: str) -> list[os.DirEntry[str]]:
    """Returns what lies in a folder."""
    try:
      with os.scandir(path) as entries:
        return list(entries)
    except OSError as error:
      raise FileNotFoundError(
        f"{self._setting}cannot read the folder {path} ({error.strerror})."
      ) from error

  def _kind(self, entry: os.DirEntry[str]) -> str:
    """Returns "file" or "folder", also of what a link leads to; else a reason."""
    try:
      if entry.is_file():
        return "file"
      if entry.is_dir():
        return "folder"
      return SPECIAL if os.path.exists(entry.path) else DANGLING
    except OSError:  # a link to itself
      return DANGLING

  def _count_way(self, ways: Counter[tuple[int, int]], folder: _Around) -> None:
    """Counts another way to a linked folder; fails if there is no end of them."""
    ways[folder.identity] += 1
    if ways[folder.identity] > _MAX_WAYS:
      raise ValueError(
        f"{self._setting}links in {self.path} lead to "
        f"{os.path.realpath(folder.path)} in more than {_MAX_WAYS} ways; "
        f"expected a tree of folders, so remove links between them."
      )

  def _path(self, name: str) -> Path:
    """Returns a file's path; lists name files, and are not always one's own.

    Raises:
      OSError: the name leads out of the folder, or is none.
    """
    inside = within_root(name)
    if inside is None or "\0" in name:
      raise OSError(errno.ENOENT, "no name of a file in this folder")
    return self.path / inside

  def head(self, name: str, size: int) -> bytes | None:
    try:
      with open(self._path(name), "rb", buffering=0) as file:
        return file.read(size)
    except OSError:
      return None

  def read(self, name: str, max_bytes: int = files.MAX_TEXT_BYTES) -> bytes:
    try:
      return files.read_bytes(self._path(name), max_bytes)
    except OSError as error:
      raise ValueError(
        f"cannot read {self.full_path(name)} ({error.strerror})."
      ) from error

  def full_path(self, name: str) -> str:
    return printable(str(self.path / name))

  def sizes(self, names: Iterable[str]) -> list[int]:
    sizes = []
    for name in names:
      try:
        status = self._path(name).stat()
      except OSError:
        sizes.append(-1)
      else:
        sizes.append(status.st_size if stat.S_ISREG(status.st_mode) else -1)
    return sizes

  def fingerprint(self, names: Iterable[str]) -> list[Any]:
    rows = []
    for name in names:
      try:
        status = self._path(name).stat()
      except OSError:  # a dangling link: the error of reading it tells more
        rows.append([name])
      else:
        rows.append([name, status.st_size, status.st_mtime_ns])
    # Two folders may hold files of equal names, sizes and times.
    return [os.fspath(self.path.resolve()), rows]


# A character of two bytes in the encodings of East Asia, whose second one may be the
# backslash's; or else a backslash.
_PAIR_OR_BACKSLASH = re.compile(rb"([\x81-\xfe][\x40-\x7e\x80-\xfe])|\\")


def _stored_names(infos: Iterable[zipfile.ZipInfo]) -> list[str]:
  """Returns the members' names, with "/" between their parts.

  Names that are marked as UTF-8, or are UTF-8, are read so. Others are in the code page
  of whoever made the archive, which nothing tells and no guess gets right for short
  names: their bytes are kept (as Python keeps those of file names), so that different
  names stay different, and equal to those of the unpacked files.

  Archives made on Windows may separate by backslashes, where a name has no "/" at all.
  """
  names: list[str] = []
  unmarked: dict[int, bytes] = {}
  for info in infos:
    name = info.orig_filename
    if "\0" in name:
      name = name.split("\0")[0]
    if not (info.flag_bits & 0x800 or name.isascii()):
      # What zipfile took for the characters of code page 437, one for each byte.
      raw = name.encode("cp437")
      name = _unicode_name(info) or raw.decode("utf-8", "surrogateescape")
      if b"/" not in raw and re.search("[\udc80-\udcff]", name):
        unmarked[len(names)] = raw
    names.append(name if "/" in name else name.replace("\\", "/"))
  halves = {i: _PAIR_OR_BACKSLASH.sub(_as_slash, raw) for i, raw in unmarked.items()}
  halves = {i: raw.decode("utf-8", "surrogateescape") for i, raw in halves.items()}
  others = [halves.get(i, name) for i, name in enumerate(names)]
  return others if others != names and _has_halves(names, others) else names


def _as_slash(match: re.Match[bytes]) -> bytes:
  """Returns a character of two bytes as it is, and "/" for a backslash."""
  return match[1] or b"/"


def _has_halves(separated: Sequence[str], paired: Sequence[str]) -> bool:
  """Returns whether backslashes after other than ASCII are halves of characters.

  In the right reading the files of a set lie equally deep, and in several folders.

  Args:
    separated: names in which all backslashes separate.
    paired: names in which those do not that may be halves.
  """
  # Nobody separates twice.
  if any("//" in name for name in separated):
    return True
  depths = [len({n.count("/") for n in names}) for names in (paired, separated)]
  folders = {name.rpartition("/")[0] for name in paired}
  return depths[0] < depths[1] or (depths[0] == depths[1] and len(folders) > 1)


def _unicode_name(info: zipfile.ZipInfo) -> str:
  """Returns the name in UTF-8 that Info-ZIP's programs add to another one; or ""."""
  extra = info.extra
  while len(extra) >= 4:
    tag, size = struct.unpack("<HH", extra[:4])
    field, extra = extra[4 : 4 + size], extra[4 + size :]
    # A version, the other name's checksum (it may have changed since), the name.
    if tag == 0x7075 and field[:1] == b"\x01" and len(field) > 5:
      checksum = zlib.crc32(info.orig_filename.encode("cp437"))
      if int.from_bytes(field[1:5], "little") == checksum:
        return field[5:].decode("utf-8", "surrogateescape").replace("\0", "")
  return ""


def within_root(name: str) -> str | None:
  """Returns a file's name without "." and ".." in it; None if it leaves the root."""
  # Nearly all names; this is called for each.
  if "//" not in name and "/." not in name and not name.startswith(("/", ".")):
    return name.rstrip("/")
  parts: list[str] = []
  for part in name.split("/"):
    if part == "..":
      if not parts:
        return None
      parts.pop()
    elif part not in ("", "."):
      parts.append(part)
  return "/".join(parts)


class _Zip(FileTree):
  """Members of an open archive."""

  def __init__(self, path: Path, archive: zipfile.ZipFile):
    self.path = path
    self.name = printable(path.stem)
    self._archive = archive
    self._members: dict[str, zipfile.ZipInfo] = {}
    self._folders: set[str] = set()
    self._left_out: dict[str, list[str]] = {}
    infos = archive.infolist()
    for info, stored in zip(infos, _stored_names(infos), strict=True):
      name = within_root(stored)
      if name is None:
        self._left_out.setdefault(OUTSIDE, []).append(stored)
      elif len(name) > _MAX_DEPTH and name.count("/") > _MAX_DEPTH:
        self._left_out.setdefault(TOO_DEEP, []).append(name)
      elif stored.endswith("/"):
        self._folders.add(name)
      elif name:
        # As everywhere, the later one counts: so do archives update a file.
        if name in self._members:
          self._left_out.setdefault(TWICE, []).append(name)
        self._members[name] = info

  def entries(self) -> Entries:
    files: list[str] = []
    folders: set[str] = set()
    left_out = {reason: set(names) for reason, names in self._left_out.items()}
    # Many archives have no members for folders: take those that the names imply.
    ordinary = {"": True}

    def is_ordinary(folder: str) -> bool:
      if folder not in ordinary:
        around, _, part = folder.rpartition("/")
        ordinary[folder] = is_ordinary(around) and not part.startswith(".")
        if ordinary[folder] and _is_system(part):
          ordinary[folder] = False
        elif ordinary[folder]:
          folders.add(folder)
        elif ordinary[around] and not _is_system(part):
          left_out.setdefault(HIDDEN, set()).add(f"{folder}/")
      return ordinary[folder]

    for name, info in self._members.items():
      around, _, part = name.rpartition("/")
      if not is_ordinary(around) or _is_system(part):
        continue
      if part.startswith("."):
        left_out.setdefault(HIDDEN, set()).add(name)
      elif stat.S_ISLNK(info.external_attr >> 16):
        left_out.setdefault(ZIP_LINK, set()).add(name)
      else:
        files.append(name)
    for name in self._folders:
      is_ordinary(name)
    return Entries(files, sorted(folders), {r: sorted(n) for r, n in left_out.items()})

  def head(self, name: str, size: int) -> bytes | None:
    try:
      with self._archive.open(self._members[name]) as member:
        return member.read(size)
    except MemoryError:
      raise
    except Exception:  # as in `read`
      return None

  def read(self, name: str, max_bytes: int = files.MAX_TEXT_BYTES) -> bytes:
    info, path = self._members[name], self.full_path(name)
    files.check_size(path, info.file_size, max_bytes)
    if info.file_size > max(max_bytes // 4, _MAX_RATIO * info.compress_size):
      raise ValueError(
        f"{path} unpacks from {info.compress_size} to {info.file_size} bytes, which no "
        "photograph does. Store it smaller, leave it out, or raise "
        "config.data.max_file_mb."
      )
    try:
      with self._archive.open(info) as member:
        # With a size, so that no more is unpacked than the directory tells.
        data = member.read(info.file_size)
    except RuntimeError as error:  # the member is encrypted, or its method unknown
      raise ValueError(f"cannot read {path}: {error}.") from error
    except Exception as error:
      # zipfile, zlib, lzma and bz2 raise whatever damaged bytes make them stumble over.
      reason = str(error) or type(error).__name__
      raise ValueError(f"{path} is damaged: {reason}.") from error
    if len(data) != info.file_size:
      raise ValueError(
        f"{path} is damaged: it has {len(data)} bytes, not {info.file_size}."
      )
    return data

  def close(self) -> None:
    self._archive.close()

  def full_path(self, name: str) -> str:
    return printable(f"{self.path}/{name}")

  def sizes(self, names: Iterable[str]) -> list[int]:
    members = map(self._members.get, names)
    return [-1 if info is None else info.file_size for info in members]

  def fingerprint(self, names: Iterable[str]) -> list[Any]:
    # The archive's own checksums: a copy or another name of it changes nothing.
    return [
      [name, self._members[name].CRC, self._members[name].file_size] for name in names
    ]

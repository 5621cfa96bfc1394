"""Finds the file of a backbone on this machine, and downloads it if need be."""

from collections.abc import Iterator
import contextlib
import hashlib
import os
from pathlib import Path
import re
import secrets
import sys
import time
from typing import Any
import urllib.parse

import jax

from insvp_jax import paths, trees
from insvp_jax.models.weights import releases

_GCS_URL = "https://storage.googleapis.com/"
_TIMEOUT_SECONDS = 60  # without a byte
_MIB = 1 << 20
_CHUNK = 1 << 16  # bytes; of one that a broken connection cut nothing is kept
# Where there is no terminal, a line says how far it is after so much time and share.
_LINE_SECONDS, _LINE_SHARE = 10, 0.1


def resolve(
  path_or_name: str | os.PathLike[str],
  cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
  """Returns the local `.npz` file of a path, a release's name or a URL.

  An existing file is taken first, then a release in the package, then the cache;
  what is in none of them is downloaded into the cache. Several processes may want
  it at once: one downloads. A download that was interrupted is resumed the next time;
  the file is in its place only when it is complete.

  Args:
    path_or_name: a path, a key of `RELEASES`, or a gs:// or https:// URL.
    cache_dir: folder of downloads; None is `paths.cache_dir()`.

  Raises:
    ValueError: unknown name, or a file of another digest.
    FileNotFoundError: no such file, or the download failed; the message says what to
      download and where to put it.
  """
  name = os.fspath(path_or_name)
  path = Path(name).expanduser()
  if path.is_file():
    return path
  if re.match(r"(gs|https?)://", name):
    return _cached_file(name, name, None, cache_dir)
  if name in releases.RELEASES:
    release = releases.RELEASES[name]
    if not release.url:
      return _packaged_file(name)
    return _cached_file(name, release.url, release.sha256, cache_dir)
  if name and path.is_dir():
    raise FileNotFoundError(f"{name} is a directory; give the .npz file itself.")
  if name.endswith(".npz") or name.startswith(("/", "./", "../", "~")):
    raise FileNotFoundError(
      f"there is no file {path.absolute()}. Give the path of an .npz file, or the name "
      "of a release, such as 'boxed' or 'vit_b16_i21k'."
    )
  raise ValueError(
    f"{name!r} is neither a file nor the name of a backbone."
    f"{trees.did_you_mean(name, releases.RELEASES)} Known: "
    f"{', '.join(releases.RELEASES)}."
  )


def file_digest(path: str | os.PathLike[str]) -> str:
  """Returns the sha256 of a file's bytes, in hex."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
  """Yields a new path in the same folder that becomes `path` on success.

  Readers see the old file or the whole new one, never a part. On any error, and
  on Ctrl-C, the new file is removed and `path` is as it was.
  """
  temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
  try:
    yield temporary
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def _packaged_file(name: str) -> Path:
  path = releases.ASSETS / f"{name}.npz"
  if not path.is_file():
    raise FileNotFoundError(releases.missing_asset_message(name, path))
  sha256 = releases.read_description(name).get("sha256")
  _check_digest(path, sha256, hint="Install the package anew.")
  return path


def _cached_file(
  name: str, url: str, sha256: str | None, cache_dir: str | os.PathLike[str] | None
) -> Path:
  folder = Path(cache_dir or paths.cache_dir()).expanduser()
  url, target = _https_url(url), folder.absolute() / _cache_name(url)
  if not target.is_file():
    try:
      target.parent.mkdir(parents=True, exist_ok=True)
      with _locked(target):
        # Another process may have been faster.
        if not target.is_file():
          _download(url, target, sha256)
    except OSError as error:
      # What happened, without what requests and urllib3 wrap around it.
      reason = getattr(error.args[0] if error.args else None, "reason", error)
      raise FileNotFoundError(
        f"the backbone {name!r} is not on this machine and could not be downloaded "
        f"({type(error).__name__}: {reason}). Download {url} where there is a network "
        f"and put it at {target}; the folder {folder} is set by "
        f"${paths.CACHE_VARIABLE}."
      ) from error
  _check_digest(target, sha256, hint="Delete it, and it is downloaded anew.")
  return target


def _https_url(url: str) -> str:
  """Returns the public address of a gs:// URL; others unchanged."""
  if not url.startswith("gs://"):
    return url
  return _GCS_URL + urllib.parse.quote(url.removeprefix("gs://"))


def _cache_name(url: str) -> str:
  """Returns the path of a URL's file below the cache, e.g. bucket/folder/x.npz."""
  parsed = urllib.parse.urlsplit(url.removeprefix(_GCS_URL))
  parts = f"{parsed.netloc}/{urllib.parse.unquote(parsed.path)}".split("/")
  return "/".join(part for part in parts if part not in ("", ".", ".."))


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
  """Keeps other processes from downloading the same file, and waits for one that is."""
  import filelock

  path = target.with_name(f".{target.name}.lock")
  lock = filelock.FileLock(path)
  try:
    lock.acquire(timeout=0)
  except filelock.Timeout:
    _say(f"waiting for another process that downloads {target}")
    lock.acquire()
  try:
    yield
  finally:
    path.unlink(missing_ok=True)
    lock.release()


def _download(url: str, target: Path, sha256: str | None) -> None:
  """Downloads a file, or the rest of it; what is there of it stays if that fails."""
  start = time.monotonic()
  with _Part(url, target) as part:
    try:
      part.receive()
    except _StartOver:
      part.receive()
  actual = file_digest(part.path)
  if sha256 not in (None, actual):
    part.discard()
    raise ValueError(
      f"{url} has sha256 {actual}, expected {sha256}. The download was thrown away."
    )
  os.replace(part.path, target)
  part.discard()
  seconds = time.monotonic() - start
  rate = _mib((part.size - part.resumed_at) / max(seconds, 1e-3))
  _say(f"downloaded {_mib(part.size)} in {seconds:.0f} s ({rate}/s), sha256 {actual}")


class _StartOver(Exception):
  """The server cannot go on with the part that is there."""


class _Part:
  """What is there of a file: pooch writes to it what the server sends.

  Beside it lies which version of the file it is a part of, in the server's words: it
  goes on with no other.

  Attributes:
    path: of the part.
    size: its bytes.
    resumed_at: its bytes before this download.
    total: bytes of the whole file; None while it is not known.
  """

  def __init__(self, url: str, target: Path):
    """Opens what an earlier download left, or an empty file."""
    self._url, self._target = url, target
    self.path = target.with_name(f".{target.name}.part")
    self._version_file = target.with_name(f".{target.name}.version")
    self._file = self.path.open("ab")
    self.size, self.resumed_at = self._file.tell(), 0
    self.total: int | None = None
    self._response: Any = None
    self._meter: _Meter | None = None

  def __enter__(self) -> "_Part":
    """Returns itself."""
    return self

  def __exit__(self, *error: object) -> None:
    """Closes the file; an empty one is removed."""
    self._file.close()
    if self._meter:
      self._meter.close()
    if not self.size:
      self.discard()

  def receive(self) -> None:
    """Downloads what is missing.

    Raises:
      _StartOver: the server cannot go on with this part, which is empty now.
      OSError: no connection, or it broke; the disk is full.
    """
    import pooch

    headers = {"Accept-Encoding": "identity"}
    if self.size and self._version():
      headers |= {"Range": f"bytes={self.size}-", "If-Range": self._version()}
    hooks = {"response": self._respond}
    downloader = pooch.HTTPDownloader(
      chunk_size=_CHUNK, timeout=_TIMEOUT_SECONDS, headers=headers, hooks=hooks
    )
    cause = None
    try:
      downloader(self._url, self, None)
    except OSError as error:
      # A full disk has a number; what requests raises has none.
      if self.total is None or error.errno:
        raise
      cause = error
    finally:
      # Pooch leaves it open where something fails.
      if self._response is not None:
        self._response.close()
    if cause or self.total not in (None, self.size):
      again = "; the next try goes on there" if self._version() else ""
      raise OSError(
        f"the connection broke after {self.size} of {self.total} bytes{again}"
      ) from cause

  def _respond(self, response: Any, **_: Any) -> None:
    """Makes the part fit what the server is about to send."""
    self._response = response
    status, sent = response.status_code, response.headers
    # Others are redirects, which requests follows, or errors, which pooch raises.
    if status not in ((200, 206, 416) if self.size else (200,)):
      return
    version = sent.get("ETag") or sent.get("Last-Modified") or ""
    continues = (
      status == 206
      and sent.get("Content-Range", "").startswith(f"bytes {self.size}-")
      and version in ("", self._version())
    )
    if not continues:
      self.size = 0
      self._file.truncate(0)
      self._version_file.write_text(version)
      if status != 200:
        raise _StartOver
    length = sent.get("Content-Length")
    self.resumed_at = self.size
    self.total = self.size + int(length) if length else None
    of_size = f" ({_mib(self.total)})" if self.total else ""
    resuming = f", resuming at {_mib(self.size)}" if self.size else ""
    _say(f"downloading {self._url}{of_size} to {self._target}{resuming}")
    self._meter = _Meter(self.size, self.total)

  def write(self, chunk: bytes) -> None:
    """Appends what was received."""
    self._file.write(chunk)
    self.size += len(chunk)
    if self._meter:
      self._meter.show(self.size)

  def flush(self) -> None:
    """Hands it to the operating system: a killed process leaves what it received."""
    self._file.flush()

  def discard(self) -> None:
    """Removes the part, unless it was renamed, and what lies beside it."""
    self.path.unlink(missing_ok=True)
    self._version_file.unlink(missing_ok=True)

  def _version(self) -> str:
    return self._version_file.read_text() if self._version_file.exists() else ""


class _Meter:
  """Shows how far a download is: a bar on a terminal, else a line now and then."""

  def __init__(self, size: int, total: int | None):
    """Starts with so many bytes of so many."""
    self._total, self._last = total, (time.monotonic(), size)  # the last line's
    self._bar = None
    if sys.stderr.isatty() and jax.process_index() == 0:
      from rich import console, progress

      self._bar = progress.Progress(
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(compact=True),
        console=console.Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
      )
      self._task = self._bar.add_task("", total=total, completed=size)
      self._bar.start()

  def show(self, size: int) -> None:
    """Shows the bytes that are there."""
    if self._bar:
      self._bar.update(self._task, completed=size)
      return
    now, (before, size_before) = time.monotonic(), self._last
    seconds, received, total = now - before, size - size_before, self._total or 0
    if seconds >= _LINE_SECONDS and received >= total * _LINE_SHARE:
      share = f" of {_mib(total)} ({100 * size // total}%)" if total else ""
      _say(f"  {_mib(size)}{share}, {_mib(received / max(seconds, 1e-3))}/s")
      self._last = (now, size)

  def close(self) -> None:
    """Removes the bar."""
    if self._bar:
      self._bar.stop()


def _say(line: str) -> None:
  """Prints a line; of several processes the first one does."""
  if jax.process_index() == 0:
    print(line, file=sys.stderr, flush=True)


def _mib(size: float | int) -> str:
  return f"{size / _MIB:.1f} MiB"


def _check_digest(path: Path, sha256: str | None, *, hint: str) -> None:
  if sha256 is None:
    return
  actual = file_digest(path)
  if actual != sha256:
    raise ValueError(f"{path} has sha256 {actual}, expected {sha256}. {hint}")

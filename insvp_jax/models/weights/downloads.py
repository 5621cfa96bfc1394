"""Finds the file of a backbone on this machine, and downloads it if need be."""

from collections.abc import Iterator
import contextlib
import hashlib
import os
from pathlib import Path
import re
import secrets
import socket
import sys
import time
from typing import Any
import urllib.parse
import urllib.request

import jax

from insvp_jax import array_files, paths, trees
from insvp_jax.models.weights import releases

_GCS_URL = "https://storage.googleapis.com/"
_TIMEOUT_SECONDS = 60  # without a byte
_MIB = 1 << 20
_CHUNK = 1 << 16  # bytes; of one that a broken connection cut nothing is kept
_LINE_SECONDS = 10  # from line to line where there is no terminal


def resolve(
  path_or_name: str | os.PathLike[str],
  cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
  """Returns the local file of a path, a release's name, a repository or a URL.

  A repository of Hugging Face is "timm/..." or "hf-hub:...". An existing file is
  taken first, then a release in the package, then the cache; what is in none of them
  is downloaded into the cache. Several processes may want
  it at once: one downloads. A download that was interrupted is resumed the next time;
  the file is in its place only when it is complete.

  Args:
    path_or_name: a path, also of a folder as Hugging Face has it, a key of `RELEASES`,
      a repository, or a gs:// or https:// URL.
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
    for inside in array_files.FILES:
      if (path / inside).is_file():
        return path / inside
    raise FileNotFoundError(
      f"{name} is a directory without one of {', '.join(array_files.FILES)}; give the "
      "file itself."
    )
  if re.match(r"timm/|hf-hub:", name):
    return _hub_file(name, cache_dir)
  if name.endswith(array_files.SUFFIXES) or name.startswith(("/", "./", "../", "~")):
    raise FileNotFoundError(
      f"there is no file {path.absolute()}. Give the path of a file of weights, or the "
      "name of a release, such as 'boxed' or 'vit_b16_i21k'."
    )
  raise ValueError(
    f"{name!r} is neither a file nor the name of a backbone."
    f"{trees.known_names(name, releases.RELEASES, 'insvp_jax.BACKBONES')}"
  )


def file_digest(path: str | os.PathLike[str]) -> str:
  """Returns the sha256 of a file's bytes, in hex; of an index with its parts."""
  digests = []
  parts = array_files.parts_of(Path(path)) if str(path).endswith(".json") else [path]
  for part in parts:
    with open(part, "rb") as file:
      digests.append(hashlib.file_digest(file, "sha256").hexdigest())
  if len(digests) == 1:
    return digests[0]
  return hashlib.sha256("".join(digests).encode()).hexdigest()


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


def _hub_file(name: str, cache_dir: str | os.PathLike[str] | None) -> Path:
  """Returns the file of weights of a repository of Hugging Face.

  What was put into the cache by hand comes first, then `huggingface_hub`'s own cache,
  then the network, by `huggingface_hub`.

  Args:
    name: "timm/..." or "hf-hub:...", and "@revision" where it is not the newest one.
    cache_dir: see `resolve`.

  Raises:
    ValueError, FileNotFoundError: see `resolve`.
  """
  repository, _, revision = name.removeprefix("hf-hub:").partition("@")
  url = f"https://huggingface.co/{repository}/resolve/{revision or 'main'}/"
  folder = Path(cache_dir or paths.cache_dir()).expanduser().absolute()
  folder = folder / _cache_name(url)
  for file in array_files.FILES:
    if (folder / file).is_file():
      return folder / file
  import huggingface_hub
  from huggingface_hub import errors

  def get(file: str, **options: Any) -> Path | None:
    """Returns a file of the repository; None where it has no such file."""
    try:
      file = huggingface_hub.hf_hub_download(
        repository, file, revision=revision or None, **options
      )
    except errors.EntryNotFoundError as error:
      # Both are subclasses: it is not there, or nobody could be asked.
      is_offline = isinstance(error, errors.LocalEntryNotFoundError)
      if is_offline and not options.get("local_files_only"):
        raise
      return None
    return Path(file)

  def find(**options: Any) -> Path | None:
    for file in array_files.FILES:
      path = get(file, **options)
      if path is not None and file.endswith(".index.json"):
        if None in [get(part, **options) for part in array_files.index_files(path)]:
          continue
      if path is not None:
        for beside in ("config.json", "preprocessor_config.json"):
          get(beside, **options)
        return path
    return None

  try:
    if path := find(local_files_only=True):
      return path
    _look_up(huggingface_hub.constants.ENDPOINT)
    if path := find():
      return path
    reason = f"it has none of {', '.join(array_files.FILES)}"
  except errors.HFValidationError as error:
    raise ValueError(f"{name!r} is no name of a repository: {error}") from error
  except (OSError, errors.HfHubHTTPError, errors.EntryNotFoundError) as error:
    cause = error.__cause__ or error
    reason = f"{type(cause).__name__}: {str(cause).strip().splitlines()[0]}"
  raise FileNotFoundError(
    f"the backbone {name!r} is not on this machine and could not be downloaded "
    f"({reason}). Download {url}{array_files.FILES[0]}, and config.json beside it, "
    f"where there is a network and put them into {folder}; the cache is set by "
    f"${paths.CACHE_VARIABLE}."
  )


def _look_up(url: str) -> None:
  """Looks a server up, so that without a network nothing is tried again and again.

  Raises:
    OSError: its name is unknown, and there is no proxy that would know it.
  """
  if not urllib.request.getproxies():
    socket.getaddrinfo(urllib.parse.urlsplit(url).hostname, None)


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


def _download(url: str, target: Path, sha256: str | None) -> None:
  """Downloads a file, or what an interrupted download left to be received.

  Several processes may call this at once: one downloads, and the others wait.
  """
  import filelock

  target.parent.mkdir(parents=True, exist_ok=True)
  with filelock.FileLock(target.with_name(f".{target.name}.lock")):
    # Another process may have been faster.
    if target.is_file():
      return
    part, start = target.with_name(f".{target.name}.part"), time.monotonic()
    received = _receive(url, part, target)
    actual = file_digest(part)
    if sha256 not in (None, actual):
      part.unlink()
      raise ValueError(
        f"{url} has sha256 {actual}, expected {sha256}. The download was thrown away."
      )
    os.replace(part, target)
    seconds = max(time.monotonic() - start, 1e-3)
    _say(
      f"downloaded {_mib(target.stat().st_size)} in {seconds:.0f} s "
      f"({_mib(received / seconds)}/s), sha256 {actual}"
    )


def _receive(url: str, part: Path, target: Path) -> int:
  """Appends to a file what it lacks of a URL's content; returns how many bytes.

  Raises:
    OSError: no connection, or it broke, or the disk is full. What came stays.
  """
  import pooch

  with part.open("ab") as file:
    size, total, status = file.tell(), 0, 0
    responses = contextlib.ExitStack()

    def respond(response: Any, **_: Any) -> None:
      nonlocal size, total, status
      # Pooch leaves it open where something fails.
      responses.callback(response.close)
      status = response.status_code
      if status in (200, 416):
        # It sends the whole file, or has nothing to go on with.
        file.truncate(0)
        size = 0
      if status in (200, 206):
        total = size + int(response.headers.get("Content-Length", 0))
        resuming = f", resuming at {_mib(size)}" if size else ""
        _say(f"downloading {url} ({_mib(total)}) to {target}{resuming}")
        meter.start(size, total)

    meter = _Meter()
    headers = {"Accept-Encoding": "identity"}
    if size:
      headers["Range"] = f"bytes={size}-"
    downloader = pooch.HTTPDownloader(
      progressbar=meter,
      chunk_size=_CHUNK,
      timeout=_TIMEOUT_SECONDS,
      headers=headers,
      hooks={"response": respond},
    )
    try:
      downloader(url, file, None)
    except OSError as error:
      if status != 416:
        if error.errno is None and total:
          raise OSError(
            f"the connection broke after {file.tell()} of {total} bytes; the next try "
            "goes on there"
          ) from error
        raise
    finally:
      meter.close()
      responses.close()
    if status != 416:
      return file.tell() - size
  return _receive(url, part, target)


class _Meter:
  """Shows how far a download is: a bar on a terminal, else a line now and then.

  With the methods and the attribute of a progress bar that pooch calls.
  """

  def __init__(self):
    """Shows nothing yet."""
    self.total = self._size = self._shown_size = 0
    self._shown_at, self._bar = time.monotonic(), None

  def start(self, size: int, total: int) -> None:
    """Begins at so many bytes of so many."""
    self._size = self._shown_size = size
    self._all = total
    if sys.stderr.isatty() and jax.process_index() == 0:
      from rich import console, progress

      columns = (
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(compact=True),
      )
      stderr = console.Console(stderr=True)
      self._bar = progress.Progress(*columns, console=stderr, transient=True)
      self._task = self._bar.add_task("", total=total or None, completed=size)
      self._bar.start()

  def update(self, size: int) -> None:
    """Counts bytes that came."""
    self._size = min(self._size + size, self._all or self._size + size)
    if self._bar:
      self._bar.update(self._task, completed=self._size)
    elif time.monotonic() - self._shown_at >= _LINE_SECONDS:
      rate = (self._size - self._shown_size) / (time.monotonic() - self._shown_at)
      _say(f"  {_mib(self._size)} of {_mib(self._all)}, {_mib(rate)}/s")
      self._shown_at, self._shown_size = time.monotonic(), self._size

  def reset(self) -> None:
    """Does nothing: pooch counts everything again at the end."""
    self.update = lambda size: None

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

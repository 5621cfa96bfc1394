"""Finds the file of a backbone on this machine, and downloads it if need be."""

from collections.abc import Iterator, Sequence
import contextlib
import functools
import hashlib
import ipaddress
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

from insvp_jax import array_files, files, paths, trees
from insvp_jax.models.weights import releases
from insvp_jax.models.weights.releases import Release

# The largest download whose size is not published, in GiB. Not a key of a config: a
# run brings its config along.
LIMIT_VARIABLE = "INSVP_MAX_DOWNLOAD_GB"
_MAX_GIB = 5
_GCS_URL = "https://storage.googleapis.com/"
_SCHEME = "https"
_MAX_REDIRECTIONS = 5
_TIMEOUT_SECONDS = 60  # without a byte
_MIB = 1 << 20
_CHUNK = 1 << 16  # bytes; of one that a broken connection cut nothing is kept
_LINE_SECONDS = 10  # from line to line where there is no terminal


def resolve(
  path_or_name: str | os.PathLike[str],
  cache_dir: str | os.PathLike[str] | None = None,
  *,
  download: bool = True,
) -> Path:
  """Returns the local file of a path, a release's name, a repository or a URL.

  A repository of Hugging Face is "timm/..." or "hf-hub:...". An existing file is
  taken first, then a release in the package, then the cache; what is in none of them
  is downloaded into the cache. Several processes may want it at once: one downloads.
  A download that was interrupted is resumed the next time; the file is in its place
  only when it is complete and a file of weights, and a wrong one leaves nothing. Only
  https is requested. A download may be as large as a release is, others up to 5 GiB or
  $INSVP_MAX_DOWNLOAD_GB.

  Args:
    path_or_name: a path, also of a folder as Hugging Face has it, a key of `RELEASES`,
      a repository, or a gs:// or https:// URL.
    cache_dir: folder of downloads; None is `paths.cache_dir()`.
    download: whether to request what is not on this machine.

  Raises:
    ValueError: unknown name, a file of another digest, or what was sent is too large,
      no file of weights, or at no address that may be requested.
    FileNotFoundError: no such file, or the download failed; the message says what to
      download and where to put it.
  """
  name = os.fspath(path_or_name)
  path = Path(name).expanduser()
  if path.is_file():
    return path
  if re.match(r"(gs|https?)://", name):
    return _cached_file(name, Release(url=name), cache_dir, download)
  if name in releases.RELEASES:
    release = releases.RELEASES[name]
    if not release.url:
      return _packaged_file(name)
    return _cached_file(name, release, cache_dir, download)
  if name and path.is_dir():
    for inside in array_files.FILES:
      if (path / inside).is_file():
        return path / inside
    raise FileNotFoundError(
      f"{name} is a directory without one of {', '.join(array_files.FILES)}; give the "
      "file itself."
    )
  if re.match(r"timm/|hf-hub:", name):
    return _hub_file(name, cache_dir, download)
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


class _Repository:
  """A repository of Hugging Face, whose files are fetched one by one."""

  def __init__(self, name: str):
    """Takes "timm/..." or "hf-hub:...", with "@revision" where it is not the newest."""
    self.name = name
    self.id, _, revision = name.removeprefix("hf-hub:").partition("@")
    self.revision: str | None = revision or None
    self._num_bytes = 0

  @property
  def url(self) -> str:
    """The address of its files."""
    return f"https://huggingface.co/{self.id}/resolve/{self.revision or 'main'}/"

  def get(self, file: str, **options: Any) -> Path | None:
    """Returns a file; None where the repository has no such file.

    Args:
      file: its name.
      **options: of `hf_hub_download`; without any the file is downloaded, and all that
        are may not be larger than a download may.
    """
    import huggingface_hub
    from huggingface_hub import errors

    fetch = functools.partial(
      huggingface_hub.hf_hub_download, self.id, file, revision=self.revision
    )
    try:
      if not options:
        self._num_bytes += fetch(dry_run=True).file_size or 0
        _check_size(self.name, self._num_bytes, _max_bytes())
      return Path(fetch(**options))
    except errors.EntryNotFoundError as error:
      # Both are subclasses: it is not there, or nobody could be asked.
      is_offline = isinstance(error, errors.LocalEntryNotFoundError)
      if is_offline and not options.get("local_files_only"):
        raise
      return None

  def reason(self, error: Exception) -> str:
    """Returns why nothing came, in a few words.

    Raises:
      ValueError: there can be no repository of that name.
    """
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
      raise ValueError(f"{self.name!r} is no name of a repository: {error}") from error
    cause = error.__cause__ or error
    lines = str(cause).strip().splitlines() or ["nothing more is known"]
    return f"{type(cause).__name__}: {lines[0]}"


def _hub_errors() -> tuple[type[Exception], ...]:
  """Returns what `huggingface_hub` raises where nothing comes."""
  from huggingface_hub import errors

  return (
    OSError,
    errors.HFValidationError,
    errors.HfHubHTTPError,
    errors.EntryNotFoundError,
  )


def hub_folder(name: str, wanted: Sequence[str]) -> Path:
  """Returns the folder with some files of a repository of Hugging Face.

  The newest ones are asked for, or those of a revision. Without a network it is what
  `huggingface_hub` has in its cache.

  Args:
    name: "hf-hub:user/name", and "@revision" where it is not the newest one.
    wanted: names of the files; nothing else is downloaded.

  Raises:
    ValueError: no name of a repository, or the files are too large.
    FileNotFoundError: it lacks a file, or could not be reached.
  """
  import huggingface_hub

  repository, path, reason = _Repository(name), None, ""
  options: dict[str, Any] = {}
  try:
    try:
      _look_up(huggingface_hub.constants.ENDPOINT)
    except OSError as error:
      reason, options = repository.reason(error), {"local_files_only": True}
    for file in wanted:
      path = repository.get(file, **options)
      if path is None:
        reason = reason or f"it has no {file}"
        break
      # All are of one commit, whatever is pushed meanwhile.
      if re.fullmatch("[0-9a-f]{40}", path.parent.name):
        repository.revision = path.parent.name
  except _hub_errors() as error:
    path, reason = None, repository.reason(error)
  if path is not None:
    return path.parent
  raise FileNotFoundError(
    f"{name} could not be had ({reason}). Check the name and the revision, log in with "
    f"`hf auth login` if it is private, or download {' and '.join(wanted)} from "
    f"{repository.url} into a folder, and give its path."
  )


def _hub_file(
  name: str, cache_dir: str | os.PathLike[str] | None, download: bool
) -> Path:
  """Returns the file of weights of a repository of Hugging Face.

  What was put into the cache by hand comes first, then `huggingface_hub`'s own cache,
  then the network, by `huggingface_hub`.

  Args:
    name: "timm/..." or "hf-hub:...", and "@revision" where it is not the newest one.
    cache_dir, download: see `resolve`.

  Raises:
    ValueError, FileNotFoundError: see `resolve`.
  """
  repository = _Repository(name)
  folder = Path(cache_dir or paths.cache_dir()).expanduser().absolute()
  folder = folder / _cache_name(repository.url)
  for file in array_files.FILES:
    if (folder / file).is_file():
      return folder / file
  import huggingface_hub

  def find(**options: Any) -> Path | None:
    for file in array_files.FILES:
      path = repository.get(file, **options)
      if path is not None and file.endswith(".index.json"):
        parts = array_files.index_files(path)
        if None in [repository.get(part, **options) for part in parts]:
          continue
      if path is not None:
        for beside in ("config.json", "preprocessor_config.json"):
          repository.get(beside, **options)
        return path
    return None

  try:
    if path := find(local_files_only=True):
      return path
    if download:
      _look_up(huggingface_hub.constants.ENDPOINT)
      if path := find():
        return path
    reason = f"it has none of {', '.join(array_files.FILES)}"
  except _hub_errors() as error:
    reason = repository.reason(error)
  _check_download(name, download)
  raise FileNotFoundError(
    f"the backbone {name!r} is not on this machine and could not be downloaded "
    f"({reason}). Download {repository.url}{array_files.FILES[0]}, and config.json "
    f"beside it, where there is a network and put them into {folder}; the cache is set "
    f"by ${paths.CACHE_VARIABLE}."
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


def _check_download(name: str, download: bool) -> None:
  """Raises a `FileNotFoundError` where nothing may be requested."""
  if not download:
    raise FileNotFoundError(f"{name!r} is not on this machine, and is not requested.")


def _cached_file(
  name: str,
  release: Release,
  cache_dir: str | os.PathLike[str] | None,
  download: bool,
) -> Path:
  folder = Path(cache_dir or paths.cache_dir()).expanduser()
  url, sha256 = _https_url(release.url), release.sha256
  target = folder.absolute() / _cache_name(url)
  if not target.is_file():
    _check_download(name, download)
    _check_scheme(url)
    try:
      _download(url, target, sha256, _max_bytes(release))
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


def _download(
  url: str, target: Path, sha256: str | None, max_bytes: float | int
) -> None:
  """Downloads a file, or what an interrupted download left to be received.

  Several processes may call this at once: one downloads, and the others wait.
  """
  import filelock
  import requests

  target.parent.mkdir(parents=True, exist_ok=True)
  with filelock.FileLock(target.with_name(f".{target.name}.lock")):
    # Another process may have been faster.
    if target.is_file():
      return
    part, start = target.with_name(f".{target.name}.part"), time.monotonic()
    try:
      received = _receive(url, part, target, max_bytes)
      actual = file_digest(part)
      if sha256 not in (None, actual):
        raise ValueError(
          f"{url} has sha256 {actual}, expected {sha256}. The download was thrown away."
        )
      _check_content(url, part)
    except (OSError, ValueError) as error:
      # What a broken connection left is gone on with the next time.
      is_broken = isinstance(error, requests.RequestException)
      if not is_broken or not part.stat().st_size:
        part.unlink(missing_ok=True)
      raise
    os.replace(part, target)
    seconds = max(time.monotonic() - start, 1e-3)
    _say(
      f"downloaded {_mib(target.stat().st_size)} in {seconds:.0f} s "
      f"({_mib(received / seconds)}/s), sha256 {actual}"
    )


def _check_content(url: str, part: Path) -> None:
  """Checks that a download is a file of weights, and not the page of a login.

  Raises:
    ValueError: it is not, or it is not complete.
  """
  try:
    kind = array_files.kind_of(part)
    if kind in ("npz", "safetensors"):
      array_files.open_arrays(part, kind)
    elif kind != "torch":
      with part.open("rb") as file:
        raise ValueError(f"it begins with {file.read(40)!r}")
  except ValueError as error:
    raise ValueError(
      f"what {url} sent is no file of weights: {error}. It was thrown away."
    ) from error


def _receive(url: str, part: Path, target: Path, max_bytes: float | int) -> int:
  """Appends to a file what it lacks of a URL's content; returns how many bytes.

  Raises:
    OSError: no connection, or it broke, or the disk is full.
    ValueError: the content is larger than `max_bytes`, or is at no address that may be
      requested.
  """
  import requests

  files.check_writable_in_place(part)
  with part.open("ab") as file, requests.Session() as session:
    # `_request` follows redirections: requests would read all that comes with one.
    session.get_redirect_target = lambda response: None
    size = file.tell()
    response = _request(session, url, size)
    if size and response.status_code == 416:
      # There is nothing to go on with.
      response = _request(session, url, 0)
    response.raise_for_status()
    if response.status_code != 206:
      file.truncate(0)
      size = 0
    length = response.headers.get("Content-Length", "")
    total = size + int(length) if length.isdecimal() else 0
    _check_size(url, total, max_bytes)
    resuming = f", resuming at {_mib(size)}" if size else ""
    _say(f"downloading {url} ({_mib(total)}) to {target}{resuming}")
    meter, received = _Meter(size, total), 0
    try:
      for chunk in response.iter_content(_CHUNK):
        received += len(chunk)
        _check_size(url, size + received, max_bytes)
        file.write(chunk)
        meter.update(len(chunk))
    except requests.RequestException as error:
      if not total:
        # Nobody knows of how much this is a part.
        file.truncate(0)
        raise
      raise requests.ConnectionError(
        f"the connection broke after {file.tell()} of {total} bytes; the next try "
        "goes on there"
      ) from error
    finally:
      meter.close()
    return received


def _request(session: Any, url: str, start: int) -> Any:
  """Returns the response to a request of a file from some byte on.

  Redirections are followed to where they may lead; see `_redirected`.
  """
  headers = {"Accept-Encoding": "identity"}
  if start:
    headers["Range"] = f"bytes={start}-"
  for _ in range(_MAX_REDIRECTIONS):
    response = session.get(
      url,
      headers=headers,
      stream=True,
      allow_redirects=False,
      timeout=_TIMEOUT_SECONDS,
    )
    if not response.is_redirect:
      return response
    location = response.headers["Location"]
    response.close()
    url = _redirected(url, location)
  raise OSError(f"more than {_MAX_REDIRECTIONS} redirections, the last one to {url}")


def _redirected(url: str, location: str) -> str:
  """Returns where a server leads: to https, and from its host to public ones alone.

  A name that leads to a public address now and to a private one a moment later gets
  no further than the connection: there is no certificate for it.

  Raises:
    ValueError: it leads elsewhere.
  """
  try:
    target = urllib.parse.urljoin(url, location)
    old, new = (urllib.parse.urlsplit(address).hostname for address in (url, target))
  except ValueError as error:
    raise ValueError(f"{url} redirects to {location!r}, no address.") from error
  _check_scheme(target)
  if new != old and not _is_public(new):
    raise ValueError(
      f"{url} redirects to {target}, an address that is not public, and is not "
      "followed there. Download the file by other means, and give its path."
    )
  return target


def _is_public(host: str | None) -> bool:
  """Returns whether all addresses of a host are public ones."""
  try:
    found = socket.getaddrinfo(host, None)
  except (OSError, UnicodeError):
    # Behind a proxy, which alone knows names; elsewhere connecting fails as well.
    return True
  addresses = (ipaddress.ip_address(info[4][0].partition("%")[0]) for info in found)
  return all((getattr(a, "ipv4_mapped", None) or a).is_global for a in addresses)


def _check_scheme(url: str) -> None:
  """Checks that a URL's content cannot be changed on its way.

  Raises:
    ValueError: it can.
  """
  if not url.startswith(f"{_SCHEME}://") or not url.isprintable():
    raise ValueError(
      f"{url!r} is not requested, only {_SCHEME}:// is: on its way the content could "
      "be changed. Download the file by other means, and give its path."
    )


def _check_size(name: str, num_bytes: int, max_bytes: float | int) -> None:
  """Checks that a download is not larger than it may be.

  Raises:
    ValueError: it is.
  """
  if num_bytes > max_bytes:
    raise ValueError(
      f"{name} has more than the {_mib(max_bytes)} that its download may have, and "
      f"nothing of it was kept. Raise ${LIMIT_VARIABLE} (in GiB), or download it by "
      "other means, and give its path."
    )


def _max_bytes(release: Release | None = None) -> float | int:
  """Returns how large a download may be.

  Args:
    release: of a release as large as it is; of anything else a number for all.

  Raises:
    ValueError: what the user has set is no number.
  """
  text = os.environ.get(LIMIT_VARIABLE)
  if not text:
    return (release and release.max_bytes) or _MAX_GIB * 2**30
  try:
    return float(text) * 2**30
  except ValueError as error:
    raise ValueError(
      f"${LIMIT_VARIABLE} is {text!r}, expected a number of GiB, such as {_MAX_GIB}."
    ) from error


class _Meter:
  """Shows how far a download is: a bar on a terminal, else a line now and then."""

  def __init__(self, size: int, total: int):
    """Begins at so many bytes of so many; 0 where nobody says of how many."""
    self._size = self._shown_size = size
    self._total, self._shown_at, self._bar = total, time.monotonic(), None
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
    self._size += size
    if self._bar:
      self._bar.update(self._task, completed=self._size)
    elif time.monotonic() - self._shown_at >= _LINE_SECONDS:
      rate = (self._size - self._shown_size) / (time.monotonic() - self._shown_at)
      _say(f"  {_mib(self._size)} of {_mib(self._total)}, {_mib(rate)}/s")
      self._shown_at, self._shown_size = time.monotonic(), self._size

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

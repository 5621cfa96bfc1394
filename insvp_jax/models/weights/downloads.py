"""Finds the file of a backbone on this machine, and downloads it if need be."""

from collections.abc import Iterator
import contextlib
import hashlib
import http.client
import os
from pathlib import Path
import re
import secrets
import shutil
import time
import urllib.parse
import urllib.request

from absl import logging

from insvp_jax import trees
from insvp_jax.models.weights import releases

CACHE_VARIABLE = "INSVP_CACHE"
_GCS_URL = "https://storage.googleapis.com/"
_TIMEOUT_SECONDS = 60  # without a byte
_STALE_SECONDS = 3600  # without a write: the download's process is dead


def resolve(
  path_or_name: str | os.PathLike[str],
  cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
  """Returns the local `.npz` file of a path, a release's name or a URL.

  An existing file is taken first, then a release in the package, then the cache;
  what is in none of them is downloaded into the cache. Several processes may do
  so at once, and a killed one leaves no partial file in the file's place.

  Args:
    path_or_name: a path, a key of `RELEASES`, or a gs:// or https:// URL.
    cache_dir: folder of downloads; None is $INSVP_CACHE or ~/.cache/insvp_jax.

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
  folder = Path(
    cache_dir or os.environ.get(CACHE_VARIABLE) or "~/.cache/insvp_jax"
  ).expanduser()
  url, target = _https_url(url), folder.absolute() / _cache_name(url)
  if not target.is_file():
    logging.info("downloading %s to %s", url, target)
    try:
      _download(url, target, sha256)
    except (OSError, http.client.HTTPException) as error:
      raise FileNotFoundError(
        f"the backbone {name!r} is not on this machine and could not be downloaded "
        f"({type(error).__name__}: {error}). Download {url} where there is a network "
        f"and put it at {target}; the folder {folder} is set by ${CACHE_VARIABLE}."
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
  target.parent.mkdir(parents=True, exist_ok=True)
  _remove_stale(target)
  with atomic_file(target) as temporary:
    with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
      expected = response.headers.get("Content-Length")
      with open(temporary, "wb") as file:
        shutil.copyfileobj(response, file, 1 << 20)
    actual = temporary.stat().st_size
    if expected is not None and actual != int(expected):
      raise OSError(f"the connection broke after {actual} of {expected} bytes")
    _check_digest(temporary, sha256, hint=f"The download from {url} was thrown away.")


def _remove_stale(target: Path) -> None:
  """Removes what killed downloads left; running ones were written to just now."""
  for part in target.parent.glob(f".{target.name}.*.part"):
    with contextlib.suppress(OSError):
      if time.time() - part.stat().st_mtime > _STALE_SECONDS:
        part.unlink()


def _check_digest(path: Path, sha256: str | None, *, hint: str) -> None:
  if sha256 is None:
    return
  actual = file_digest(path)
  if actual != sha256:
    raise ValueError(f"{path} has sha256 {actual}, expected {sha256}. {hint}")

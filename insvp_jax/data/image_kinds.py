"""Which files of a folder or archive are images, and why others are left out.

Training and the tools find images by the same rules, `find_images`. What is left out is
counted by reason and told in one line, `left_out_line`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import re

from insvp_jax.data import decode
from insvp_jax.data.folder_or_zip import FileTree
from insvp_jax.errors import printable

# How much of a file `looks_like_image` wants to see.
HEAD_BYTES = 256
# Reasons to leave a file out, as `left_out_line` words them.
NO_IMAGE = "no image"
UNREADABLE = "unreadable"
OF_A_RUN = "of a run"

_STARTS = (
  b"\xff\xd8\xff",  # JPEG
  b"\x89PNG\r\n\x1a\n",
  b"GIF87a",
  b"GIF89a",
  *(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),  # TIFF, BigTIFF
)
# Binary PBM, PGM or PPM: two or three numbers. A text may well begin with "P1 10 20 ".
_NETPBM = re.compile(rb"P[456]\s(\s*#[^\n]*\n)*\s*[0-9]+\s+[0-9]+\s")
# The sizes that the second header of a BMP may have.
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)
# What a run or a search writes into its workdir.
_RUN_FILES = {
  *("metrics.jsonl", "config.json", "result.json", "parameters.txt"),
  *("summary.json", "table.md"),
}
# The most pictures of a run that lie beside it, such as the prompts that were drawn.
_PICTURES_A_RUN = 4


def looks_like_image(head: bytes) -> bool:
  """Returns whether a file is of a format that decodes, by its first `HEAD_BYTES`.

  Cheap, and true for whatever begins so: only decoding shows what the rest is worth.
  """
  if head.startswith(_STARTS):
    return True
  if head.startswith(b"RIFF"):
    return head[8:12] == b"WEBP"
  if head.startswith(b"BM"):
    return int.from_bytes(head[14:18], "little") in _BMP_HEADERS
  return bool(decode.optional_format(head) or _NETPBM.match(head))


@dataclasses.dataclass(frozen=True)
class Found:
  """What there is in a folder or archive; names are those of `FileTree`.

  Attributes:
    images: the image files, sorted.
    folders: all folders but those that are left out.
    left_out: the other files and folders (which end in "/") by reason.
  """

  images: Sequence[str]
  folders: Sequence[str]
  left_out: dict[str, list[str]]


def find_images(tree: FileTree) -> Found:
  """Finds the image files, by their ending or else by their content.

  A run or a search below the root is left out with all its pictures.
  """
  entries = tree.entries()
  images, others = [], []
  for name in entries.files:
    (images if name.lower().endswith(decode.IMAGE_SUFFIXES) else others).append(name)
  folders = entries.folders
  left_out = {reason: list(names) for reason, names in entries.left_out.items()}
  if runs := _run_folders(images, others, folders):
    images, others = _outside(images, runs), _outside(others, runs)
    folders = [name for name in folders if not _is_within(name, runs)]
    left_out = {reason: _outside(names, runs) for reason, names in left_out.items()}
    left_out[OF_A_RUN] = [f"{name}/" for name in sorted(runs)]
  # Only now, so that nothing of a run is read.
  for name in others:
    head = tree.head(name, HEAD_BYTES)
    if head is not None and looks_like_image(head):
      images.append(name)
    else:
      reason = UNREADABLE if head is None else NO_IMAGE
      left_out.setdefault(reason, []).append(name)
  return Found(sorted(images), folders, left_out)


def left_out_line(left_out: Mapping[str, Sequence[str]], most: int = 3) -> str:
  """Returns how many files were left out for which reason, and the first of each.

  Args:
    left_out: names by reason.
    most: how many names of each are told.

  Returns:
    "" if there are none.
  """
  parts = []
  for reason, names in left_out.items():
    if names:
      first = [*map(printable, sorted(names)[:most]), *["..."] * (len(names) > most)]
      parts.append(f"{len(names)} {reason} ({', '.join(first)})")
  return f"left out {', '.join(parts)}" if parts else ""


def _run_folders(
  images: Iterable[str], others: Iterable[str], folders: Iterable[str]
) -> set[str]:
  """Returns the folders below the root that are a run or hold nothing but runs.

  Of folders in each other only the outermost is returned. Beside runs a few pictures
  may lie, such as the drawn prompts; a class that somebody put a workdir into holds
  more.

  Args:
    images: names of the image files.
    others: names of the other files.
    folders: names of the folders.
  """
  files_of: dict[str, set[str]] = {}
  for name in others:
    folder, _, file = name.rpartition("/")
    if file in _RUN_FILES:
      files_of.setdefault(folder, set()).add(file)
  runs = {folder for folder, files in files_of.items() if _is_run(files)}
  counts: Counter[str] | None = None
  for folder in folders:
    around, _, step = folder.rpartition("/")
    parent, _, name = around.rpartition("/")
    if name == "checkpoints" and step.isdecimal():
      counts = _images_in(images) if counts is None else counts
      # Digits to learn are images.
      if not any(f"{other}/".startswith(f"{folder}/") for other in counts):
        # Of a root that is itself a run, its checkpoints.
        runs.add(parent or around)
  runs.discard("")
  if not runs:
    return runs
  counts = _images_in(images) if counts is None else counts
  outside = {name: n for name, n in counts.items() if not _is_within(name, runs)}
  holders = Counter(name for run in runs for name in _around(run))
  for holder in sorted(holders, key=lambda name: -name.count("/")):
    deeper = any(
      name.startswith(f"{holder}/") and not _is_within(name, runs) for name in outside
    )
    if not deeper and outside.get(holder, 0) <= _PICTURES_A_RUN * holders[holder]:
      runs.add(holder)
  return {run for run in runs if not any(name in runs for name in _around(run))}


def _is_run(files: set[str]) -> bool:
  """Returns whether a folder with these of `_RUN_FILES` is a run's or a search's."""
  return (
    "metrics.jsonl" in files
    or ("config.json" in files and bool({"result.json", "parameters.txt"} & files))
    or {"summary.json", "table.md"} <= files
  )


def _images_in(images: Iterable[str]) -> Counter[str]:
  """Returns how many images lie directly in each folder."""
  return Counter(name.rpartition("/")[0] for name in images)


def _around(name: str) -> Iterable[str]:
  """Yields the folders around a file or folder, from the inside, without the root."""
  while name := name.rpartition("/")[0]:
    yield name


def _is_within(folder: str, folders: set[str]) -> bool:
  """Returns whether a folder is one of `folders` or lies in one."""
  return folder in folders or any(name in folders for name in _around(folder))


def _outside(names: Iterable[str], folders: set[str]) -> list[str]:
  """Returns the names that lie in none of the folders."""
  known: dict[str, bool] = {}
  kept = []
  for name in names:
    folder = name.rstrip("/").rpartition("/")[0]
    if folder not in known:
      known[folder] = _is_within(folder, folders)
    if not known[folder]:
      kept.append(name)
  return kept

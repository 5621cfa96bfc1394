"""Command-line tools for finished runs; notebooks call the same functions."""

import argparse
from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import glob
import os
from pathlib import Path
import sys
from typing import Any

from insvp_jax import errors

# What a shell reports for SIGPIPE, which ends other programs then.
_PIPE_CLOSED = 128 + 13
RUN_HELP = (
  "the run's workdir, such as runs/folder/insvp/seed0, the folder of an exported "
  "adapter, or hf-hub:user/name@revision"
)
BACKBONE_HELP = (
  "the backbone's file, if it has moved, or a repository or https address to request"
)


def argument_parser(doc: str, module: str, prog: str | None) -> argparse.ArgumentParser:
  """Returns the parser of a tool's arguments, without any yet.

  Args:
    doc: the docstring of the tool's module; its first line is the description.
    module: name of the module.
    prog: the command that was typed, for usage and errors, e.g. "insvp predict"; None
      for `python -m` and the module.
  """
  return argparse.ArgumentParser(
    prog=prog or f"python -m insvp_jax.tools.{module}", description=doc.splitlines()[0]
  )


def add_segment_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments that say how a segmenter looks at images."""
  parser.add_argument(
    "--scales",
    nargs="+",
    type=float,
    help="segmentation: factors of an image's sides whose results are averaged",
  )
  parser.add_argument(
    "--flips", action="store_true", help="segmentation: average mirrored images, too"
  )


def segment_changes(args: argparse.Namespace, run: Any) -> dict[str, Any]:
  """Returns the changes of a run's evaluation that arguments ask for.

  Raises:
    ValueError: scales that are none, or of a run that classifies images.
  """
  changes: dict[str, Any] = {}
  if args.scales:
    if not all(0.01 <= scale <= 100 for scale in args.scales):
      raise ValueError(f"--scales has {args.scales}, expected numbers in [0.01, 100].")
    changes["scales"] = tuple(args.scales)
  if args.flips:
    changes["flips"] = True
  if changes and not run.segments:
    raise ValueError("--scales and --flips are of segmentation; leave them out.")
  return changes


def run_tool(main: Callable[[], None]) -> int:
  """Runs a tool and returns its exit status.

  Bad input, which this package reports as a ValueError, KeyError or OSError, gives
  one line on stderr, and what the error's notes list, and status 2. Other errors are
  bugs and keep their traceback. Where nobody reads the output any more it ends without
  a word, with status 141.
  """
  errors.print_anything()
  try:
    main()
    sys.stdout.flush()
  except BrokenPipeError:
    # Whoever read the output, such as head, has enough of it. At the end Python would
    # write what is left.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _PIPE_CLOSED
  except errors.INPUT_ERRORS as error:
    if not errors.is_ours(error):
      raise
    notes = getattr(error, "__notes__", ())
    lines = [f"insvp_jax: {errors.one_line(error)}", *map(errors.printable, notes)]
    print("\n".join(lines), file=sys.stderr)
    return 2
  return 0


@dataclasses.dataclass(frozen=True, slots=True)
class ImageFile:
  """An image in a folder or archive, or alone, that is decoded when it is asked for.

  `Run` takes it for its pixels, decoded as those that it was trained on.

  Attributes:
    tree: the folder or archive.
    name: of the file in it.
  """

  tree: Any
  name: str

  def __str__(self) -> str:
    """Returns the path, which every terminal can show."""
    return self.tree.full_path(self.name)

  def read_pixels(self, options: Any = None) -> Any:
    """Returns the pixels uint8 [h, w, 3]; as `decoded`."""
    with self.decoded(options) as pixels:
      return pixels

  def decoded(self, options: Any = None) -> contextlib.AbstractContextManager[Any]:
    """Returns the context of the pixels uint8 [h, w, 3]; see `decode.decoded`.

    Args:
      options: `decode.DecodeOptions`; None is the default ones.

    Raises:
      ValueError: the file does not decode; the message names it.
    """
    from insvp_jax.data import decode

    options = options or decode.DecodeOptions()
    data = self.tree.read(self.name, options.max_bytes)
    return decode.decoded(data, str(self), options)


def _matches(path: str) -> list[str]:
  """Returns a path or, of a pattern, what it matches, sorted; see `find_images`.

  Raises:
    FileNotFoundError: there is no such file or folder, or nothing that matches.
  """
  if os.path.exists(path):
    return [path]
  if not glob.has_magic(path):
    raise FileNotFoundError(f"there is no image file or folder {path}.")
  # As `find` would: what is in a folder comes with that folder if it matches, too.
  found = sorted(glob.glob(path, recursive=True), key=lambda name: name.split("/"))
  if not found:
    raise FileNotFoundError(
      f"no file or folder matches {path!r}; * stands for anything but /, and ** for "
      "folders at any depth."
    )
  outside: list[str] = []
  for name in found:
    if not (outside and os.path.isdir(outside[-1]) and _is_in(name, outside[-1])):
      outside.append(name)
  return outside


def _is_in(path: str, folder: str) -> bool:
  return path.startswith(f"{folder.rstrip('/')}/") or path == folder


def find_images(paths: Sequence[str]) -> list[ImageFile]:
  """Returns the images among the paths, and in the folders and archives among them.

  Those of a folder or archive are found as in training, and a line on stderr says what
  was left out. A file that is named is taken whatever its name is. A pattern, such as
  "photos/**/*.jpg", stands for the files and folders that it matches, each once.

  Raises:
    FileNotFoundError: a path does not exist, or a pattern matches nothing.
    ValueError: a folder or archive holds no image, or a path is no regular file.
  """
  from insvp_jax.data import decode, image_kinds
  from insvp_jax.data.folder_or_zip import open_path

  images = []
  for path in (Path(match) for pattern in paths for match in _matches(pattern)):
    if not path.is_dir() and path.suffix.lower() != ".zip":
      if not path.is_file():
        raise ValueError(f"{path} is no regular file, expected an image or a folder.")
      images.append(ImageFile(open_path(path.parent), path.name))
      continue
    tree = open_path(path)
    found = image_kinds.find_images(tree)
    left_out = image_kinds.left_out_line(found.left_out)
    kind = "folder" if path.is_dir() else "archive"
    if not found.images:
      known = ", ".join(decode.IMAGE_SUFFIXES)
      raise ValueError(
        f"the {kind} {path} holds no image ({known}, or files of these formats)"
        f"{'; ' if left_out else ''}{left_out}."
      )
    if left_out:
      print(f"insvp_jax: {path}: {left_out}", file=sys.stderr)
    # As in a file browser: a folder's own images beside those of its folders.
    names = sorted(found.images, key=lambda name: name.split("/"))
    images.extend(ImageFile(tree, name) for name in names)
  return images

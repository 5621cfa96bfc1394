"""Labels of one's own images in a CSV: a row for each image, with its path and label.

`find_layout` reads one as people write and export them: with a header or without, with
commas, semicolons, tabs or bars between cells, quoted or not, from spreadsheets and
from pandas. Whatever cannot be meant is one line that names the file and the row, as
spreadsheets count rows.
"""

import codecs
from collections.abc import Iterator, Sequence
import contextlib
import csv
import dataclasses
import io
import os
from pathlib import Path
import re
from typing import Any

from absl import logging
import ml_collections

from insvp_jax import files, trees
from insvp_jax.data import decode
from insvp_jax.data.folder_or_zip import FileTree, within_root
from insvp_jax.data.sources import class_names, split_names
from insvp_jax.data.sources.folder_layout import Layout
from insvp_jax.errors import printable

# Tried in this order.
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
# What columns are called, the likelier names first, in lower case.
IMAGE_COLUMNS = (
  *("image", "img", "images", "image_path", "img_path", "path", "filepath"),
  *("file_path", "file_name", "filename", "file", "image_name", "image_file"),
  *("picture", "photo", "image_id", "id"),
)
LABEL_COLUMNS = (
  *("label", "labels", "label_name", "class", "classes", "class_name", "classname"),
  *("category", "target", "y", "level", "grade", "diagnosis", "species", "breed"),
)
SPLIT_COLUMNS = ("split", "subset", "partition")
# The index that pandas writes, which is no column of its user.
_NAMELESS = re.compile(r"(unnamed: ?[0-9]+)?", re.I)


@dataclasses.dataclass(frozen=True)
class _Columns:
  """Where the cells of a row stand; `split` is None where there are no splits."""

  image: int
  label: int
  split: int | None


def root_of(data_config: ml_collections.ConfigDict) -> str:
  """Returns the folder or archive of the images: `root`, or that of the CSV."""
  if data_config.root or not data_config.labels:
    return data_config.root
  return os.path.dirname(os.path.abspath(os.path.expanduser(data_config.labels)))


def find_layout(root: FileTree, data_config: ml_collections.ConfigDict) -> Layout:
  """Returns splits, classes and image files as a CSV tells them.

  Paths are relative to the root, or to the folder of the CSV where that leads into the
  root, or absolute; their ending may be missing where one file has the name. The order
  of the rows does not matter. Classes are those of train, in the order of numbers where
  all are numbers, else of texts.

  Args:
    root: the folder or archive that the images lie in.
    data_config: the section config.data; `labels` is the path of the CSV, and
      `image_column`, `label_column`, `split_column` are read.

  Raises:
    FileNotFoundError: the CSV, or an image that it names, is not there.
    ValueError: it is no such table; the message names the row.
  """
  return _Table(root, data_config).layout()


class _Table:
  """A CSV and the images that it is of."""

  def __init__(self, root: FileTree, data_config: ml_collections.ConfigDict):
    self._root, self._path = root, Path(data_config.labels).expanduser()
    self._name = printable(str(self._path))
    # Of a folder, how paths into it may begin.
    whole = os.path.abspath(root.path)
    is_folder = os.path.isdir(whole)
    self._starts = {whole, os.path.realpath(whole)} if is_folder else set()
    self._by_stem: dict[str, dict[str, list[str]]] = {}
    self._beside = os.path.dirname(os.path.abspath(self._path))
    rows = self._parse(self._text())
    if not rows:
      raise ValueError(f"{self._name} has no rows; expected one for each image.")
    self._columns, self._rows = self._find_columns(rows, data_config)

  def _error(self, row: int, text: str) -> ValueError:
    return ValueError(f"{self._name}, row {row}: {text}")

  # --- From bytes to cells.

  def _text(self) -> str:
    try:
      data = files.read_bytes(self._path)
    except OSError as error:
      raise FileNotFoundError(
        f"config.data.labels: cannot read {self._name} ({error.strerror})."
      ) from error
    wide = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding = "utf-16" if data.startswith(wide) else "utf-8-sig"
    try:
      text = data.decode(encoding)
    except UnicodeDecodeError as error:
      row = data.count(b"\n", 0, error.start) + 1
      raise self._error(
        row,
        "no text in UTF-8; save it as CSV in UTF-8 (in spreadsheets a choice when "
        "saving).",
      ) from error
    if "\0" in text:
      raise ValueError(
        f"{self._name} is no text; expected a CSV, which spreadsheets export."
      )
    return text

  def _parse(self, text: str) -> list[tuple[int, list[str]]]:
    """Returns (number, cells) of the rows that are not empty."""
    errors: list[tuple[int, ValueError]] = []
    for delimiter in _DELIMITERS:
      width = 0
      rows: list[tuple[int, list[str]]] = []
      try:
        for number, cells in self._read(text, delimiter):
          width = width or len(cells)
          while len(cells) > width and not cells[-1]:
            cells.pop()
          if len(cells) != width:
            raise self._error(
              number,
              f"{len(cells)} cells, expected {width} as in the first row, between "
              f"{_DELIMITERS[delimiter]}. Quote a cell that has one in it.",
            )
          rows.append((number, cells))
      except ValueError as error:
        errors.append((width, error))
        continue
      if width > 1 or not rows:
        return rows
    if errors:
      # None fits: what is wrong with the one that separates most.
      raise max(errors, key=lambda each: each[0])[1]
    raise ValueError(
      f"{self._name} has one column, expected paths and labels, between commas, "
      "semicolons, tabs or bars."
    )

  def _read(self, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yields (number, cells without spaces around) of the rows that are not empty."""
    reader = csv.reader(
      io.StringIO(text, newline=""),
      delimiter=delimiter,
      strict=True,
      skipinitialspace=delimiter != "\t",
    )
    number = 0
    while True:
      number += 1
      try:
        cells = [cell.strip() for cell in next(reader)]
      except StopIteration:
        return
      except csv.Error as error:
        raise self._error(number, f"the quotes do not fit: {error}.") from error
      if any(cells):
        yield number, cells

  # --- Which column is which.

  def _find_columns(
    self,
    rows: list[tuple[int, list[str]]],
    data_config: ml_collections.ConfigDict,
  ) -> tuple[_Columns, list[tuple[int, list[str]]]]:
    """Returns the columns, and the rows without a header."""
    first = rows[0][1]
    given = {
      kind: data_config[f"{kind}_column"] for kind in ("image", "label", "split")
    }
    if any(given.values()) or not any(map(self._is_image, first)):
      header, rows = first, rows[1:]
      if not rows:
        raise ValueError(f"{self._name} has no rows below its header.")
    else:
      header = [""] * len(first)
    cells = rows[0][1]

    def find(kind: str, known: Sequence[str], free: Sequence[int]) -> int | None:
      if name := given[kind]:
        return self._named(kind, name, header)
      lower = [column.lower() for column in header]
      return next(
        (
          lower.index(name)
          for name in known
          if name in lower
          if lower.index(name) in free
        ),
        None,
      )

    free = list(range(len(header)))
    split = find("split", SPLIT_COLUMNS, free)
    free = [i for i in free if i != split]
    # What the cells are says more than what the column is called.
    of_images = [i for i in free if _has_ending(cells[i])]
    of_images = of_images or [i for i in free if self._is_image(cells[i])]
    image = of_images[0] if len(of_images) == 1 and not given["image"] else None
    if image is None:
      image = find("image", IMAGE_COLUMNS, of_images or free)
    if image is None:
      raise self._unclear("image", header, rows[0])
    free = [i for i in free if i != image]
    label = find("label", LABEL_COLUMNS, free)
    if label is None:
      if any(header):
        free = [i for i in free if not _NAMELESS.fullmatch(header[i])] or free
      if len(free) != 1:
        raise self._unclear("label", header, rows[0])
      (label,) = free
    if len({image, label, split}) < 3:
      raise ValueError(
        f"{self._name}: the column {header[label]!r} cannot be two of image, label and "
        "split; see config.data.image_column and its neighbours."
      )
    return _Columns(image, label, split), rows

  def _named(self, kind: str, name: str, header: Sequence[str]) -> int:
    """Returns the column that the config names."""
    if header.count(name) != 1:
      twice = f", in which {name!r} is {header.count(name)} times there"
      raise ValueError(
        f"{self._name}: config.data.{kind}_column is {name!r}, but the header is "
        f"{', '.join(map(repr, header))}{twice if name in header else ''}."
        f"{'' if name in header else trees.did_you_mean(name, header)}"
      )
    return header.index(name)

  def _unclear(
    self, kind: str, header: Sequence[str], row: tuple[int, list[str]]
  ) -> Exception:
    what = {"image": "the paths of the images", "label": "the labels"}[kind]
    if not any(header):
      return self._error(
        row[0],
        f"no header, and {len(header)} columns, so that {what} are not known; add a "
        "first row with the names of the columns, such as image and label.",
      )
    shown = ", ".join(map(repr, header))
    if kind == "image" and len(header) == 2 and not given_columns(header):
      # More likely a table without a header whose first image is missing.
      return FileNotFoundError(
        f"{self._name}, row {row[0]}: no image {printable(row[1][0])} in "
        f"{self._root.path}, and no column of the header ({shown}) is called as that "
        "of images. Set config.data.root to the folder that the paths start from, or "
        "config.data.image_column."
      )
    return ValueError(
      f"{self._name}: which column has {what} is not clear from the header ({shown}); "
      f"set config.data.{kind}_column to one of them."
    )

  # --- Which file is which.

  def _is_image(self, cell: str) -> bool:
    """Returns whether a cell looks like the path of an image, or leads to one."""
    return _has_ending(cell) or (bool(cell) and self._find(cell) is not None)

  def _is_there(self, name: str) -> bool:
    return self._root.sizes([name])[0] >= 0

  def _places(self, path: str) -> list[str]:
    """Returns the names in the root that a path may stand for."""
    # Written on Windows.
    path = path if "/" in path else path.replace("\\", "/")
    places = []
    if not os.path.isabs(path) and (inside := within_root(path)):
      places.append(inside)
    whole = os.path.normpath(os.path.join(self._beside, path))
    for start in self._starts:
      if whole.startswith(start.rstrip("/") + "/"):
        places.append(os.path.relpath(whole, start))
    return list(dict.fromkeys(places))

  def _find(self, path: str) -> str | None:
    """Returns the name of an image in the root; None if it is not there."""
    if "\0" in path:
      return None
    for place in (places := self._places(path)):
      if self._is_there(place):
        return place
    if _has_ending(path):
      return None
    # Names without their endings, as some competitions have them.
    for place in places:
      folder, _, stem = place.rpartition("/")
      if len(names := self._endings(folder).get(stem, ())) == 1:
        return names[0] if self._is_there(names[0]) else None
    return None

  def _endings(self, folder: str) -> dict[str, list[str]]:
    """Returns the image files in a folder of the root by name without ending."""
    if folder not in self._by_stem:
      names: list[str] = []
      if self._starts:
        with contextlib.suppress(OSError, ValueError):
          names = os.listdir(self._root.path / folder)
      else:
        files_there = self._root.entries().files
        places = [name.rpartition("/") for name in files_there]
        names = [name for around, _, name in places if around == folder]
      by_stem: dict[str, list[str]] = {}
      for name in filter(_has_ending, names):
        place = f"{folder}/{name}" if folder else name
        by_stem.setdefault(name.rpartition(".")[0], []).append(place)
      self._by_stem[folder] = by_stem
    return self._by_stem[folder]

  def _missing(self, row: int, path: str, num_missing: int) -> Exception:
    """Returns what to say of an image that was not found, the first of some."""
    shown, root = printable(path), self._root.path
    if re.match("[a-z]+://", path, re.I):
      return self._error(row, f"{shown} is a URL; expected the path of a file.")
    if not self._places(path):
      return self._error(
        row,
        f"{shown} is not in {root}; set config.data.root to a folder that all images "
        "lie in.",
      )
    more = f", one of {num_missing} that are missing" if num_missing > 1 else ""
    return FileNotFoundError(
      f"{self._name}, row {row}: no image {shown} in {root}{more}. Set "
      "config.data.root to the folder that the paths start from, or take the row out."
    )

  # --- From rows to splits.

  def layout(self) -> Layout:
    """Returns what the rows say."""
    # {file: (number of the row, label, split)}
    known: dict[str, tuple[int, str, str]] = {}
    missing: list[tuple[int, str]] = []
    repeated: list[int] = []
    for number, cells in self._rows:
      path, label = cells[self._columns.image], cells[self._columns.label]
      if not path:
        raise self._error(number, f"no path of an image; its label is {label!r}.")
      if not label:
        raise self._error(number, f"no label of {printable(path)}.")
      name = self._find(path)
      if name is None:
        missing.append((number, path))
        continue
      row = (number, class_names.class_name(label), self._split(number, cells))
      before = known.setdefault(name, row)
      if before is not row:
        for what, one, two in zip(("label", "split"), before[1:], row[1:], strict=True):
          if one != two:
            raise self._error(
              number,
              f"{printable(path)} has the {what} {two!r}, but {one!r} in row "
              f"{before[0]}; expected one of them.",
            )
        repeated.append(number)
    if missing:
      raise self._missing(*missing[0], len(missing))
    if repeated:
      logging.warning(
        "%s: %d rows are there twice, and count once, first row %d",
        *(self._name, len(repeated), repeated[0]),
      )
    return self._sorted(known)

  def _split(self, row: int, cells: Sequence[str]) -> str:
    """Returns the split of a row; "train" for all where there is no such column."""
    if self._columns.split is None:
      return "train"
    text = cells[self._columns.split]
    name = split_names.parse(text)
    if name is None or name.rest or name.split not in ("train", "val", "test"):
      raise self._error(row, f"the split is {text!r}, expected train, val or test.")
    return name.split

  def _sorted(self, known: dict[str, tuple[int, str, str]]) -> Layout:
    """Returns the layout of {file: (row, label, split)}, in the order of a folder's."""
    of_train = [label for _, label, split in known.values() if split == "train"]
    if not of_train:
      raise ValueError(f"{self._name} has no rows of the split train.")
    names = class_names.in_order(of_train)
    if len(names) < 2:
      raise ValueError(
        f"{self._name} has only one class, {names[0]!r}; a classifier needs two or "
        "more."
      )
    if len(names) == len(of_train) > 2:
      raise ValueError(
        f"{self._name}: each of the {len(of_train)} images has a label of its own, "
        f"such as {names[0]!r}; set config.data.label_column to the column of the "
        "classes."
      )
    class_names.tell_alike(self._name, names)
    label_of = {name: i for i, name in enumerate(names)}
    splits: dict[str, list[tuple[str, int]]] = {}
    for name, (row, label, split) in known.items():
      if label not in label_of:
        raise self._error(
          row,
          f"{split} has the class {label!r}, which train does not have."
          f"{trees.did_you_mean(label, names)}",
        )
      splits.setdefault(split, []).append((name, label_of[label]))
    for split, members in splits.items():
      members.sort(key=lambda member: (member[1], member[0]))
      if absent := sorted(set(label_of.values()) - {label for _, label in members}):
        logging.warning(
          "%s has no images of: %s", split, ", ".join(names[i] for i in absent)
        )
    order = [split for split in ("train", "val", "test") if split in splits]
    return Layout(names, {split: splits[split] for split in order})


def _has_ending(path: str) -> bool:
  """Returns whether a path ends as that of an image."""
  return path.lower().endswith(decode.IMAGE_SUFFIXES)


def given_columns(header: Sequence[Any]) -> set[str]:
  """Returns those of some columns that are called as columns mostly are."""
  known = {*IMAGE_COLUMNS, *LABEL_COLUMNS, *SPLIT_COLUMNS}
  return {name for name in header if str(name).lower() in known}

"""From the values or colours of a mask to class indices, and the names of classes.

A mask is an image with one value for each pixel. By itself the value is the class.
A file that names the classes may say which value or which colour each of them has.
"""

from collections.abc import Mapping, Sequence
import csv
import dataclasses
import functools
import io
import json
import re
from typing import Any

from jaxtyping import Int16, Int32, Shaped
import numpy as np

from insvp_jax.errors import printable

# The class of a pixel that counts for nothing: neither in the loss nor in a metric.
IGNORED = -1
# Class indices are kept as int16.
MAX_CLASSES = 2**15 - 1
# The class of a value that stands for none.
_UNKNOWN = -2
_NUM_VALUES = 2**16
# A class of this name in a file of classes stands for pixels that count for nothing.
_IGNORE_NAME = "ignore"
EXPECTED = (
  "expected a name in each line (.txt), or columns name, index or name, color (.csv), "
  'or the same as a list of names or of objects {"name", "color" or "index"} (.json); '
  "a color is #rrggbb or three numbers"
)


@dataclasses.dataclass(frozen=True)
class MaskStyle:
  """What the classes of a task are in the files of its masks.

  Attributes:
    values: of each class; of masks with colours its index.
    colors: of each class, as one number r * 65536 + g * 256 + b, by the file of classes
      or the palette of the masks; () where neither has any.
  """

  values: tuple[int, ...]
  colors: tuple[int, ...] = ()

  def to_json(self) -> dict[str, Any]:
    """Returns what a run keeps of it."""
    colors = [f"#{color:06x}" for color in self.colors]
    return {"values": list(self.values), "colors": colors}

  @classmethod
  def from_json(cls, stored: Mapping[str, Any], num_classes: int) -> "MaskStyle":
    """Returns the style that a run has kept.

    Raises:
      ValueError: it does not fit the classes.
    """
    values, colors = stored.get("values") or [], stored.get("colors") or []
    packed = [_color(color) for color in colors]
    is_valid = len(values) == num_classes and len(packed) in (0, num_classes)
    if not (is_valid and None not in packed and all(0 <= v < 2**16 for v in values)):
      raise ValueError(
        f"the run's masks have {len(values)} values and {len(colors)} colors for "
        f"{num_classes} classes, expected a value of 16 bits and #rrggbb of each."
      )
    return cls(tuple(values), tuple(packed))


@dataclasses.dataclass(frozen=True)
class LabelMap:
  """How values become classes.

  Attributes:
    names: one for each class; () where the masks tell how many there are.
    values: {value: class} of masks with one channel; {} where a value is its class.
    colors: {r * 65536 + g * 256 + b: class} of masks with colours; {} for none.
    ignore_label: the value of pixels that count for nothing; -1 for none.
    reduce_zero_label: whether 0 counts for nothing, too, and 1 is the first class.
  """

  names: tuple[str, ...] = ()
  values: Mapping[int, int] = dataclasses.field(default_factory=dict)
  colors: Mapping[int, int] = dataclasses.field(default_factory=dict)
  ignore_label: int = 255
  reduce_zero_label: bool = False

  def identity(self) -> list[Any]:
    """Returns what decides which class a pixel has; JSON-serialisable."""
    return [
      list(self.names),
      sorted(self.values.items()),
      sorted(self.colors.items()),
      self.ignore_label,
      self.reduce_zero_label,
    ]

  def style(self, num_classes: int, palette: Sequence[int] = ()) -> MaskStyle:
    """Returns what the classes are in files; of several values or colours the first.

    Args:
      num_classes: how many there are.
      palette: colours of values, as `MaskStyle.colors`; () of masks without.
    """
    first = {label: x for x, label in reversed((self.values or self.colors).items())}
    classes = range(num_classes)
    if self.colors:
      return MaskStyle(tuple(classes), tuple(first[label] for label in classes))
    values = tuple(first.get(i, i + self.reduce_zero_label) for i in classes)
    is_whole = max(values) < len(palette)
    return MaskStyle(values, tuple(palette[v] for v in values) if is_whole else ())

  @functools.cached_property
  def _table(self) -> Int32[np.ndarray, "v"]:
    """The class of each value of 16 bits."""
    if self.values:
      table = np.full(_NUM_VALUES, _UNKNOWN, np.int32)
      for value, label in self.values.items():
        table[value] = label
    else:
      table = np.arange(_NUM_VALUES, dtype=np.int32) - self.reduce_zero_label
      # -1 is the value 0 of which the first class takes the place.
      table[table >= (len(self.names) or MAX_CLASSES)] = _UNKNOWN
    if self.ignore_label >= 0:
      table[self.ignore_label] = IGNORED
    return table

  @functools.cached_property
  def _sorted_colors(self) -> tuple[np.ndarray, np.ndarray]:
    """(colours in ascending order, their classes)."""
    pairs = np.array(sorted(self.colors.items()), np.int64)
    return pairs[:, 0], pairs[:, 1]

  def of_values(self, values: Shaped[np.ndarray, "h w"]) -> Int16[np.ndarray, "h w"]:
    """Returns the classes of a mask with one channel.

    Args:
      values: whole numbers in [0, 65535].

    Raises:
      ValueError: a value is no class; the message is the end of a sentence.
    """
    labels = self._table[values]
    if labels.min() == _UNKNOWN:
      wrong = int(values[labels == _UNKNOWN][0])
      if self.values:
        raise ValueError(
          f"has the value {wrong}, which config.data.classes gives to no class; name "
          f"it there (the name {_IGNORE_NAME!r} has it ignored)"
        )
      first = int(self.reduce_zero_label)
      last = first + (len(self.names) or MAX_CLASSES) - 1
      ignored = f", or {self.ignore_label}, which is ignored"
      raise ValueError(
        f"has the label {wrong}, expected {first} to {last}"
        f"{ignored if self.ignore_label >= 0 else ''}; name all classes in "
        "config.data.classes, or set config.data.ignore_label"
      )
    return labels.astype(np.int16)

  def of_colors(self, pixels: Shaped[np.ndarray, "h w 3"]) -> Int16[np.ndarray, "h w"]:
    """Returns the classes of a mask with colours.

    Args:
      pixels: RGB in [0, 255].

    Raises:
      ValueError: a colour is no class; the message is the end of a sentence.
    """
    red, green, blue = np.moveaxis(pixels.astype(np.int32), -1, 0)
    packed = red * 65536 + green * 256 + blue
    colors, classes = self._sorted_colors
    at = np.minimum(np.searchsorted(colors, packed), len(colors) - 1)
    is_wrong = colors[at] != packed
    if is_wrong.any():
      wrong = int(packed[is_wrong][0])
      raise ValueError(
        f"has the color #{wrong:06x}, which config.data.classes gives to no class; "
        f"name it there (the name {_IGNORE_NAME!r} has it ignored)"
      )
    return classes[at].astype(np.int16)


def numbered(label_map: LabelMap, num_classes: int) -> tuple[str, ...]:
  """Returns the names of classes: those of the map, or numbers as masks have them."""
  first = int(label_map.reduce_zero_label)
  return label_map.names or tuple(str(first + i) for i in range(num_classes))


def parse(
  text: str, suffix: str, ignore_label: int, reduce_zero_label: bool
) -> LabelMap:
  """Returns the map that a file of classes says.

  Args:
    text: of the file.
    suffix: of its name: ".txt", ".csv" or ".json".
    ignore_label: as for `LabelMap`.
    reduce_zero_label: as for `LabelMap`.

  Raises:
    ValueError: the file is none of the kinds above; the message is the end of a
      sentence.
  """
  rows = _rows(text, suffix)
  names: list[str] = []
  values: dict[int, int] = {}
  colors: dict[int, int] = {}
  for row in rows:
    name = printable(str(row["name"]).strip())
    if not name:
      raise ValueError(f"has a class without a name; {EXPECTED}")
    label = IGNORED
    if name.lower() != _IGNORE_NAME:
      if name not in names:
        names.append(name)
      label = names.index(name)
    for key, table in (("index", values), ("color", colors)):
      if key in row:
        number = row[key]
        if table.get(number, label) != label:
          raise ValueError(f"gives {row['shown']} to two classes, the second is {name}")
        table[number] = label
    if not {"index", "color"} & set(row) and label == IGNORED:
      raise ValueError(f"names {name!r} without an index or a color to be ignored")
  plain = [row for row in rows if not {"index", "color"} & set(row)]
  if plain and (values or colors):
    raise ValueError(f"gives {plain[0]['name']!r} neither index nor color; {EXPECTED}")
  if plain and len(names) < len(rows):
    raise ValueError("names a class twice; name each once")
  if not names or len(names) > MAX_CLASSES:
    raise ValueError(f"names {len(names)} classes, expected 1 to {MAX_CLASSES}")
  if values and colors:
    raise ValueError("gives indices and colors; give either")
  if reduce_zero_label and (values or colors):
    raise ValueError(
      "says which values or colors classes have, so config.data.reduce_zero_label has "
      "nothing to do; set it to False"
    )
  return LabelMap(tuple(names), values, colors, ignore_label, reduce_zero_label)


def _rows(text: str, suffix: str) -> list[dict[str, Any]]:
  """Returns {"name", and "index" or "color" as numbers, "shown"} of each line."""
  if suffix == ".json":
    try:
      stored = json.loads(text)
    except (ValueError, RecursionError) as error:
      raise ValueError(f"is no JSON ({error}); {EXPECTED}") from error
    if isinstance(stored, dict):
      stored = [
        {"name": name, "index" if isinstance(value, int) else "color": value}
        for name, value in stored.items()
      ]
    if not isinstance(stored, list):
      raise ValueError(f"holds a {type(stored).__name__}; {EXPECTED}")
    return [_row({"name": x} if isinstance(x, str) else x) for x in stored]
  lines = text.splitlines()
  # ADE20K's own list: "Idx  Ratio  Train  Val  Name", separated by tabs.
  delimiter = "\t" if lines and "\t" in lines[0] else ","
  if suffix == ".csv" or delimiter == "\t":
    table = list(csv.reader(io.StringIO(text), delimiter=delimiter))
    titles = [title.strip().lower() for title in table[0]] if table else []
    if "name" not in titles:
      raise ValueError(f"has no column 'name' in its first line; {EXPECTED}")
    found = [dict(zip(titles, cells, strict=False)) for cells in table[1:] if cells]
    if {"r", "g", "b"} <= set(titles):
      found = [{**row, "color": [row.get(c, "") for c in "rgb"]} for row in found]
    keys = ("name", "index", "color") if delimiter == "," else ("name",)
    return [_row({key: row[key] for key in keys if key in row}) for row in found]
  return [_row({"name": line}) for line in lines if line.strip()]


def _row(stored: Any) -> dict[str, Any]:
  """Returns a class with index or colour as numbers.

  Raises:
    ValueError: it is none.
  """
  if not isinstance(stored, dict) or not isinstance(stored.get("name"), str):
    raise ValueError(f"has {stored!r} in place of a class; {EXPECTED}")
  row = {"name": stored["name"]}
  if stored.get("index") not in (None, ""):
    text = str(stored["index"]).strip()
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) >= _NUM_VALUES:
      raise ValueError(
        f"gives {row['name']!r} the index {text}, expected 0 to {_NUM_VALUES - 1}"
      )
    row |= {"index": int(text), "shown": f"the index {text}"}
  if stored.get("color") not in (None, "", []):
    number = _color(stored["color"])
    if number is None:
      raise ValueError(
        f"gives {row['name']!r} the color {stored['color']!r}, expected #rrggbb or "
        "three numbers in [0, 255]"
      )
    row |= {"color": number, "shown": f"the color #{number:06x}"}
  return row


def _color(stored: Any) -> int | None:
  """Returns a colour as one number; None for what is none."""
  if isinstance(stored, str):
    if match := re.fullmatch("#?([0-9a-fA-F]{6})", stored.strip()):
      return int(match[1], 16)
    stored = re.findall("[0-9]+", stored)
  if not isinstance(stored, Sequence) or len(stored) != 3:
    return None
  if not all(re.fullmatch("[0-9]{1,3}", str(x).strip()) for x in stored):
    return None
  red, green, blue = (int(x) for x in stored)
  return None if max(red, green, blue) > 255 else red * 65536 + green * 256 + blue

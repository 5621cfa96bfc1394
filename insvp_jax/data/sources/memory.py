"""One's own images, given in Python: arrays, pairs, data sets of other libraries.

`collect` makes `Examples` of what a caller has; `load` resizes them as those of files
and draws the splits that are missing, by the same draw as `image_folder`. Nothing of
the other libraries is imported: what behaves like one of their data sets is one.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import hashlib
import os
from typing import Any, NoReturn

import ml_collections
import numpy as np

from insvp_jax import trees
from insvp_jax.data import (
  decode,
  duplicates,
  load_or_stream,
  preprocess,
  splits,
)
from insvp_jax.data.sources import class_names as class_names_lib
from insvp_jax.data.sources import image_folder
from insvp_jax.data.sources.labels_csv import IMAGE_COLUMNS, LABEL_COLUMNS
from insvp_jax.data.splits import StreamSplit, TaskData

# config.task of runs on images that were given in Python.
TASK = "memory"
_SOURCE = "images given in Python"
_EXPECTED = (
  "expected a path, a pair (images, labels) of arrays, or what yields (image, label) "
  "pairs or dicts with an image and a label"
)


@dataclasses.dataclass(frozen=True)
class Examples:
  """Labelled images, not yet resized.

  Attributes:
    images: by position, each in any form that `_pixels` takes.
    labels: names of classes, one for each image.
    class_names: those that the data set declares, in its order; () where it does not.
  """

  images: Any
  labels: Sequence[str]
  class_names: tuple[str, ...] = ()


class _Column(Sequence):
  """The images of a data set with random access, decoded when they are looked at."""

  def __init__(self, rows: Any, image_of: Callable[[Any], Any]):
    self._rows, self._image_of = rows, image_of

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: Any) -> Any:
    return self._image_of(self._rows[int(index)])


def refuse() -> NoReturn:
  """Says that images that were given in Python cannot be read again from a file.

  Raises:
    ValueError: always.
  """
  raise ValueError(
    "the images of this run were given in Python and are stored nowhere: call "
    "insvp_jax.adapt with them again, or score a folder of others with --root."
  )


# --- From what a caller has to examples.


def collect(given: Any, what: str, data_config: ml_collections.ConfigDict) -> Examples:
  """Returns the examples of a data set in memory, or of another library.

  Args:
    given: a pair (images, labels), a dict or a data set of such columns, or anything
      that yields (image, label) pairs or dicts.
    what: how errors name it, such as "train".
    data_config: the section config.data; `image_column` and `label_column` are read.

  Raises:
    ValueError: it is something else, or a label cannot be one; the message says which.
  """
  if isinstance(given, tuple) and len(given) == 2:
    return _of_columns(*given, what)
  if hasattr(given, "columns") and hasattr(given, "to_dict"):
    # A table of pandas: a column of paths, or of images.
    given = {str(name): list(given[name]) for name in given.columns}
  if isinstance(given, Mapping):
    if not any(_is_one_dimensional(column) for column in given.values()):
      raise ValueError(
        f"{what} has the splits {', '.join(map(repr, given))}; give one of them, e.g. "
        f"adapt(dataset['train'], test=dataset['test'], ...)."
      )
    image, label = _find_columns(given, what, data_config)
    return _of_columns(given[image], given[label], what)
  if not hasattr(given, "__iter__") and not hasattr(given, "__getitem__"):
    raise ValueError(f"{what} is a {type(given).__name__}, {_EXPECTED}.")
  has_access = hasattr(given, "__len__") and hasattr(given, "__getitem__")
  if has_access and getattr(given, "column_names", None):
    # As a Hugging Face data set: a column of labels comes without decoding images.
    features = getattr(given, "features", None) or {}
    names = {name: features.get(name) for name in given.column_names}
    image, label = _find_columns(names, what, data_config)
    declared = getattr(names[label], "names", None)
    return _examples(
      _Column(given, lambda row: row[image]), list(given[label]), declared, what
    )
  return _of_rows(given, has_access, what, data_config)


def _is_one_dimensional(column: Any) -> bool:
  """Returns whether a column may hold labels: scalars, one for each image."""
  if hasattr(column, "ndim"):
    return column.ndim == 1
  if not isinstance(column, list | tuple) or not column:
    return False
  return isinstance(column[0], str | int | np.generic)


def _of_columns(images: Any, labels: Any, what: str) -> Examples:
  """Returns the examples of a pair of arrays or lists."""
  if getattr(labels, "ndim", 1) != 1:
    raise ValueError(
      f"the labels of {what} have the shape {list(np.shape(labels))}, expected one "
      "label for each image; of rows with a 1 in the column of the class they are "
      "labels.argmax(1)."
    )
  if not hasattr(images, "__len__") or not hasattr(labels, "__len__"):
    raise ValueError(
      f"{what} is a pair of {type(images).__name__} and {type(labels).__name__}, "
      "expected images and labels, as arrays or lists."
    )
  if isinstance(labels, str) or len(images) != len(labels):
    raise ValueError(
      f"{what} has {len(images)} images and {len(labels)} labels; expected a pair "
      "(images, labels) with one label for each image."
    )
  return _examples(images, labels, None, what)


def _of_rows(
  given: Any, has_access: bool, what: str, data_config: ml_collections.ConfigDict
) -> Examples:
  """Returns the examples of what yields pairs or dicts.

  Args:
    given: the data set.
    has_access: whether a row can be had again, so that its image need not be kept.
    what: how errors name it.
    data_config: the section config.data.
  """
  options = decode.DecodeOptions.from_config(data_config)
  labels: list[Any] = []
  images: list[Any] = []
  features = getattr(given, "features", None) or {}
  keys: tuple[Any, Any] | None = None
  rows: Iterable[Any] = (
    (given[i] for i in range(len(given))) if has_access else iter(given)
  )
  for i, row in enumerate(rows):
    if keys is None:
      keys = (0, 1)
      if isinstance(row, Mapping):
        columns = {name: features.get(name, cell) for name, cell in row.items()}
        keys = _find_columns(columns, what, data_config)
    is_row = isinstance(row, Mapping if isinstance(keys[0], str) else tuple | list)
    try:
      if not is_row or (keys == (0, 1) and len(row) != 2):
        raise TypeError
      image, label = row[keys[0]], row[keys[1]]
    except (TypeError, LookupError) as error:
      raise ValueError(
        f"example {i} of {what} is a {type(row).__name__}, {_EXPECTED}."
      ) from error
    labels.append(label)
    if not has_access:
      images.append(_pixels(image, f"image {i} of {what}", options))
  if keys is None:
    raise ValueError(f"{what} has no images.")
  key = keys[0]
  declared = getattr(features.get(keys[1]), "names", getattr(given, "classes", None))
  if not isinstance(declared, list | tuple):
    declared = None
  if has_access:
    return _examples(_Column(given, lambda row: row[key]), labels, declared, what)
  return _examples(images, labels, declared, what)


def _find_columns(
  columns: Mapping[str, Any], what: str, data_config: ml_collections.ConfigDict
) -> tuple[str, str]:
  """Returns the names of the columns of images and of labels.

  Args:
    columns: by name; the values are features of a data set, which may declare names of
      classes, or cells, or whole columns.
    what: how errors name the data set.
    data_config: the section config.data; `image_column` and `label_column` are read.
  """
  named = list(columns)
  declared = [name for name in named if getattr(columns[name], "names", None)]
  found: dict[str, str] = {}
  for kind, known in (("image", IMAGE_COLUMNS), ("label", LABEL_COLUMNS)):
    free = [name for name in named if name not in found.values()]
    if name := data_config[f"{kind}_column"]:
      if name not in named:
        raise ValueError(
          f"{what}: config.data.{kind}_column is {name!r}, but the columns are "
          f"{', '.join(map(repr, named))}.{trees.did_you_mean(name, named)}"
        )
      found[kind] = name
      continue
    usual = [n for word in known for n in free if str(n).lower() == word]
    if not usual:
      pictures = [name for name in free if _is_picture(columns[name])]
      likely = declared if kind == "label" else pictures
      usual = likely if len(likely) == 1 else []
    if not usual and kind == "label" and len(free) == 1:
      usual = free
    if not usual:
      raise ValueError(
        f"{what}: which column has the {kind}s is not clear from "
        f"{', '.join(map(repr, named))}; set config.data.{kind}_column, e.g. "
        f"adapt(..., data=dict({kind}_column={named[0]!r}))."
      )
    found[kind] = usual[0]
  return found["image"], found["label"]


def _is_picture(value: Any) -> bool:
  """Returns whether a feature, or a cell, is one of images."""
  # Hugging Face's feature is called so.
  is_feature = type(value).__name__ == "Image"
  return is_feature or hasattr(value, "getexif") or getattr(value, "ndim", 0) in (2, 3)


def _examples(images: Any, labels: Iterable[Any], declared: Any, what: str) -> Examples:
  """Returns the examples with names of classes as labels."""
  names = tuple(class_names_lib.class_name(str(name)) for name in declared or ())
  if len(set(names)) < len(names):
    raise ValueError(f"{what} declares the classes {names}: a name is there twice.")
  texts = [
    _name(label, names, f"the label of image {i} of {what}")
    for i, label in enumerate(labels)
  ]
  if not texts:
    raise ValueError(f"{what} has no images.")
  return Examples(images, texts, names)


def _name(label: Any, declared: Sequence[str], where: str) -> str:
  """Returns the name of a label's class.

  Args:
    label: a whole number, or a text.
    declared: names of the classes by number; () where numbers have none.
    where: how errors name it.
  """
  if hasattr(label, "item") and np.size(label) == 1:
    label = label.item()
  if isinstance(label, float) and label.is_integer():
    label = int(label)
  if isinstance(label, bytes):
    label = label.decode("utf-8", "replace")
  if isinstance(label, str):
    name = class_names_lib.class_name(label.strip())
    if not name:
      raise ValueError(f"{where} is empty.")
    if declared and name not in declared:
      raise ValueError(
        f"{where} is {name!r}, none of the classes {', '.join(declared[:10])}."
        f"{trees.did_you_mean(name, declared)}"
      )
    return name
  if not isinstance(label, int):
    raise ValueError(f"{where} is {label!r}, expected a whole number or a text.")
  if not declared or isinstance(label, bool):
    return str(label)
  if not 0 <= label < len(declared):
    raise ValueError(
      f"{where} is {label}, expected 0 to {len(declared) - 1}: there are "
      f"{len(declared)} classes. Splits whose labels are not known cannot be used."
    )
  return declared[label]


# --- From examples to splits.


def load(
  examples: Mapping[str, Examples],
  data_config: ml_collections.ConfigDict,
  image_size: int,
) -> TaskData:
  """Returns the task of images in memory.

  Splits that are not given are drawn from train, and large ones are resized as they are
  read, both as of a folder.

  Args:
    examples: of "train" and of what is given of "val" and "test".
    data_config: the section config.data, as for `image_folder.load`.
    image_size: side of the model's input in pixels.

  Raises:
    ValueError: an image or a label cannot be one; the message says which.
  """
  if data_config.skip_corrupt:
    raise ValueError(
      "config.data.skip_corrupt leaves files out, but these images were given in "
      "Python; leave out what is no image before."
    )
  preset = preprocess.get_preset(data_config.preset)
  class_names, labels = _label_all(examples)
  num_bytes = sum(map(len, labels.values())) * preset.stored_size(image_size) ** 2 * 3
  # Together they may be streamed where each fits.
  is_read = preset.crops_whole_images or num_bytes > data_config.resident_mb * 2**20
  streams = {
    split: _stream(part, split, labels[split], data_config, preset, image_size, is_read)
    for split, part in examples.items()
  }
  fractions = {"val": data_config.val_fraction, "test": data_config.test_fraction}
  parts = image_folder.draw_missing_splits(
    labels, fractions, data_config.split_seed, class_names
  )
  decoded = {
    split: splits.to_memory(stream)
    for split, stream in streams.items()
    if not load_or_stream.stays_streamed(
      stream, data_config, preset, trains=split == "train"
    )
  }
  arrays = {
    name: decoded[given].take(positions)
    for name, (given, positions) in parts.items()
    if given in decoded
  }
  names = {
    name: [f"image {i} of {given}" for i in positions]
    for name, (given, positions) in parts.items()
  }
  kept = duplicates.check(arrays, names, data_config.duplicates, _SOURCE)
  for name, positions in kept.items():
    parts[name] = parts[name][0], parts[name][1][positions]
    arrays[name] = arrays[name].take(positions)
  loaded = load_or_stream.load_or_stream_all(
    _part_streams(streams, parts), data_config, preset, arrays
  )
  # Summaries list it last.
  loaded["train_val"] = loaded.pop("train_val")
  return TaskData(TASK, class_names, loaded, source=_SOURCE)


def _label_all(
  examples: Mapping[str, Examples],
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
  """Returns the names of the classes, and class indices int32 [n] of each split."""
  train = examples["train"]
  class_names = train.class_names or class_names_lib.in_order(train.labels)
  if len(class_names) < 2:
    raise ValueError(
      f"train has only one class, {class_names[0]!r}; a classifier needs two or more."
    )
  class_names_lib.tell_alike(_SOURCE, class_names)
  index = {name: i for i, name in enumerate(class_names)}
  labels = {}
  for split, part in examples.items():
    unknown = next((i for i, name in enumerate(part.labels) if name not in index), None)
    if unknown is not None:
      name = part.labels[unknown]
      raise ValueError(
        f"the label of image {unknown} of {split} is {name!r}, a class that train does "
        f"not have.{trees.did_you_mean(name, class_names)}"
      )
    labels[split] = np.array([index[name] for name in part.labels], np.int32)
  return class_names, labels


def _part_streams(
  streams: Mapping[str, StreamSplit], parts: Mapping[str, tuple[str, np.ndarray]]
) -> dict[str, StreamSplit]:
  """Returns the streams of train, val and test, and of train and val together."""
  of_parts = {name: streams[given].take(i) for name, (given, i) in parts.items()}
  if "val" not in of_parts:
    return {**of_parts, "train_val": of_parts["train"]}
  if parts["val"][0] == "train":
    positions = np.concatenate([parts["train"][1], parts["val"][1]])
    both = streams["train"].take(positions)
  else:
    both = splits.chain(of_parts["train"], of_parts["val"])
  return {**of_parts, "train_val": both}


def _stream(
  examples: Examples,
  what: str,
  labels: np.ndarray,
  data_config: ml_collections.ConfigDict,
  preset: preprocess.Preset,
  image_size: int,
  is_read: bool,
) -> StreamSplit:
  """Returns a split that resizes images while it is read.

  Args:
    examples: of the split.
    what: how errors name it.
    labels: class indices, int32 [n].
    data_config: the section config.data.
    preset: how images are resized.
    image_size: side of the model's input in pixels.
    is_read: whether all images are read now, for a digest of their content and for
      their shape. Of splits that will be held in memory, the squares have a digest.
  """
  options = decode.DecodeOptions.from_config(data_config)

  def pixels(position: int) -> np.ndarray:
    return _pixels(examples.images[position], f"image {position} of {what}", options)

  def opened(requests: Iterable[np.ndarray], whole: bool) -> Iterator[Any]:
    resize = preprocess.resize_whole if whole else preprocess.resize
    for request in requests:
      images = []
      for position in request.tolist():
        try:
          images.append(resize(preset, pixels(position), image_size=image_size))
        except ValueError as error:
          text = str(error)
          where = f"image {position} of {what}"
          raise ValueError(text if where in text else f"{where}: {text}") from error
      # Images of one size become one array.
      yield images if whole else np.stack(images)

  size = preset.stored_size(image_size)
  if not is_read:
    return StreamSplit(labels, size, "", opened, square=not preset.keeps_aspect)
  sha, square = hashlib.sha256(f"{preset.resize_key} {size}".encode()), True
  for position in range(len(labels)):
    image = pixels(position)
    square &= size * max(image.shape[:2]) // min(image.shape[:2]) == size
    sha.update(f"{image.shape}".encode())
    sha.update(np.ascontiguousarray(image))
  sha.update(np.ascontiguousarray(labels))
  square |= not preset.keeps_aspect
  return StreamSplit(labels, size, sha.hexdigest(), opened, square=square)


def _pixels(image: Any, where: str, options: decode.DecodeOptions) -> np.ndarray:
  """Returns the pixels uint8 [h, w, 3] of an image in any form.

  Args:
    image: an array uint8 [h, w, 3] or grey [h, w], an image of Pillow, a path, the
      content of a file, or a dict with "bytes" or "path" as data sets have them.
    where: how errors name it.
    options: how files are decoded.

  Raises:
    ValueError: it is none; the message says what came.
    FileNotFoundError: there is no file of that path.
  """
  if isinstance(image, Mapping) and {"bytes", "path"} & set(image):
    image = image.get("bytes") or image.get("path")
  if isinstance(image, bytes):
    return decode.decode_image(image, where, options)
  if isinstance(image, str | os.PathLike):
    return decode.read_image(image, options)
  if hasattr(image, "getexif"):
    return decode.from_pillow(image, where, options)
  array = np.asarray(image)
  if array.dtype != np.uint8:
    hint = ""
    if array.dtype.kind in "fiu":
      hint = ": of values in [0, 1] that is np.uint8(np.round(255 * image))"
    raise ValueError(
      f"{where} is {array.dtype}{list(array.shape)}, expected uint8[h, w, 3] with "
      f"pixels in [0, 255]{hint}."
    )
  if array.ndim == 2 or (array.ndim == 3 and array.shape[-1] == 1):
    array = np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=-1)
  if array.ndim != 3 or array.shape[-1] != 3 or 0 in array.shape:
    hint = ""
    if array.ndim == 3 and array.shape[0] == 3:
      hint = "; np.moveaxis(image, 0, -1) puts the channels last"
    raise ValueError(f"{where} is uint8{list(array.shape)}, expected [h, w, 3]{hint}.")
  return array

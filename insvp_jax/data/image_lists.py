"""Image files with labels, in a folder or an archive, as a split."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
from typing import Any

from absl import logging
import ml_collections
import numpy as np

from insvp_jax.data import decode, files, placement, preprocess, threads
from insvp_jax.data import splits as splits_lib
from insvp_jax.data.arrays import TaskData
from insvp_jax.data.splits import StreamSplit
from insvp_jax.data.tasks import Task

# Decoded images that wait to be used, in bytes, and their number at the most.
_AHEAD_BYTES = 2**26
_AHEAD = 256


@dataclasses.dataclass(frozen=True)
class ImageList:
  """Labelled image files.

  Attributes:
    root: the folder or archive, as a user names it.
    names: of the files in it.
    labels: their class indices.
  """

  root: str
  names: Sequence[str]
  labels: np.ndarray

  def take(self, positions: np.ndarray) -> "ImageList":
    """Returns the files at some positions, in that order."""
    names = [self.names[i] for i in positions]
    return ImageList(self.root, names, self.labels[positions])

  def stream(
    self, preset: preprocess.Preset, image_size: int, square: bool = False
  ) -> StreamSplit:
    """Returns the split of these files, decoded while it is read.

    Args:
      preset: says how images are resized.
      image_size: side of the model's input in pixels.
      square: whether all images are known to be squares.

    Raises:
      ValueError: there are no files.
    """
    size = preset.stored_size(image_size)
    with files.open_root(self.root) as root:
      stamp = json.dumps(root.fingerprint(self.names))
      sizes = root.sizes(self.names)
    sha = hashlib.sha256(f"{preset.resize} {size}".encode())
    sha.update(json.dumps([list(self.names), sizes]).encode())
    sha.update(np.ascontiguousarray(self.labels))
    return StreamSplit(
      labels=self.labels,
      size=size,
      identity=sha.hexdigest(),
      open=functools.partial(_read, self, preset, image_size),
      square=square or not preset.keeps_aspect,
      stamp=hashlib.sha256(stamp.encode()).hexdigest(),
    )


def join(first: ImageList, second: ImageList) -> ImageList:
  """Returns both, one after the other; they lie in the same root."""
  labels = np.concatenate([first.labels, second.labels])
  return ImageList(first.root, [*first.names, *second.names], labels)


def _read(
  images: ImageList,
  preset: preprocess.Preset,
  image_size: int,
  requests: Iterable[np.ndarray],
  whole: bool,
) -> Iterator[Any]:
  """Yields the decoded and resized images of each request."""
  resize = preprocess.resize_whole if whole else preprocess.resize
  with files.open_root(images.root) as root:

    def work(position: int) -> np.ndarray:
      name = images.names[position]
      return resize(
        preset, decode.decode(root.read(name), root.describe(name)), image_size
      )

    bytes_each = 3 * preset.stored_size(image_size) ** 2
    ahead = max(8, min(_AHEAD, _AHEAD_BYTES // bytes_each))
    read = functools.partial(threads.ordered_map, work, ahead=ahead)
    for piece in splits_lib.grouped(requests, read):
      # Images of one size become one array.
      yield piece if whole else np.stack(piece)


def task_data(
  task: Task,
  lists: Mapping[str, ImageList],
  class_names: Sequence[str],
  data_config: ml_collections.ConfigDict,
  image_size: int,
) -> TaskData:
  """Returns a published task that is read from image files.

  Args:
    task: a row of `tasks.TASKS`.
    lists: train, val and test; train_val where it is not train followed by val.
    class_names: one per class.
    data_config: the section config.data.
    image_size: side of the model's input in pixels.

  Raises:
    FileNotFoundError: a listed file is not there.
    ValueError: a label is no class index.
  """
  preset = preprocess.get_preset(data_config.preset)
  for split, images in lists.items():
    _check_labels(images, len(class_names), split, task.name)
  everything = {"train_val": join(lists["train"], lists["val"]), **lists}
  streams = {
    name: images.stream(preset, image_size) for name, images in everything.items()
  }
  sizes = {name: len(stream) for name, stream in streams.items()}
  for warning in task.unpublished_sizes(sizes, data_config.subset):
    logging.warning("%s", warning)
  return TaskData(
    task.name,
    tuple(class_names),
    placement.place_all(streams, data_config, preset),
    source=f"images of {data_config.root}",
    final_split=task.final_split(data_config.subset),
  )


def check_files(root: files.Root, names: Sequence[str], listed_in: str) -> None:
  """Checks that listed files are there.

  Raises:
    FileNotFoundError: one is not; the message names it and the list.
  """
  missing = [
    name for name, size in zip(names, root.sizes(names), strict=True) if size < 0
  ]
  if missing:
    raise FileNotFoundError(
      f"{listed_in} names {len(missing)} files that are not there, first "
      f"{root.describe(missing[0])}; unpack the images there, or copy the list anew."
    )


def _check_labels(images: ImageList, num_classes: int, split: str, task: str) -> None:
  wrong = np.flatnonzero((images.labels < 0) | (images.labels >= num_classes))
  if wrong.size:
    raise ValueError(
      f"the label of {images.names[wrong[0]]} ({split} of {task} in {images.root}) is "
      f"{images.labels[wrong[0]]}, expected 0 to {num_classes - 1}; mend the list."
    )

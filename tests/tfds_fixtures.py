"""TFDS data sets that the tests prepare for themselves: real TFRecords, real names."""

from collections.abc import Callable, Mapping, Sequence
import os
from pathlib import Path
from typing import Any

from data_fixtures import encode, pixels, png
import numpy as np
from PIL import Image
import pytest

from insvp_jax.data.sources import tfds_builder

# A shard: its records, or how many times it holds the one that no test looks at.
Shard = Sequence[bytes] | int
# Sides of images are divided into 8 x 8 blocks, one bit of a number each.
_GRID = 8
_BITS = 21
UNSEEN = 2**_BITS - 1
_LONGEST = 20_000


def import_tfds() -> Any:
  """Returns TFDS; tests that need it are skipped where it is not installed."""
  pytest.importorskip("tensorflow_datasets")
  return tfds_builder.import_tfds()


def features_of(spec: str) -> Any:
  """Returns TFDS's description of what an example of a data set holds."""
  return import_tfds().builder(spec, data_dir="nowhere").info.features


def bit_image(
  number: int, height: int, width: int, low: int = 0, high: int = 255
) -> np.ndarray:
  """Returns a grey image [height, width] that tells its number, below 2**21.

  Args:
    number: what `number_in` finds.
    height: in pixels, a multiple of 8.
    width: in pixels, a multiple of 8.
    low: the grey level of bits that are not set.
    high: the grey level of bits that are set.
  """
  bits = [number >> i & 1 for i in range(_BITS)]
  # The last one shows that an image is not turned or mirrored.
  grid = np.array([*bits, *[0] * (_GRID**2 - _BITS - 1), 1]).reshape(_GRID, _GRID)
  levels = np.where(grid, high, low).astype(np.uint8)
  return levels.repeat(height // _GRID, 0).repeat(width // _GRID, 1)


def number_in(image: np.ndarray) -> int:
  """Returns the number of an image of `bit_image`, whatever its size now."""
  centres = (np.arange(_GRID) + 0.5) / _GRID
  rows, columns = ((centres * side).astype(int) for side in image.shape[:2])
  *bits, last = (image[rows][:, columns, 0] > 100).reshape(-1).tolist()
  assert last and not any(bits[_BITS:]), "this image shows no number"
  return sum(bit << i for i, bit in enumerate(bits[:_BITS]))


def coloured(grey: np.ndarray) -> np.ndarray:
  """Returns an image [h, w, 3] whose green is the negative of its red."""
  return np.stack([grey, 255 - grey, np.full_like(grey, 77)], axis=-1)


def jpeg(array: np.ndarray) -> bytes:
  """Returns a JPEG file's content that keeps colours where they are."""
  return encode(Image.fromarray(array), "JPEG", quality=95, subsampling=0)


def record(features: Any, **given: Any) -> bytes:
  """Returns what TFDS stores of an example; what is not given is filled in."""
  return features.serialize_example(_filled(features, given))


def _filled(features: Any, given: Mapping[str, Any]) -> dict[str, Any]:
  kinds = import_tfds().features
  example = {}
  for name, feature in features.items():
    value = given.get(name)
    if isinstance(feature, kinds.Sequence):
      value = value or {}
      length = len(next(iter(value.values()), ()))
      value = {
        inner: value.get(inner, [_default(kinds, part)] * length)
        for inner, part in feature.feature.items()
      }
    example[name] = _default(kinds, feature) if value is None else value
  return example


def _default(kinds: Any, feature: Any) -> Any:
  if isinstance(feature, kinds.Image):
    return png(np.zeros((8, 8, 3)[: 2 if feature.shape[-1] == 1 else 3], np.uint8))
  if isinstance(feature, kinds.BBoxFeature):
    return kinds.BBox(0.0, 0.0, 0.5, 0.5)
  if isinstance(feature, kinds.Text):
    return ""
  return np.zeros(feature.shape, feature.np_dtype)


class Copies:
  """Makes records that differ from one in a few plain features, quickly."""

  def __init__(self, original: bytes):
    import tensorflow as tf

    self._example = tf.train.Example.FromString(original)

  def __call__(self, **values: bytes | int) -> bytes:
    for name, value in values.items():
      stored = self._example.features.feature[name]
      kind = stored.bytes_list if isinstance(value, bytes) else stored.int64_list
      kind.value[:] = [value]
    return self._example.SerializeToString()


def shards_of(
  total: int, seen: Sequence[tuple[int, int]], make: Callable[[int], bytes]
) -> list[Shard]:
  """Cuts a split of `total` examples into shards of uneven length.

  Args:
    total: number of examples.
    seen: ascending ranges of numbers that tests look at; each lies in two shards.
    make: maps a number to its record.
  """
  shards: list[Shard] = []
  position = 0
  for start, stop in [*seen, (total, total)]:
    while position < start:
      shards.append(min(_LONGEST, start - position))
      position += shards[-1]
    for part in (range(start, start + 5), range(start + 5, stop)):
      if part and part.start < stop:
        shards.append([make(i) for i in part])
    position = stop
  return shards


def prepare(
  root: Path,
  spec: str,
  splits: Mapping[str, Sequence[Shard]],
  *,
  unseen: bytes = b"",
  class_names: Sequence[str] = (),
  suffix: str = "tfrecord",
) -> Path:
  """Writes what TFDS would prepare.

  Args:
    root: TFDS's folder.
    spec: of a builder that TFDS knows, with a version where not its default.
    splits: the shards of each.
    unseen: what shards given as numbers hold.
    class_names: of the feature "label", where they come with the download.
    suffix: of files; anything but "tfrecord" is another format.

  Returns:
    The folder of the files.
  """
  tfds = import_tfds()
  options = {} if suffix == "tfrecord" else {"file_format": suffix}
  builder = tfds.builder(spec, data_dir=str(root), **options)
  folder = Path(builder.data_dir)
  folder.mkdir(parents=True)
  infos = []
  for split, shards in splits.items():
    for i, shard in enumerate(shards):
      name = f"{builder.name}-{split}.{suffix}-{i:05d}-of-{len(shards):05d}"
      _write(folder / name, shard, unseen)
    infos.append(
      tfds.core.splits.SplitInfo(
        name=split,
        shard_lengths=[s if isinstance(s, int) else len(s) for s in shards],
        num_bytes=1,
        filename_template=tfds.core.ShardedFileTemplate(
          data_dir=builder.data_path,
          dataset_name=builder.name,
          split=split,
          filetype_suffix=suffix,
        ),
      )
    )
  if class_names:
    builder.info.features["label"].names = list(class_names)
  builder.info.set_splits(tfds.core.splits.SplitDict(infos))
  builder.info.write_to_directory(builder.data_path)
  return folder


def _write(path: Path, shard: Shard, unseen: bytes):
  import tensorflow as tf

  content = [unseen] * shard if isinstance(shard, int) else shard
  # Alike shards are one file under several names.
  same = path.parent.parent / f".{path.parent.name}-{shard}"
  if isinstance(shard, int) and same.exists():
    os.link(same, path)
    return
  with tf.io.TFRecordWriter(str(path)) as writer:
    for data in content:
      writer.write(data)
  if isinstance(shard, int):
    os.link(path, same)


def prepare_cifar(
  root: Path,
  name: str = "cifar100",
  shards: Sequence[int] = (30_000, 15_000, 200),
  *,
  num_test: int = 12,
  seen: Callable[[int], bool] = lambda number: number < 800 or number >= 45_000,
) -> Path:
  """Prepares CIFAR-10 or CIFAR-100 with numbered images of `data_fixtures.pixels`.

  The i-th training image shows i % 65536 where `seen` says so, black elsewhere; its
  label is i % k. Test images show 50000 + i.

  Args:
    root: TFDS's folder.
    name: "cifar10" or "cifar100".
    shards: lengths of the training split's.
    num_test: size of the test split.
    seen: which training images show their number.

  Returns:
    The root.
  """
  features = features_of(name)
  num_classes = features["label"].num_classes
  copies = Copies(record(features, image=png(pixels(0, 32)), id="train_00000"))
  black = png(np.zeros((32, 32, 3), np.uint8))
  hidden = [copies(image=black, label=label) for label in range(num_classes)]

  def make(split: str, number: int, place: int) -> bytes:
    if split == "train" and not seen(place):
      return hidden[place % num_classes]
    return copies(
      image=png(pixels(number, 32)),
      label=place % num_classes,
      id=f"{split}_{place:05d}".encode(),
    )

  starts = np.cumsum([0, *shards]).tolist()
  train = [
    [make("train", i % 65536, i) for i in range(start, start + length)]
    for start, length in zip(starts, shards, strict=False)
  ]
  test = [[make("test", 50_000 + i, i) for i in range(num_test)]]
  names = [f"thing {i:02d}" for i in range(num_classes)]
  prepare(root, name, {"train": train, "test": test}, class_names=names)
  return root


def prepare_named(
  root: Path,
  spec: str,
  feature: str,
  names: Sequence[str],
  labels: Sequence[int],
  test: tuple[str, int],
) -> np.ndarray:
  """Prepares a set whose training images have names, in an order of its own.

  Every 50th image shows its number, as `number_in` finds it.

  Args:
    root: TFDS's folder.
    spec: of a builder that TFDS knows.
    feature: the one that holds names; "" for none.
    names: of the training images, in the order of the original files.
    labels: of the training images.
    test: name and size of the test split.

  Returns:
    The number of the original file at each place of the training split.
  """
  features = features_of(spec)

  def image(number: int) -> bytes:
    return png(coloured(bit_image(number, 32, 32)))

  unseen = record(features, image=image(UNSEEN))
  copies, hidden = Copies(unseen), image(UNSEEN)

  def make(number: int) -> bytes:
    named = {feature: names[number].encode()} if feature else {}
    shown = hidden if number % 50 else image(number)
    return copies(image=shown, label=int(labels[number]), **named)

  order = np.random.default_rng(7).permutation(len(labels))
  content = [make(i) for i in order.tolist()]
  cut = len(content) // 3
  splits = {"train": [content[:cut], content[cut:]], test[0]: [test[1]]}
  prepare(root, spec, splits, unseen=unseen)
  return order


def places(builder: Any, split: str, records: Any) -> np.ndarray:
  """Returns where in a split records are, by their files and rows."""
  starts = np.cumsum([0, *builder.info.splits[split].shard_lengths])
  shards = [int(name[-14:-9]) for name in records.files]  # ...-00012-of-00034
  return starts[np.array(shards)[records.file]] + records.row

"""Reading a large split: images per second, and memory.

  python -m benchmarks.input [--images=8000] [--json=input.json]
  python -m benchmarks.input --memory [--images=73728]

The first writes JPEG files of 500 x 375 pixels as TFDS would prepare them, and decodes
and resizes them to 224 pixels (preset vtab): this package's stream in the split's
order and in a shuffled one, and tf.data alone with the same operations in the files'
order, in turn, there and back; medians of eight rounds. The second evaluates a split
of 64-pixel images at 224 pixels with a model that does nothing, and compares the memory
of the process before and after its first batch, and at its highest.
"""

import argparse
from collections.abc import Callable, Iterator
import io
import json
import os
from pathlib import Path
import resource
import statistics
import tempfile
import time
from typing import Any

from clu.metrics import Average
import jax
import ml_collections
import numpy as np
from PIL import Image

from insvp_jax.config import defaults
from insvp_jax.data import load_data, pipeline
from insvp_jax.data.sources import tfds_builder
from insvp_jax.data.tasks import TASKS
from insvp_jax.train import evaluate

TASK = "dtd"  # a builder of plain images and labels
SIZE = 224
BATCH = 64
ROUNDS = 8
DISTINCT = 64


def photographs(height: int, width: int, encoding: str) -> list[bytes]:
  """Returns files that compress about as photographs do."""
  rng = np.random.default_rng(0)
  files = []
  for _ in range(DISTINCT):
    coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    noisy = smooth + rng.integers(-12, 12, smooth.shape)
    stream = io.BytesIO()
    image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
    image.save(stream, encoding, **({"quality": 90} if encoding == "JPEG" else {}))
    files.append(stream.getvalue())
  return files


def prepare(folder: Path, files: list[bytes], num_test: int) -> None:
  """Writes what TFDS would prepare under the name of `TASK`."""
  tfds = tfds_builder.import_tfds()
  import tensorflow as tf

  def example(i: int) -> bytes:
    feature = {
      "image": tf.train.Feature(
        bytes_list=tf.train.BytesList(value=[files[i % len(files)]])
      ),
      "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[i % 47])),
      "file_name": tf.train.Feature(
        bytes_list=tf.train.BytesList(value=[f"{i}.jpg".encode()])
      ),
    }
    features = tf.train.Features(feature=feature)
    return tf.train.Example(features=features).SerializeToString()

  builder = tfds.builder(TASKS[TASK].spec.split(":")[0], data_dir=str(folder))
  Path(builder.data_dir).mkdir(parents=True)
  infos = []
  for split, number in (("train", 800), ("validation", 200), ("test", num_test)):
    template = tfds.core.ShardedFileTemplate(
      data_dir=builder.data_path,
      dataset_name=builder.name,
      split=split,
      filetype_suffix="tfrecord",
    )
    path = f"{builder.data_dir}/{builder.name}-{split}.tfrecord-00000-of-00001"
    with tf.io.TFRecordWriter(path) as writer:
      for i in range(number):
        writer.write(example(i))
    infos.append(
      tfds.core.splits.SplitInfo(
        name=split, shard_lengths=[number], num_bytes=1, filename_template=template
      )
    )
  builder.info.set_splits(tfds.core.splits.SplitDict(infos))
  builder.info.write_to_directory(builder.data_path)


def data_config(folder: Path) -> ml_collections.ConfigDict:
  """Returns the section config.data: everything is streamed, nothing cached."""
  config = defaults().data
  config.data_dir, config.resident_mb, config.cache_dir = str(folder), 0, "off"
  return config


def plain(folder: Path) -> Iterator[Any]:
  """Yields batches of the test split by tf.data alone, the same operations."""
  import tensorflow as tf

  (path,) = folder.rglob("*-test.tfrecord-*")
  features = {
    "image": tf.io.FixedLenFeature([], tf.string),
    "label": tf.io.FixedLenFeature([], tf.int64),
  }

  def decode(data):
    example = tf.io.parse_single_example(data, features)
    image = tf.io.decode_image(example["image"], 3, expand_animations=False)
    image.set_shape([None, None, 3])
    image = tf.raw_ops.ResizeBilinear(images=image[None], size=[SIZE, SIZE])[0]
    return tf.cast(tf.round(image), tf.uint8), example["label"]

  data = tf.data.TFRecordDataset(str(path))
  data = data.map(decode, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
  return data.batch(BATCH).prefetch(2).as_numpy_iterator()


def images_per_second(batches: Iterator[Any], number: int) -> float:
  """Returns the rate at which all batches come."""
  start = time.perf_counter()
  for _ in batches:
    pass
  return number / (time.perf_counter() - start)


def throughput(num_images: int) -> dict[str, Any]:
  """Returns images per second of each way, and the ratio to tf.data alone."""
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    prepare(folder, photographs(375, 500, "JPEG"), num_images)
    split = load_data(TASK, data_config(folder), SIZE).splits["test"]
    shuffled = np.random.default_rng(0).permutation(num_images)

    def stream(order: np.ndarray) -> Iterator[Any]:
      starts = range(0, num_images, BATCH)
      return split.read(order[start : start + BATCH] for start in starts)

    ways: dict[str, Callable[[], Iterator[Any]]] = {
      "tf.data": lambda: plain(folder),
      "stream": lambda: stream(np.arange(num_images)),
      "stream, shuffled": lambda: stream(shuffled),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for i in range(ROUNDS):
      # There and back, so that a machine that slows down favours nobody.
      for way in list(ways)[:: (-1) ** i]:
        rates[way].append(images_per_second(ways[way](), num_images))
  ratios = {
    way: statistics.median(np.divide(rates[way], rates["tf.data"])) for way in rates
  }
  return {
    "images": num_images,
    "images_per_second": {way: statistics.median(r) for way, r in rates.items()},
    "ratio": ratios,
    "cpus": os.cpu_count(),
  }


def resident_mib() -> float:
  """Returns the memory of this process in MiB."""
  pages = int(Path("/proc/self/statm").read_text().split()[1])
  return pages * resource.getpagesize() / 2**20


def memory(num_images: int) -> dict[str, float]:
  """Returns MiB before and after evaluating a split, and at the highest."""
  highest = 0.0

  def eval_step(batch: dict[str, jax.Array]) -> dict[str, Average]:
    nonlocal highest
    highest = max(highest, resident_mib())
    return count(batch["images"], batch["mask"])

  @jax.jit
  def count(images, mask):
    real = mask.sum().astype(int)
    total = images.astype("float32").sum()
    accuracy = Average(real, real)
    by_class = Average(real[None], real[None])
    return {
      "accuracy": accuracy,
      "loss": Average(total, real),
      "class_accuracy": by_class,
      "class_prediction": by_class,
    }

  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    prepare(folder, photographs(64, 64, "PNG"), num_images)
    split = load_data(TASK, data_config(folder), SIZE).splits["test"]
    # Compiled, and TensorFlow started: the base.
    count(np.zeros((256, SIZE, SIZE, 3), np.uint8), np.ones(256))
    before = resident_mib()
    start = time.perf_counter()
    batches = pipeline.eval_batches(split, batch_size=256)
    found = evaluate.evaluate(eval_step, batches)
    seconds = time.perf_counter() - start
  assert found["num_examples"] == num_images
  return {
    "images": num_images,
    "MiB before": before,
    "MiB at the highest": highest,
    "MiB above": highest - before,
    "MiB of the split in memory": num_images * SIZE**2 * 3 / 2**20,
    "images_per_second": num_images / seconds,
  }


def main(argv: list[str] | None = None) -> None:
  """Measures, prints a line per figure and writes JSON if asked to."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--images", type=int, help="default 8000; --memory: 73728")
  parser.add_argument("--memory", action="store_true", help="measure memory instead")
  parser.add_argument("--json", help="write the result there")
  args = parser.parse_args(argv)
  measure, default = (memory, 73728) if args.memory else (throughput, 8000)
  found = measure(args.images or default)
  for name, value in found.items():
    values = value.items() if isinstance(value, dict) else [("", value)]
    for way, number in values:
      print(f"{name} {way}".strip() + f": {number:,.2f}")
  if args.json:
    Path(args.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
  main()

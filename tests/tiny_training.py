"""Makes what small trainings need: images in memory or on disk, and a config."""

from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np
from PIL import Image

from insvp_jax.config import defaults
from insvp_jax.data import ArraySplit, TaskData
from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.train import parameters, trainer
from insvp_jax.train import program as program_lib

CLASSES = ("ant", "bee", "cat")
SIZE = 16
# 24 training images: 3 steps of 8 an epoch. No size of a split divides another.
SPLITS = {"train": 24, "val": 10, "test": 13}


def tiny_config(method: str = "insvp", **changes: Any) -> ConfigDict:
  """Returns a config of a two-block ViT; `optim__lr=1.0` changes config.optim.lr."""
  config = defaults()
  config.method = method
  config.batch_size = 8
  config.eval_batch_size = 8
  config.total_epochs = 2.0
  config.image_size = SIZE
  config.tensorboard = False
  config.log_every_steps = 1
  config.optim.lr = 0.01
  config.insvp.prompt_length = 2
  config.insvp.global_kernels = (3, 3)
  config.insvp.global_dilations = (1, 1)
  config.vpt_deep.prompt_length = 2
  config.data.cache_dir = "off"
  config.backbone.name = "mu/4"
  config.backbone.weights = "random"
  config.backbone.width = config.backbone.mlp_dim = 16
  config.backbone.depth = 2
  config.backbone.num_heads = 2
  for name, value in changes.items():
    section, _, field = name.rpartition("__")
    (config[section] if section else config)[field] = value
  return config


def make_split(number: int, seed: int) -> ArraySplit:
  """Returns images whose classes differ in colour, so that they can be learnt."""
  rng = np.random.default_rng(seed)
  labels = np.arange(number, dtype=np.int32) % len(CLASSES)
  images = rng.integers(0, 128, (number, SIZE, SIZE, 3), np.uint8)
  for i, label in enumerate(labels):
    images[i, ..., label] += 100
  return ArraySplit(images, labels)


def make_data(without: tuple[str, ...] = ()) -> TaskData:
  """Returns a task with the splits of `SPLITS` and train_val."""
  splits = {name: make_split(n, i) for i, (name, n) in enumerate(SPLITS.items())}
  train, val = splits["train"], splits["val"]
  splits["train_val"] = ArraySplit(
    np.concatenate([train.images, val.images]),
    np.concatenate([train.labels, val.labels]),
  )
  splits = {name: split for name, split in splits.items() if name not in without}
  return TaskData("insects", CLASSES, splits)


def prepare(
  config: ConfigDict, data: TaskData | None = None, devices: int | None = None
) -> trainer.Prepared:
  """Does what `trainer.prepare` does, with images from memory on some devices."""
  data = data or make_data()
  mesh = mesh_lib.create_mesh(jax.devices()[:devices], fsdp=config.backbone.fsdp)
  number = len(data.splits[config.data.train_split])
  program = program_lib.create_program(config, data.num_classes, number, mesh)
  weights, backbone = parameters.load_weights(config, program.model)
  return trainer.Prepared(data, weights, backbone, program)


def write_images(root: Path, splits: tuple[str, ...] = tuple(SPLITS)) -> Path:
  """Writes images of `make_data` as <root>/<split>/<class>/<i>.png."""
  data = make_data()
  for name in splits:
    split = data.splits[name]
    for i, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
      path = root / name / CLASSES[label] / f"{i:02d}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(image).save(path)
  return root

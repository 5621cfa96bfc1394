"""Makes what small trainings need, and reads what they leave behind."""

from collections.abc import Callable, Iterator
import dataclasses
import json
from pathlib import Path
import signal
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np
from PIL import Image

from insvp_jax import trees
from insvp_jax.checkpoints.files import find_steps, read_arrays, read_json
from insvp_jax.config import defaults
from insvp_jax.data import ArraySplit, StreamSplit, TaskData
from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.train import program as program_lib
from insvp_jax.train import state as state_lib
from insvp_jax.train import trainer

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
  config.data.preset = "vtab"
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


def streamed(data: TaskData) -> TaskData:
  """Returns the task with splits that are read like streams."""

  def stream(split: ArraySplit) -> StreamSplit:
    return StreamSplit(
      split.labels,
      split.stored_size,
      split.digest,
      lambda requests, whole: split.read(requests, whole=whole),
    )

  splits = {name: stream(split) for name, split in data.splits.items()}
  return dataclasses.replace(data, splits=splits)


# By method, the last program: where the model is the same, so are its draws.
PROGRAMS: dict[str, program_lib.Program] = {}


def prepare(
  config: ConfigDict, data: TaskData | None = None, devices: int = 1
) -> trainer.Prepared:
  """Does what `trainer.prepare` does, with images from memory on so many devices.

  On several ones a program takes longer to compile, and a checkpoint is written by a
  program for each shape.
  """
  data = data or make_data()
  mesh = mesh_lib.create_mesh(jax.devices()[:devices], fsdp=config.backbone.fsdp)
  number = len(data.splits[config.data.train_split])
  program = program_lib.create_program(
    config, data.num_classes, number, mesh, like=PROGRAMS.get(config.method)
  )
  PROGRAMS[config.method] = program
  weights, backbone = state_lib.load_weights(config, program.model)
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


# What a run leaves behind.


def stored(workdir: Path) -> tuple[str, int, Any, dict[str, Any]]:
  """Returns all that the newest checkpoint holds, without the clock."""
  where = find_steps(workdir)[0]
  arrays = {item: read_arrays(where, item) for item in ("adapter", "optimizer")}
  progress = read_json(where, "progress")
  return where.name, progress["step"], progress["rng"], arrays


def metrics(workdir: Path) -> list[dict[str, Any]]:
  """Returns the lines of metrics.jsonl without what depends on the clock."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  return [{k: v for k, v in r.items() if k != "images_per_second"} for r in rows]


def assert_same(a: tuple, b: tuple) -> None:
  """Asserts that two runs stored the same bits."""
  assert a[:3] == b[:3]
  a, b = trees.flatten(a[3]), trees.flatten(b[3])
  assert a.keys() == b.keys() and len(a) > 6
  for name in a:
    assert np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes(), name


def stored_events(workdir: Path) -> Iterator[Any]:
  """Yields the events of all TensorBoard files, oldest first."""
  from tensorboard.compat.proto import event_pb2
  from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

  for file in sorted(workdir.glob("events.out.tfevents.*")):
    reader = PyRecordReader_New(str(file))
    while True:
      try:
        reader.GetNext()
      except Exception as error:
        assert type(error).__name__ == "OutOfRangeError"
        break
      yield event_pb2.Event.FromString(reader.record())


# What happens in the middle of a run.


def at_step(monkeypatch: Any, step: int, action: Callable[[], Any]) -> None:
  """Makes the loop call `action` once a step is taken and before it is saved."""
  original = trainer._is_preempted

  def patched(first, last):
    if first <= step <= last:
      action()
    return original(first, last)

  monkeypatch.setattr(trainer, "_is_preempted", patched)


def stop_by(signum: int) -> Callable[[], None]:
  """Returns an action that sends a signal to this process."""
  return lambda: signal.raise_signal(signum)


def run_to_state(
  monkeypatch: Any, config: ConfigDict, workdir: Path, prepared: trainer.Prepared
) -> list[dict[str, np.ndarray]]:
  """Trains and returns (parameters before, parameters after), flat and on the host."""
  states = []
  original = trainer.train_loop

  def train_loop(config, prepared, state, **kwargs):
    states.append(jax.device_get(trees.flatten(state.params)))
    state = original(config, prepared, state, **kwargs)
    states.append(jax.device_get(trees.flatten(state.params)))
    return state

  monkeypatch.setattr(trainer, "train_loop", train_loop)
  trainer.train(config, workdir, prepared=prepared)
  return states


def with_step(prepared: trainer.Prepared, **steps: Any) -> trainer.Prepared:
  """Returns `prepared` with another `train_step` or `multi_step`."""
  program = dataclasses.replace(prepared.program)
  # In the place where the cached property would be.
  program.__dict__.update(steps)
  return dataclasses.replace(prepared, program=program)

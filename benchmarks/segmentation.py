"""Segmentation of textures by several methods: mIoU on images that none has seen.

  python -m benchmarks.segmentation [--methods=linear,vpt_deep] [--steps=150]
      [--picture=found.png]

The backbone in the box is frozen at 48 px, and SETR's head (16 channels) trains with or
without a method. Images are grey: a square of vertical stripes and a disc of horizontal
ones on noise of the same brightness, so that no pixel tells its class. They are drawn
from a seed: 60 to train on, 20 to test on, each of another size.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
import tempfile
from typing import Any

from ml_collections import ConfigDict
import numpy as np
from PIL import Image

from insvp_jax.config import defaults
from insvp_jax.run import load_run
from insvp_jax.search import tables
from insvp_jax.tools import masks
from insvp_jax.train import trainer

METHODS = ("linear", "vpt_deep", "bias", "vpt_deep+bias", "insvp", "full")
CLASSES = ("noise", "vertical", "horizontal")
SPLITS = {"train": 60, "val": 8, "test": 20}
SIZE = 48
# Of the images in the picture.
_SHOWN, _ENLARGED = 3, 3


def draw(index: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns an image, uint8 [h, w, 3], and its mask, uint8 [h, w]."""
  rng = np.random.default_rng((seed, index))
  height, width = 56 + index % 9, 64 - index % 7
  y, x = np.mgrid[:height, :width]
  labels = np.zeros((height, width), np.uint8)
  top, left = rng.integers(2, height // 3), rng.integers(2, width // 3)
  labels[top : top + height // 2, left : left + width // 3] = 1
  middle = rng.uniform(0.3, 0.8) * height, rng.uniform(0.5, 0.85) * width
  labels[(y - middle[0]) ** 2 + (x - middle[1]) ** 2 < (height / 5) ** 2] = 2
  textures = [
    rng.integers(60, 190, (height, width)),
    125 + 60 * np.sign(np.sin(x * 1.3 + rng.uniform(0, 6))),
    125 + 60 * np.sign(np.sin(y * 1.3 + rng.uniform(0, 6))),
  ]
  grey = np.choose(labels, textures) + rng.integers(-20, 20, (height, width))
  pixels = np.clip(grey, 0, 255).astype(np.uint8)
  return np.repeat(pixels[..., None], 3, axis=-1), labels


def write(root: Path) -> Path:
  """Writes the images and masks of all splits."""
  for seed, (split, count) in enumerate(SPLITS.items()):
    for i in range(count):
      for kind, pixels in zip(("images", "masks"), draw(i, seed), strict=True):
        path = root / kind / split / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
  (root / "classes.txt").write_text("\n".join(CLASSES))
  return root


def create_config(method: str, root: Path, steps: int) -> ConfigDict:
  """Returns the config of a run."""
  config = defaults()
  config.task, config.method, config.data.root = "segment_folder", method, str(root)
  config.data.cache_dir, config.tensorboard = "off", False
  config.backbone.name, config.image_size = "boxed", SIZE
  config.segment.channels = 16
  config.batch_size, config.total_epochs, config.total_steps = 8, 0.0, steps
  config.optim.lr = 5e-3
  if method == "full":
    # As SETR is trained: the backbone slower than the head.
    config.optim.lr, config.optim.head_lr = 1e-4, 5e-3
  config.optim.warmup_steps = min(10, steps - 1)
  config.vpt_deep.prompt_length = 10
  return config


def rows(results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
  """Returns a row of the table for each method."""
  found = []
  for method, result in results.items():
    ious = [f"{100 * row['iou']:.1f}" for row in result["test_by_class"]["classes"]]
    row = [method, f"{result['trainable_params']:,}"]
    found.append([*row, f"{100 * result['test_miou']:.2f}", *ious])
  return found


def picture(workdir: Path) -> Image.Image:
  """Returns some test images beside what a run finds in them."""
  run, panels = load_run(workdir), []
  for i in range(_SHOWN):
    image, labels = draw(i, list(SPLITS).index("test"))
    found = run.segment(image)[0]
    colors = masks.palette(len(CLASSES))
    panels.append(np.concatenate([image, colors[labels], colors[found]]))
  height = max(len(panel) for panel in panels)
  padded = [
    np.pad(p, [(0, height - len(p)), (0, 4), (0, 0)], constant_values=255)
    for p in panels
  ]
  whole = Image.fromarray(np.concatenate(padded, axis=1))
  return whole.resize(
    (_ENLARGED * whole.width, _ENLARGED * whole.height), Image.Resampling.NEAREST
  )


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--methods", default=",".join(METHODS))
  parser.add_argument("--steps", type=int, default=150)
  parser.add_argument("--picture", help="file of what the last method finds")
  args = parser.parse_args()
  results: dict[str, Any] = {}
  with tempfile.TemporaryDirectory() as place:
    root = write(Path(place) / "textures")
    for method in args.methods.split(","):
      workdir = Path(place) / method
      config = create_config(method, root, args.steps)
      results[method] = trainer.train(config, workdir)
    if args.picture:
      picture(workdir).save(args.picture)
  titles = ["method", "trainable", "test mIoU, %", *(f"{name}, %" for name in CLASSES)]
  print(tables.markdown(rows(results), titles), end="")


if __name__ == "__main__":
  main()

"""Images of shapes with known masks, and the config of a tiny segmenter."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
import numpy as np
from PIL import Image
from tiny_training import tiny_config

SIZE = 16
CLASSES = ("ground", "square", "disc")
# Images of each split; no two of one size, and none of a window's.
SPLITS = {"train": 8, "val": 3, "test": 4}
_COLORS = np.array([[40, 60, 40], [220, 60, 50], [60, 80, 230]])


def draw(index: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns an image uint8 [h, w, 3] and its mask uint8 [h, w], 255 at edges."""
  rng = np.random.default_rng((seed, index))
  height, width = 17 + index % 7, 24 - index % 5
  labels = np.zeros((height, width), np.uint8)
  y, x = np.mgrid[:height, :width]
  labels[2 : 2 + height // 2, 1 : 1 + width // 3] = 1
  labels[(y - height * 0.6) ** 2 + (x - width * 0.7) ** 2 < 20] = 2
  image = _COLORS[labels] + rng.integers(-25, 25, (height, width, 3))
  labels[0] = 255
  return np.clip(image, 0, 255).astype(np.uint8), labels


def write_shapes(root: Path, splits: dict[str, int] | None = None) -> Path:
  """Writes images/<split>/<i>.png, masks/<split>/<i>.png and classes.txt."""
  for seed, (name, count) in enumerate((splits or SPLITS).items()):
    for i in range(count):
      image, labels = draw(i, seed)
      for kind, pixels in (("images", image), ("masks", labels)):
        path = root / kind / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
  (root / "classes.txt").write_text("\n".join(CLASSES))
  return root


def segment_config(root: Path, method: str = "linear", **changes: Any) -> ConfigDict:
  """Returns a config of a tiny ViT that segments the shapes."""
  return tiny_config(
    method,
    task="segment_folder",
    data__root=str(root),
    segment__channels=8,
    batch_size=4,
    total_epochs=0.0,
    total_steps=4,
    **changes,
  )

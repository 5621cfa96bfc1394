"""Small image sets that the tests of insvp_jax.data make for themselves."""

from collections.abc import Mapping
import io
from pathlib import Path
import zipfile

import ml_collections
import numpy as np
from PIL import Image


def data_config(**changes) -> ml_collections.ConfigDict:
  """Returns a section config.data whose values differ from the defaults as told."""
  values = {
    "root": "",
    "preset": "vtab",
    "val_fraction": 0.1,
    "test_fraction": 0.2,
    "split_seed": 0,
    "skip_corrupt": False,
    "cache_dir": "off",
    "data_dir": "",
    "subset": "",
    "lists": "",
    "resident_mb": 1024,
    "duplicates": "warn",
    "splits_json": "",
  }
  return ml_collections.ConfigDict({**values, **changes})


def pixels(number: int, size: int = 8) -> np.ndarray:
  """Returns an image of one colour that tells its number, 0 <= number < 65536."""
  colour = (number % 256, number // 256, 77)
  return np.full((size, size, 3), colour, np.uint8)


def number_of(image: np.ndarray) -> int:
  """Returns the number of an image of `pixels`."""
  return int(image[0, 0, 0]) + 256 * int(image[0, 0, 1])


def png(array: np.ndarray) -> bytes:
  """Returns the array as a PNG file's content."""
  return encode(Image.fromarray(array), "PNG")


def encode(image: Image.Image, file_format: str, **options) -> bytes:
  """Returns the image as a file's content."""
  stream = io.BytesIO()
  image.save(stream, file_format, **options)
  return stream.getvalue()


def numbered_files(counts: Mapping[str, int]) -> dict[str, bytes]:
  """Returns {"<folder>/<i>.png": content}; images are numbered through."""
  content, number = {}, 0
  for folder, count in counts.items():
    for i in range(count):
      content[f"{folder}/{i:03d}.png"] = png(pixels(number))
      number += 1
  return content


def write_folder(root: Path, content: Mapping[str, bytes | None]) -> Path:
  """Writes files below `root`; None makes an empty folder."""
  for name, data in content.items():
    path = root / name
    if data is None:
      path.mkdir(parents=True, exist_ok=True)
    else:
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(data)
  return root


def write_zip(path: Path, content: Mapping[str, bytes | None]) -> Path:
  """Writes an archive; None makes an empty folder."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    for name, data in content.items():
      if data is None:
        archive.writestr(name.rstrip("/") + "/", b"")
      else:
        archive.writestr(name, data)
  return path

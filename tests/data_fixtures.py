"""Small image sets that the tests of insvp_jax.data make for themselves."""

from collections.abc import Mapping
import io
from pathlib import Path
import struct
import zipfile
import zlib

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
    "shots": 0,
    "fraction": 1.0,
    "lists": "",
    "resident_mb": 1024,
    "duplicates": "warn",
    "splits_json": "",
    "labels": "",
    "image_column": "",
    "label_column": "",
    "split_column": "",
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


def png_chunk(kind: bytes, body: bytes) -> bytes:
  """Returns a chunk of a PNG file."""
  crc = struct.pack(">I", zlib.crc32(kind + body))
  return struct.pack(">I", len(body)) + kind + body + crc


def deep_png(values: np.ndarray, *chunks: bytes) -> bytes:
  """Returns uint16 [h, w, c] as a PNG file, which PIL writes of grey only."""
  height, width, channels = values.shape
  colours = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
  header = struct.pack(">IIBBBBB", width, height, 16, colours, 0, 0, 0)
  rows = values.astype(">u2").reshape(height, -1).view(np.uint8)
  filtered = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1)
  body = png_chunk(b"IDAT", zlib.compress(filtered.tobytes()))
  start = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
  return start + b"".join(chunks) + body + png_chunk(b"IEND", b"")


def tiff(
  data: bytes,
  width: int,
  height: int,
  bits: tuple[int, ...],
  *,
  order: str = "<",
  compressed: bool = False,
  more: tuple[tuple[int, int, int, int], ...] = (),
) -> bytes:
  """Returns a TIFF file.

  Args:
    data: its pixels, as they are stored.
    width: in pixels.
    height: in pixels.
    bits: of a value of each channel.
    order: of the bytes, as `struct` has it.
    compressed: whether by Deflate.
    more: further tags: (number, type, count, value).
  """
  data = zlib.compress(data) if compressed else data
  channels = len(bits)
  short, long = 3, 4
  table = 8 + len(data)
  of_bits = (258, short, channels, bits[0])
  if channels > 2:
    of_bits = (258, short, channels, 0)  # where they are is known below
  entries = [
    (256, short, 1, width),
    (257, short, 1, height),
    of_bits,
    (259, short, 1, 8 if compressed else 1),
    (262, short, 1, 2 if channels > 2 else 1),
    (273, long, 1, 8),
    (277, short, 1, channels),
    (278, short, 1, height),
    (279, long, 1, len(data)),
    *more,
  ]
  if channels == 4:
    entries.append((338, short, 1, 2))
  out = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, table) + data
  out += struct.pack(f"{order}H", len(entries))
  end = table + 2 + 12 * len(entries) + 4
  for tag, kind, count, value in sorted(entries):
    wide = kind == long or kind > 4 or count > 4
    if tag == 258 and channels > 2:
      wide, value = True, end
    packed = struct.pack(
      f"{order}I" if wide else f"{order}HH", *((value,) if wide else (value, 0))
    )
    out += struct.pack(f"{order}HHI", tag, kind, count) + packed
  return out + bytes(4) + struct.pack(f"{order}{channels}H", *bits)

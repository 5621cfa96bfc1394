"""From the bytes of an image file to RGB pixels."""

import io
from pathlib import Path

from jaxtyping import UInt8
import numpy as np

# Decoders of PIL that are tried; a file's content counts, not its name.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

# What the names of image files end with.
SUFFIXES = (
  ".jpg",
  ".jpeg",
  ".png",
  ".webp",
  ".bmp",
  ".gif",
  ".tif",
  ".tiff",
  ".ppm",
  ".pgm",
)


def decode(data: bytes, name: str) -> UInt8[np.ndarray, "h w 3"]:
  """Decodes one image as a person would see it.

  Turned as its EXIF orientation says; grey, palette and CMYK become RGB; 16-bit
  grey keeps its full range (65535 becomes 255); transparent pixels are laid on
  white; of an animation, the first frame.

  Args:
    data: content of the file.
    name: named in errors.

  Returns:
    Pixels in [0, 255].

  Raises:
    ValueError: empty, truncated, corrupt, absurdly large, or no image at all.
  """
  from PIL import Image, UnidentifiedImageError

  if not data:
    raise ValueError(f"{name} is empty (0 bytes).")
  try:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
      return _to_rgb(image)
  except UnidentifiedImageError as error:
    raise ValueError(
      f"{name} is not an image of a known format ({', '.join(_FORMATS)})."
    ) from error
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    raise ValueError(
      f"{name} has suspiciously many pixels (a decompression bomb?): {error} "
      f"Store it smaller or leave it out."
    ) from error
  except MemoryError:
    raise
  except Exception as error:
    # PIL's decoders raise whatever a broken file makes them stumble over.
    reason = str(error) or type(error).__name__
    raise ValueError(f"{name} does not decode: {reason}") from error


def read(path: str | Path) -> UInt8[np.ndarray, "h w 3"]:
  """Returns the pixels of one file; see `decode`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it does not decode.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"no image file {path}.")
  return decode(path.read_bytes(), str(path))


def _to_rgb(image) -> np.ndarray:
  from PIL import Image, ImageOps

  image = ImageOps.exif_transpose(image)
  if image.mode.startswith("I"):  # 16-bit grey; PIL's own conversion clips at 255
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
      raise ValueError("grey values outside 0..65535.")
    grey = ((grey + 128) // 257).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)
  if image.mode == "F":
    raise ValueError("floating-point pixels have no known range; store 8 or 16 bits.")
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image)
  return np.asarray(image.convert("RGB"))

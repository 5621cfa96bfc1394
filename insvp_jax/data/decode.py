"""From the bytes of an image file to RGB pixels."""

import io
from pathlib import Path

from jaxtyping import UInt8
import numpy as np

# Decoders of PIL that are tried. A file's content decides, not its name: cameras and
# the web write wrong suffixes.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

# Suffixes by which image files are found among others; compared in lower case.
IMAGE_SUFFIXES = (
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


def decode_image(data: bytes, name: str) -> UInt8[np.ndarray, "h w 3"]:
  """Decodes one image as a person would see it.

  The image is turned as its EXIF orientation says. Grey, palette and CMYK become RGB;
  16-bit grey keeps its full range (65535 becomes 255); transparent pixels are laid on
  white; of an animation the first frame is taken.

  Args:
    data: the content of the image file.
    name: how errors name the file.

  Returns:
    Pixels in [0, 255].

  Raises:
    ValueError: if the file is empty, truncated, corrupt, absurdly large, or no image.
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
    # PIL's decoders raise whatever a broken file makes them stumble over: SyntaxError,
    # struct.error, IndexError and more.
    reason = str(error) or type(error).__name__
    raise ValueError(f"{name} does not decode: {reason}") from error


def read_image(path: str | Path) -> UInt8[np.ndarray, "h w 3"]:
  """Reads and decodes one image file; see `decode_image`.

  Returns:
    Pixels in [0, 255].

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if the file does not decode.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"no image file {path}.")
  return decode_image(path.read_bytes(), str(path))


def _to_rgb(image) -> np.ndarray:
  """Returns the pixels uint8 [h, w, 3] of an open PIL image."""
  from PIL import Image, ImageOps

  image = ImageOps.exif_transpose(image)
  # Modes I and I;16 are 16-bit grey, which PIL's own conversion would clip at 255.
  if image.mode.startswith("I"):
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
      raise ValueError("grey values outside 0..65535.")
    # 65535 / 255 = 257; adding half of it rounds to the nearest level.
    grey = ((grey + 128) // 257).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)
  if image.mode == "F":
    raise ValueError("floating-point pixels have no known range; store 8 or 16 bits.")
  # The pixels below full transparency are arbitrary, often black: lay white beneath.
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image)
  return np.asarray(image.convert("RGB"))

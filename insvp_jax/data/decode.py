"""From the bytes of an image file to RGB pixels."""

from collections.abc import Iterator
import contextlib
import importlib.metadata
import io
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
import numpy as np

# Decoders of PIL that are tried. A file's content decides, not its name: cameras and
# the web write wrong suffixes.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Formats whose decoder may be missing, and PIL's name of it where it is a part of PIL,
# which can be built without. A file of them is known by its first bytes (`_format_of`),
# so that a message can say what it needs.
_OPTIONAL_FORMATS = {"AVIF": "avif", "JPEG2000": "jpg_2000", "HEIF": ""}
_JPEG2000_STARTS = (b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0cjP  \r\n\x87\n")
# What files of AV1 and HEVC images say that they are, in their first box.
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys(
  (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), "HEIF"
)
# Of any codec: the brands beside these tell which.
_CONTAINER_BRANDS = {b"mif1", b"msf1"}

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
  ".avif",
  ".jp2",
  ".j2k",
  ".jpx",
  ".heic",
  ".heif",
  ".hif",
)


def decoder_versions() -> dict[str, str]:
  """Returns the versions of what decodes: others may give other pixels, or none."""
  import PIL

  versions = {"pillow": PIL.__version__}
  with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    versions["pillow_heif"] = importlib.metadata.version("pillow-heif")
  return versions


def decode_image(data: bytes, name: str) -> UInt8[np.ndarray, "h w 3"]:
  """Decodes one image as a person would see it.

  The image is turned as its orientation says. Grey, palette and CMYK become RGB; 16-bit
  grey keeps its full range (65535 becomes 255); transparent pixels are laid on white;
  of an animation the first frame is taken. Colour profiles are not applied.

  Args:
    data: the content of the image file.
    name: how errors name the file.

  Returns:
    Pixels in [0, 255].

  Raises:
    ValueError: if the file is empty, truncated, corrupt, absurdly large, or no image,
      or what decodes it is not installed.
  """
  with open_image(data, name) as image:
    return _to_rgb(image)


@contextlib.contextmanager
def open_image(data: bytes, name: str) -> Iterator[Any]:
  """Opens an image, of which only the header is read, as a PIL image.

  Args:
    data: the content of the image file.
    name: how errors name the file.

  Raises:
    ValueError: as `decode_image`, also for what is raised while the image is open.
  """
  from PIL import Image, UnidentifiedImageError

  if not data:
    raise ValueError(f"{name} is empty (0 bytes).")
  optional = _format_of(data)
  if optional:
    _check_decoder(optional, name)
  try:
    formats = (optional,) if optional else _FORMATS
    with Image.open(io.BytesIO(data), formats=formats) as image:
      yield image
  except UnidentifiedImageError as error:
    if optional:
      raise ValueError(
        f"{name} does not decode: it begins as {optional}, but what follows is damaged."
      ) from error
    raise ValueError(
      f"{name} is not an image of a known format "
      f"({', '.join((*_FORMATS, *_OPTIONAL_FORMATS))})."
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
    # struct.error, IndexError, RuntimeError and more.
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


def _format_of(data: bytes) -> str:
  """Returns which of `_OPTIONAL_FORMATS` a file is, by its first bytes; "" for none."""
  if data.startswith(_JPEG2000_STARTS):
    return "JPEG2000"
  if data[4:8] != b"ftyp":
    return ""
  # The box: its size, "ftyp", the major brand, a version, the other brands. The first
  # brand of a codec decides.
  box = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
  brands = [box[i : i + 4] for i in range(0, len(box), 4)]
  codecs = [_BRANDS[brand] for brand in brands if brand in _BRANDS]
  # pillow-heif says what else such a container holds.
  return codecs[0] if codecs else "HEIF" if _CONTAINER_BRANDS & {*brands} else ""


def _check_decoder(file_format: str, name: str) -> None:
  """Checks that the decoder of one of `_OPTIONAL_FORMATS` is here; readies it.

  Raises:
    ValueError: if it is not; the message says what to install.
  """
  import PIL
  from PIL import features

  feature = _OPTIONAL_FORMATS[file_format]
  if feature:
    if not features.check(feature):
      raise ValueError(
        f"{name} is an image in the format {file_format}, but the installed Pillow "
        f"{PIL.__version__} was built without it: pip install --force-reinstall pillow"
      )
    return
  try:
    import pillow_heif
  except ImportError as error:
    raise ValueError(
      f"{name} is a HEIC image, which needs pillow-heif: pip install 'insvp_jax[heif]'"
    ) from error
  # Costs nothing where it is registered already.
  pillow_heif.register_heif_opener()


def _to_rgb(image: Any) -> np.ndarray:
  """Returns the pixels uint8 [h, w, 3] of an open PIL image."""
  from PIL import Image, ImageOps

  # The decoders of AVIF and HEIF leave no orientation that they have applied.
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

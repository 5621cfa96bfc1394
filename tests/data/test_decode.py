import io
import struct
import zlib

from data_fixtures import encode
import numpy as np
from PIL import Image
import pytest

from insvp_jax.data import decode

# Left half red, right half blue.
_TWO = np.zeros((8, 16, 3), np.uint8)
_TWO[:, :8, 0] = 255
_TWO[:, 8:, 2] = 255
# Four colours, so that turning and mirroring show.
_FOUR = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [90, 90, 90]]], np.uint8)
_RED, _BLUE, _WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def _decode(data):
  return decode.decode_image(data, "x")


def _near(pixel, colour, tolerance=3):
  return np.abs(pixel.astype(int) - colour).max() <= tolerance


@pytest.mark.parametrize(
  "file_format,options",
  [
    ("PNG", {}),
    ("WEBP", {"lossless": True}),
    ("BMP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("GIF", {}),
    ("PPM", {}),
  ],
)
def test_lossless_formats(file_format, options):
  data = encode(Image.fromarray(_TWO), file_format, **options)
  np.testing.assert_array_equal(_decode(data), _TWO)


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
def test_jpeg_modes(mode):
  data = encode(Image.fromarray(_TWO).convert(mode), "JPEG", quality=95)
  image = _decode(data)
  assert image.shape == (8, 16, 3) and image.dtype == np.uint8
  if mode == "L":
    assert _near(image[4, 2], (76,) * 3) and _near(image[4, 13], (29,) * 3)
  else:
    assert _near(image[4, 2], _RED) and _near(image[4, 13], _BLUE)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  four = np.repeat(np.repeat(_FOUR, 8, axis=0), 16, axis=1)
  stored = Image.fromarray(four)
  options = {"quality": 95, "subsampling": 0, "exif": exif}
  image = _decode(encode(stored, "JPEG", **options))
  # EXIF: where the stored first row and first column are when seen upright.
  upright = {
    1: four,
    2: four[:, ::-1],
    3: four[::-1, ::-1],
    4: four[::-1],
    5: four.transpose(1, 0, 2),
    6: np.rot90(four, -1),
    7: four.transpose(1, 0, 2)[::-1, ::-1],
    8: np.rot90(four),
  }[orientation]
  assert image.shape == upright.shape
  assert _near(image, upright, 8)


def test_grey_and_bilevel():
  grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
  expected = np.repeat(grey[..., None], 3, axis=-1)
  np.testing.assert_array_equal(_decode(encode(Image.fromarray(grey), "PNG")), expected)
  bits = Image.fromarray(grey).point(lambda v: 255 * (v > 31)).convert("1")
  image = _decode(encode(bits, "PNG"))
  assert (image[0] == 0).all() and (image[-1] == 255).all()


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_range(file_format):
  values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
  image = _decode(encode(Image.fromarray(values), file_format))
  np.testing.assert_array_equal(image[0, :, 0], [0, 1, 128, 255])
  np.testing.assert_array_equal(image[..., 0], image[..., 2])


def test_palette_with_and_without_transparency():
  palette = Image.fromarray(_TWO).quantize(4)
  np.testing.assert_array_equal(_decode(encode(palette, "PNG")), _TWO)
  index = palette.getpixel((0, 0))
  for file_format in ("PNG", "GIF"):
    image = _decode(encode(palette, file_format, transparency=index))
    assert tuple(image[4, 2]) == _WHITE and tuple(image[4, 13]) == _BLUE


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_laid_on_white(file_format):
  alpha = np.full((8, 16, 1), 255, np.uint8)
  alpha[:, :4] = 0
  alpha[:, 4:8] = 128
  options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
  rgba = Image.fromarray(np.concatenate([_TWO, alpha], axis=-1))
  image = _decode(encode(rgba, file_format, **options))
  assert tuple(image[0, 0]) == _WHITE
  assert _near(image[0, 5], (255, 127, 127))
  assert tuple(image[0, 10]) == _BLUE


def test_grey_with_alpha():
  image = Image.new("LA", (4, 4), (10, 0))
  assert (_decode(encode(image, "PNG")) == 255).all()


def test_first_frame_of_an_animation():
  frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
  data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
  assert tuple(_decode(data)[0, 0]) == _RED


def _noise_bytes(file_format):
  noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
  return encode(Image.fromarray(noise), file_format)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_truncated_files_are_named(file_format):
  data = _noise_bytes(file_format)
  for length in (len(data) // 2, len(data) - len(data) // 10):
    with pytest.raises(ValueError, match="cut.jpg (does not decode|is not an image)"):
      decode.decode_image(data[:length], "cut.jpg")


def test_files_that_are_no_images_are_named():
  with pytest.raises(ValueError, match=r"none.jpg is empty \(0 bytes\)"):
    decode.decode_image(b"", "none.jpg")
  with pytest.raises(ValueError, match="text.png is not an image of a known format"):
    decode.decode_image(b"<html>404</html>" * 9, "text.png")
  with pytest.raises(ValueError, match="bad.png"):
    data = bytearray(_noise_bytes("PNG"))
    data[200:260] = bytes(60)
    decode.decode_image(bytes(data), "bad.png")
  with pytest.raises(ValueError, match="depth.tif.*no known range"):
    floats = Image.fromarray(np.zeros((2, 2), np.float32))
    decode.decode_image(encode(floats, "TIFF"), "depth.tif")


def test_a_decompression_bomb_is_named():
  def chunk(kind, body):
    crc = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + crc

  header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
  data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
  with pytest.raises(ValueError, match="bomb.png has suspiciously many pixels"):
    decode.decode_image(data, "bomb.png")


def test_read_names_a_missing_file(tmp_path):
  (tmp_path / "a.png").write_bytes(encode(Image.fromarray(_TWO), "PNG"))
  np.testing.assert_array_equal(decode.read_image(tmp_path / "a.png"), _TWO)
  with pytest.raises(FileNotFoundError, match="no image file .*b.png"):
    decode.read_image(tmp_path / "b.png")


def test_the_content_counts_not_the_name():
  stream = io.BytesIO()
  Image.fromarray(_TWO).save(stream, "PNG")
  np.testing.assert_array_equal(decode.decode_image(stream.getvalue(), "x.jpg"), _TWO)

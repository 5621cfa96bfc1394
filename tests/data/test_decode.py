import io
import struct
import sys
import zlib

from data_fixtures import encode
import numpy as np
from PIL import Image, features
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


def _encode(image, file_format, **options):
  if file_format == "HEIF":
    pytest.importorskip("pillow_heif").register_heif_opener()
  if file_format in ("AVIF", "HEIF"):
    # Colours of small areas stay what they are.
    options = {"quality": 95, "subsampling": "4:4:4", "chroma": 444} | options
  return encode(image, file_format, **options)


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


def _upright(four, orientation):
  """Returns an image that was stored in an orientation as it is seen."""
  # EXIF: where the stored first row and first column are when seen upright.
  return {
    1: four,
    2: four[:, ::-1],
    3: four[::-1, ::-1],
    4: four[::-1],
    5: four.transpose(1, 0, 2),
    6: np.rot90(four, -1),
    7: four.transpose(1, 0, 2)[::-1, ::-1],
    8: np.rot90(four),
  }[orientation]


@pytest.mark.parametrize("file_format", ["JPEG", "AVIF", "HEIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_once(file_format, orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  four = np.repeat(np.repeat(_FOUR, 16, axis=0), 32, axis=1)
  options = {"quality": 95, "exif": exif.tobytes()}
  if file_format == "JPEG":
    options["subsampling"] = 0
  image = _decode(_encode(Image.fromarray(four), file_format, **options))
  upright = _upright(four, orientation)
  assert image.shape == upright.shape
  # AVIF and HEIF smear a little where the colours meet.
  off = np.abs(image.astype(int) - upright).max(axis=-1) > 8
  assert off.mean() < 0.02


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


@pytest.mark.parametrize("file_format", ["AVIF", "JPEG2000", "HEIF"])
def test_modes_of_newer_formats(file_format):
  two = np.repeat(np.repeat(_TWO, 4, axis=0), 4, axis=1)
  picture = Image.fromarray(two)
  image = _decode(_encode(picture, file_format))
  assert image.shape == two.shape and image.dtype == np.uint8
  assert _near(image[4, 8], _RED) and _near(image[4, 55], _BLUE)
  # To within the rounding of a lossy code.
  grey = _decode(_encode(picture.convert("L"), file_format))
  assert _near(grey[4, 8], (76,) * 3) and _near(grey[4, 55], (29,) * 3)
  picture.putalpha(Image.fromarray(np.where(two[..., 2] > 0, 255, 0).astype(np.uint8)))
  for mode, colour in {"RGBA": _BLUE, "LA": (29,) * 3}.items():
    image = _decode(_encode(picture.convert(mode), file_format))
    assert _near(image[4, 8], _WHITE) and _near(image[4, 55], colour), mode
  levels = np.linspace(0, 65535, 32).astype(np.uint16)
  deep = Image.fromarray(np.tile(levels[:, None], (1, 32)))
  # PIL writes AVIF of 8 bits only, and cuts deeper grey off.
  if file_format != "AVIF":
    image = _decode(_encode(deep, file_format))
    np.testing.assert_allclose(image[:, 9, 0], levels / 257, atol=3)


def test_jpeg_2000_of_cmyk_and_as_a_bare_stream():
  two = Image.fromarray(np.repeat(np.repeat(_TWO, 4, axis=0), 4, axis=1))
  for data in (
    encode(two.convert("CMYK"), "JPEG2000"),
    encode(two, "JPEG2000", no_jp2=True),
  ):
    image = _decode(data)
    assert _near(image[4, 8], _RED) and _near(image[4, 55], _BLUE)


def _brands(data, *brands):
  """Returns a file with other brands in its first box, of the same size."""
  size = int.from_bytes(data[:4], "big")
  major, *others = brands
  box = major + bytes(4) + b"".join(others)
  return data[:8] + box.ljust(size - 8, b"\0") + data[size:]


def test_containers_are_told_apart_by_their_brands():
  two = Image.fromarray(np.repeat(np.repeat(_TWO, 4, axis=0), 4, axis=1))
  for file_format, brand in (("AVIF", b"avif"), ("HEIF", b"heic")):
    data = _brands(_encode(two, file_format), b"mif1", brand)
    assert _near(_decode(data)[4, 8], _RED)
  with pytest.raises(ValueError, match="film.heic is not an image of a known format"):
    decode.decode_image(_brands(data, b"isom", b"mp41"), "film.heic")


def test_without_its_decoder_a_format_is_named(monkeypatch):
  data = {name: _noise_bytes(name) for name in ("AVIF", "JPEG2000", "HEIF")}
  monkeypatch.setitem(sys.modules, "pillow_heif", None)
  # The content counts: a phone's photograph may be called .jpg.
  for name in ("photo.heic", "photo.jpg"):
    with pytest.raises(ValueError) as found:
      decode.decode_image(data["HEIF"], name)
    assert str(found.value) == (
      f"{name} is a HEIC image, which needs pillow-heif: pip install 'insvp_jax[heif]'"
    )
  monkeypatch.setattr(features, "check", lambda feature: feature == "webp")
  for name in ("AVIF", "JPEG2000"):
    with pytest.raises(ValueError, match=f"x is .* format {name}, .* built without it"):
      _decode(data[name])


def test_first_frame_of_an_animation():
  frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
  data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
  assert tuple(_decode(data)[0, 0]) == _RED


def _noise_bytes(file_format):
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
  return _encode(Image.fromarray(noise), file_format)


@pytest.mark.parametrize(
  "file_format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "AVIF", "JPEG2000", "HEIF"]
)
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
  # The same for the headers of the newer formats: height and width follow a mark.
  for file_format, mark, skipped, side in (
    ("AVIF", b"ispe", 4, 16_000),
    ("HEIF", b"ispe", 4, 50_000),
    ("JPEG2000", b"ihdr", 0, 50_000),
  ):
    data = _noise_bytes(file_format)
    start = data.index(mark) + 4 + skipped
    assert data[start : start + 8] == struct.pack(">II", 64, 64)
    data = data[:start] + struct.pack(">II", side, side) + data[start + 8 :]
    with pytest.raises(ValueError, match="bomb has suspiciously many pixels"):
      decode.decode_image(data, "bomb")


@pytest.mark.parametrize("file_format", ["AVIF", "JPEG2000", "HEIF"])
def test_damage_is_an_error_of_one_line_or_none(file_format):
  good, rng = _noise_bytes(file_format), np.random.default_rng(0)
  num_failed = 0
  for _ in range(60):
    data = bytearray(good)
    start = int(rng.integers(12, min(len(data), 400)))
    data[start : start + 8] = rng.bytes(8)
    try:
      assert decode.decode_image(bytes(data), "x").shape[-1] == 3
    except ValueError as error:
      assert str(error).startswith("x ")
      num_failed += 1
  assert num_failed > 9


def test_read_names_a_missing_file(tmp_path):
  (tmp_path / "a.png").write_bytes(encode(Image.fromarray(_TWO), "PNG"))
  np.testing.assert_array_equal(decode.read_image(tmp_path / "a.png"), _TWO)
  with pytest.raises(FileNotFoundError, match="no image file .*b.png"):
    decode.read_image(tmp_path / "b.png")


def test_the_content_counts_not_the_name():
  stream = io.BytesIO()
  Image.fromarray(_TWO).save(stream, "PNG")
  np.testing.assert_array_equal(decode.decode_image(stream.getvalue(), "x.jpg"), _TWO)

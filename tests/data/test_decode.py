from concurrent.futures import ThreadPoolExecutor
import io
import os
import struct
import sys
import threading
import zlib

from data_fixtures import deep_png, encode, png_chunk, tiff
import numpy as np
from PIL import Image, features
import pytest

from insvp_jax.data import decode, metadata

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
  header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
  data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"")
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
  os.mkfifo(tmp_path / "c.png")
  with pytest.raises(ValueError, match=r"c.png is a pipe \(FIFO\), expected a file"):
    decode.read_image(tmp_path / "c.png")
  (tmp_path / "d.png").symlink_to("/dev/zero")
  with pytest.raises(ValueError, match=r"d.png is a device, expected a file"):
    decode.read_image(tmp_path / "d.png")
  with (tmp_path / "e.png").open("wb") as file:
    file.truncate(2**40)  # which takes no room
  with pytest.raises(ValueError, match=r"e.png has 1048576.0 MiB, .*data.max_file_mb"):
    decode.read_image(tmp_path / "e.png")


def test_the_content_counts_not_the_name():
  stream = io.BytesIO()
  Image.fromarray(_TWO).save(stream, "PNG")
  np.testing.assert_array_equal(decode.decode_image(stream.getvalue(), "x.jpg"), _TWO)


# --- Metadata that do not parse.


def _exif(orientation=6, **others):
  exif = Image.Exif()
  exif[0x0112], exif[0x010E] = orientation, "x" * 40
  for tag, value in others.items():
    exif[int(tag[1:])] = value
  return exif.tobytes()


def _segment(marker, body):
  return struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body


def _blocks(side=16):
  return np.repeat(np.repeat(_FOUR, side, axis=0), 2 * side, axis=1)


_BROKEN_JPEG = {
  "an exif of noise": _segment(0xE1, b"Exif\0\0" + bytes(range(1, 90))),
  "an exif that points outside": _segment(
    0xE1, b"Exif\0\0MM\0*" + struct.pack(">I", 2**32 - 9)
  ),
  "an exif with too many tags": _segment(
    0xE1, b"Exif\0\0II*\0" + struct.pack("<IH", 8, 65535)
  ),
  "half of JFIF": _segment(0xE0, b"JFIF"),
  "half of Adobe's": _segment(0xEE, b"Adobe"),
  "a profile in pieces": _segment(0xE2, b"ICC_PROFILE\0"),
  "an index of pictures": _segment(0xE2, b"MPF\0II*\0" + b"\xff" * 30),
  "Photoshop's": _segment(0xED, b"Photoshop 3.0\x008BIM" + b"\xff" * 9),
  "xmp": _segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"\xff<" * 20),
}


@pytest.mark.parametrize("name", _BROKEN_JPEG)
def test_jpeg_metadata_do_not_decide(name):
  data = encode(Image.fromarray(_blocks()), "JPEG", quality=95)
  broken = data[:2] + _BROKEN_JPEG[name] + data[2:]
  np.testing.assert_array_equal(_decode(broken), _decode(data))
  # Truncated pixels are an error still.
  with pytest.raises(ValueError, match="x does not decode"):
    _decode(broken[:-30])


_BOMB = zlib.compress(bytes(2_000_000))
_BROKEN_PNG = {
  "text that unpacks to megabytes": png_chunk(b"zTXt", b"a\0\0" + _BOMB),
  "international, too": png_chunk(b"iTXt", b"a\0\1\0\0\0" + _BOMB),
  "text in no code": png_chunk(b"zTXt", b"a\0\x07" + _BOMB[:9]),
  "a profile that does not unpack": png_chunk(b"iCCP", b"a\0\0\xff\xff\xff"),
  "a profile in another code": png_chunk(b"iCCP", b"a\0\x09" + _BOMB),
  "half a chunk": png_chunk(b"pHYs", b"\0\1"),
  "half of a chroma": png_chunk(b"cHRM", b"\0\1\2"),
  "an exif of noise": png_chunk(b"eXIf", bytes(range(1, 90))),
  "a wrong checksum": png_chunk(b"tEXt", b"a\0b")[:-1] + b"\0",
  "an animation of no frames": png_chunk(b"acTL", bytes(8)),
}


@pytest.mark.parametrize("name", _BROKEN_PNG)
def test_png_metadata_do_not_decide(name):
  data = encode(Image.fromarray(_blocks()), "PNG")
  header = data.index(b"IDAT") - 4
  broken = data[:header] + _BROKEN_PNG[name] + data[header:]
  np.testing.assert_array_equal(_decode(broken), _blocks())
  end = data.index(b"IEND") - 4
  behind = data[:end] + _BROKEN_PNG[name] + data[end:]
  np.testing.assert_array_equal(_decode(behind), _blocks())


@pytest.mark.parametrize("file_format", ["WEBP", "AVIF", "HEIF"])
@pytest.mark.parametrize("kind", ["exif", "xmp", "icc_profile"])
def test_metadata_of_newer_formats_do_not_decide(file_format, kind, monkeypatch):
  picture = Image.fromarray(_blocks())
  data = _encode(picture, file_format)
  block = bytes(range(255, 150, -1))
  options = {kind: b"Exif\0\0MM\0*" + block if kind == "exif" else block}
  if file_format == "AVIF" and kind == "exif":
    # PIL reads what it writes, so it is spoilt then.
    sound = _encode(picture, file_format, exif=_exif(1))
    at = sound.index(b"MM\0*")
    broken = sound[: at + 8] + block[:16] + sound[at + 24 :]
  else:
    broken = _encode(picture, file_format, **options)
  np.testing.assert_array_equal(_decode(broken), _decode(data))


def test_tiff_tags_that_do_not_parse():
  grey = np.arange(0, 240, 5, dtype=np.uint8).reshape(6, 8)
  for order in "<>":
    for compressed in (False, True):
      made = [
        tiff(grey.tobytes(), 8, 6, (8,), order=order, compressed=compressed, more=more)
        for more in (
          ((34665, 4, 1, 2**31),),  # where EXIF is
          ((34675, 7, 2**30, 2**31),),  # a profile
          ((700, 1, 2**20, 9), (305, 2, 2**20, 2**20)),  # XMP, the software
          ((282, 2, 4, 0), (283, 2, 4, 0), (296, 3, 1, 3)),  # a resolution of text
        )
      ]
      for data in made:
        np.testing.assert_array_equal(_decode(data)[..., 0], grey)


def test_resolutions_of_jpeg_2000_do_not_decide():
  data = encode(Image.fromarray(_blocks()), "JPEG2000")
  at = data.index(b"jp2h") - 4
  (size,) = struct.unpack_from(">I", data, at)
  bad = struct.pack(">I4sI4s", 16, b"res ", 3, b"resc")
  broken = data[: at + size] + bad + data[at + size :]
  broken = broken[:at] + struct.pack(">I", size + len(bad)) + broken[at + 4 :]
  text = struct.pack(">I4s", 12, b"xml ") + b"\xff" * 4
  for data_of_it in (broken, data[:at] + text + data[at:]):
    np.testing.assert_array_equal(_decode(data_of_it), _decode(data))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_an_orientation_is_used_where_it_can_be_read(file_format, orientation):
  # A tag behind it points outside of the block, and is the last one.
  exif = bytearray(_exif(orientation, _305="software"))
  at = exif.index(struct.pack(">H", 305))
  assert exif[6:8] == b"MM"
  exif[at + 4 : at + 12] = struct.pack(">II", 2**31 - 1, 2**31 - 1)
  picture, options = Image.fromarray(_blocks()), {}
  if file_format == "WEBP":
    options = {"lossless": True}
  expected = _upright(_decode(encode(picture, file_format, **options)), orientation)
  for block in (bytes(exif), bytes(exif[: at + 6])):
    data = encode(picture, file_format, exif=_exif(1), **options)
    if file_format == "JPEG":
      sound = encode(picture, "JPEG")
      data = sound[:2] + _segment(0xE1, block) + sound[2:]
      # What the decoder stumbles over beside it changes nothing.
      other = data[:2] + _BROKEN_JPEG["half of JFIF"] + data[2:]
      np.testing.assert_array_equal(_decode(other), expected)
    elif file_format == "PNG":
      sound = encode(picture, "PNG")
      end = sound.index(b"IDAT") - 4
      chunk = png_chunk(b"eXIf", block.removeprefix(b"Exif\0\0"))
      data = sound[:end] + chunk + sound[end:]
      other = data[:end] + _BROKEN_PNG["half a chunk"] + data[end:]
      np.testing.assert_array_equal(_decode(other), expected)
    else:
      start = data.index(b"EXIF") - 0
      body = block + b"\0" * (len(block) % 2)
      data = data[:start] + b"EXIF" + struct.pack("<I", len(block)) + body
      data = data[:4] + struct.pack("<I", len(data) - 8) + data[8:]
    np.testing.assert_array_equal(_decode(data), expected)


def test_an_orientation_that_is_none_is_ignored():
  assert metadata.orientation(_exif(6)) == 6
  for block in (b"", b"II", b"II*\0", _exif(9), _exif(0), b"\0" * 50, _exif(6)[:20]):
    assert metadata.orientation(block) == 1
  jpeg = encode(Image.fromarray(_blocks()), "JPEG")
  for value in (0, 9, 300):
    data = encode(Image.fromarray(_blocks()), "JPEG", exif=_exif(value))
    np.testing.assert_array_equal(_decode(data), _decode(jpeg))


def test_metadata_are_left_out_only_where_the_decoder_fails(monkeypatch):
  monkeypatch.setattr(metadata, "without_metadata", None)
  for file_format in ("JPEG", "PNG", "WEBP", "TIFF"):
    _decode(encode(Image.fromarray(_blocks()), file_format, exif=_exif(1)))


# --- 16 bits.


def _values(channels, highest=4095):
  values = np.random.default_rng(0).integers(0, highest + 1, (6, 8, channels))
  values[0, 0] = highest
  return values.astype(np.uint16)


def _levels(values, white):
  return np.rint(np.broadcast_to(values, (*values.shape[:2], 3)) / white * 255)


def _deep_files(values):
  """Yields 16-bit files of the values, of all kinds."""
  height, width, channels = values.shape
  yield deep_png(values)
  for order in "<>":
    for compressed in (False, True):
      data, bits = values.astype(f"{order}u2").tobytes(), (16,) * channels
      yield tiff(data, width, height, bits, order=order, compressed=compressed)
  if channels == 1:
    yield b"P5\n8 6\n65535\n" + values.astype(">u2").tobytes()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("white", [1023, 4095, 16383])
def test_the_range_of_16_bit_values_can_be_set(channels, white):
  values = _values(channels, white)
  for data in _deep_files(values):
    options = decode.DecodeOptions(max_16bit=white)
    image = decode.decode_image(data, "x", options)
    np.testing.assert_array_equal(image, _levels(values, white))
    assert not options.unused_bits()
    options = decode.DecodeOptions()
    decode.decode_image(data, "x", options)
    expected = f"set config.data.max_16bit={white} ({white.bit_length()} bits)"
    assert expected in options.unused_bits()
    # White is what no value is above.
    low = decode.DecodeOptions(max_16bit=white // 4)
    with pytest.raises(ValueError, match=f"{white}, but config.data.max_16bit says"):
      decode.decode_image(data, "x", low)


def test_alpha_and_turns_of_16_bit_colours():
  options = decode.DecodeOptions(max_16bit=4095)
  values = _values(4)
  values[..., 3] = 65535
  values[0, :3, 3] = 0
  expected = _levels(values[..., :3], 4095)
  expected[0, :3] = 255
  image = decode.decode_image(deep_png(values), "x", options)
  np.testing.assert_array_equal(image, expected)
  data = values.astype("<u2").tobytes()
  data = tiff(data, 8, 6, (16,) * 4, more=((274, 3, 1, 6),))
  image = decode.decode_image(data, "x", options)
  np.testing.assert_array_equal(image, np.rot90(expected, -1))
  # Of grey with alpha PIL tells the high bytes alone.
  grey = decode.decode_image(deep_png(values[..., 2:]), "x", options)
  assert np.abs(grey - _levels(values[..., 2:3], 4095))[1:].max() <= 16


def test_a_range_that_the_file_tells_is_used():
  options = decode.DecodeOptions(max_16bit=255)
  values = _values(1)
  packed = b"".join(
    bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255])
    for a, b in values.astype(int).reshape(-1, 2).tolist()
  )
  files = [
    tiff(packed, 8, 6, (12,)),
    b"P5\n8 6\n4095\n" + values.astype(">u2").tobytes(),
    b"P2\n8 6\n4095\n" + " ".join(map(str, values.reshape(-1).tolist())).encode(),
  ]
  for data in files:
    image = decode.decode_image(data, "x", options)
    np.testing.assert_array_equal(image, _levels(values, 4095))
  assert not options.range_16bit.count
  colours = _values(3)
  data = b"P6\n8 6\n4095\n" + colours.astype(">u2").tobytes()
  image = decode.decode_image(data, "x", options)
  np.testing.assert_array_equal(image, _levels(colours, 4095))


def test_what_is_said_of_unused_bits():
  options = decode.DecodeOptions()
  assert not options.unused_bits()
  decode.decode_image(deep_png(_values(1) * 0), "x", options)
  assert not options.unused_bits()  # nothing but black
  decode.decode_image(deep_png(_values(1, 4095)), "x", options)
  decode.decode_image(deep_png(_values(3, 900)), "x", options)
  assert options.unused_bits().startswith(
    "no value of the 3 16-bit images that were read is above 4095, so"
  )
  assert options.unused_bits().endswith("=4095 (12 bits) or 16383 (14 bits)")
  # Values that were moved up are dark, and no mistake.
  moved = decode.DecodeOptions()
  decode.decode_image(deep_png(_values(1, 500) * 16), "x", moved)
  assert not moved.unused_bits()
  # One image of the full range is enough.
  decode.decode_image(deep_png(_values(1, 40_000)), "x", options)
  assert not options.unused_bits()


def test_options_come_from_a_stored_config_too():
  assert decode.DecodeOptions.from_config({}) == decode.DecodeOptions()
  stored = {"max_16bit": 4095, "max_pixels": 9, "max_file_mb": 1, "root": "x"}
  assert decode.DecodeOptions.from_config(stored) == decode.DecodeOptions(
    9, 2**20, 4095
  )


# --- Sizes.


def test_the_largest_image_can_be_set(monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
  data = encode(Image.fromarray(_blocks()), "PNG")  # 32 x 64
  small = decode.DecodeOptions(max_pixels=2047)
  with pytest.raises(ValueError) as found:
    decode.decode_image(data, "x.png", small)
  assert str(found.value) == (
    "x.png has suspiciously many pixels (a decompression bomb?): 2048, "
    "config.data.max_pixels is 2047. Store it smaller, leave it out, or set "
    "--config.data.max_pixels=2048."
  )
  # PIL's limit for the process does not stand in the way.
  image = decode.decode_image(data, "x", decode.DecodeOptions(max_pixels=2048))
  np.testing.assert_array_equal(image, _blocks())


def test_no_memory_is_an_error_that_names_the_file(monkeypatch):
  def full(self):
    raise MemoryError

  data = encode(Image.fromarray(_TWO), "BMP")
  monkeypatch.setattr(Image.Image, "load", full)
  with pytest.raises(ValueError, match="x does not decode: .* memory for its 16 x 8"):
    _decode(data)


def test_large_images_are_converted_in_parts_alike(monkeypatch):
  alpha = Image.fromarray(_blocks())
  alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
  files = [encode(alpha, "PNG"), encode(Image.fromarray(_blocks()), "PNG")]
  files += [encode(alpha.quantize(9), "PNG", transparency=3)]
  files += [deep_png(_values(1)), deep_png(_values(3)), deep_png(_values(4))]
  options = decode.DecodeOptions(max_16bit=4095)
  files_options = [(data, options) for data in files]
  before = [decode.decode_image(data, "x", o) for data, o in files_options]
  monkeypatch.setattr(decode, "_PIXELS_AT_ONCE", 24)
  for (data, o), expected in zip(files_options, before, strict=True):
    np.testing.assert_array_equal(decode.decode_image(data, "x", o), expected)


def test_16_bits_are_seen_in_the_first_bytes_and_the_header():
  values = _values(1)
  for data in _deep_files(values):
    assert decode.may_be_16bit(data[: decode.HEAD_BYTES]) and decode.is_16bit(data, "x")
  for file_format in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
    assert not decode.may_be_16bit(encode(Image.fromarray(_TWO), file_format)[:32])
  for file_format in ("PNG", "TIFF", "PPM", "JPEG2000", "JPEG"):
    assert not decode.is_16bit(encode(Image.fromarray(_TWO), file_format), "x")


def test_threads_share_the_room_for_pixels(monkeypatch):
  data, most = encode(Image.fromarray(_TWO), "PNG"), []
  num_pixels = _TWO.shape[0] * _TWO.shape[1]
  room = decode._Room(2 * num_pixels)
  monkeypatch.setattr(decode, "_ROOM", room)
  barrier = threading.Barrier(2)

  def work(_):
    with decode.decoded(data, "x"):
      most.append(room._taken)
      barrier.wait()  # until two are at it: more than two would not fit

  with ThreadPoolExecutor(6) as pool:
    list(pool.map(work, range(6)))
  assert max(most) == 2 * num_pixels and room._taken == 0
  # A larger one is alone, and what fails gives its room back.
  room = decode._Room(1)
  monkeypatch.setattr(decode, "_ROOM", room)
  with decode.decoded(data, "x"):
    assert room._taken == num_pixels
  with pytest.raises(ValueError, match="does not decode"):
    decode.decode_image(data[: len(data) // 2], "cut.png")
  assert room._taken == 0

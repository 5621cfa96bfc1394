"""What image files hold besides pixels: read where it parses, else left out.

A picture is sound where its pixels are. `orientation` reads the one thing that decides
how they are seen; `without_metadata` leaves out of a file what its decoder stumbled
over.
"""

from collections.abc import Callable
import struct
import zlib

_ORIENTATION = 0x0112
# As short as it can be: version 1.1, no resolution, no thumbnail.
_JFIF = b"\xff\xe0\x00\x10JFIF\0\1\1\0\0\1\0\1\0\0"
_PNG_START = b"\x89PNG\r\n\x1a\n"
# tRNS says which pixels are transparent.
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_WEBP_PIXELS = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")
_JP2_PIXELS = (b"jP  ", b"ftyp", b"jp2h", b"jp2c")
# Tags of TIFF that decide what the pixels are, from sizes to the tables of a JPEG.
_TIFF_PIXELS = {
  *(254, 255, 256, 257, 258, 259, 262, 263, 266, 273, 274, 277, 278, 279, 284, 292),
  *(293, 301, 317, 318, 319, 320, 321, 322, 323, 324, 325, 332, 336, 338, 339, 340),
  *(341, 342, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532),
}


def orientation(exif: bytes) -> int:
  """Returns the orientation, 1 to 8, in a block of EXIF; 1 where it has none.

  Nothing else of the block is read, so nothing else of it has to be sound.
  """
  exif = exif.removeprefix(b"Exif\0\0")
  order = {b"II": "<", b"MM": ">"}.get(exif[:2])
  if order is None:
    return 1
  try:
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    (count,) = struct.unpack_from(f"{order}H", exif, start)
    for i in range(count):
      tag, kind, _, value = struct.unpack_from(f"{order}HHIH", exif, start + 2 + 12 * i)
      if tag == _ORIENTATION:
        return value if kind == 3 and 1 <= value <= 8 else 1  # 3: of 16 bits
  except struct.error:  # the block ends
    pass
  return 1


def without_metadata(data: bytes) -> bytes | None:
  """Returns an image file with its pixels, and little else.

  What stays is what decides the pixels, and an orientation.

  Args:
    data: the content of an image file.

  Returns:
    None where there is nothing to leave out, or the file is of another format.
  """
  for start, strip in _STRIPPERS:
    if data.startswith(start):
      try:
        stripped = strip(data)
      except (struct.error, IndexError):
        return None
      return None if stripped == data else stripped
  if data[4:8] == b"ftyp":
    stripped = _hide_bmff_items(data)
    return None if stripped == data else stripped
  return None


def _strip_jpeg(data: bytes) -> bytes | None:
  """Leaves out comments and what applications wrote.

  Two of these tell what the colours are, JFIF's segment and Adobe's.
  """
  parts, position, turned = [data[:2]], 2, 1
  while True:
    if data[position] != 0xFF:
      return None
    marker = data[position + 1]
    if marker == 0xFF:  # a byte that fills
      position += 1
      continue
    if marker == 0xDA:  # the pixels
      break
    (length,) = struct.unpack_from(">H", data, position + 2)
    if length < 2:
      return None
    segment = data[position : position + 2 + length]
    position += 2 + length
    if marker == 0xE1 and segment[4:10] == b"Exif\0\0" and turned == 1:
      turned = orientation(segment[4:])
    if segment[4:9] == b"JFIF\0" and marker == 0xE0:
      parts.append(_JFIF)
    elif segment[4:9] == b"Adobe" and marker == 0xEE and length >= 14:
      parts.append(segment)
    elif not (0xE0 <= marker <= 0xEF or marker == 0xFE):
      parts.append(segment)
  if turned != 1:
    exif = b"Exif\0\0" + _exif(turned)
    parts.insert(1, b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif)
  return b"".join([*parts, data[position:]])


def _exif(turned: int) -> bytes:
  """Returns a block of EXIF that holds an orientation alone."""
  return struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, _ORIENTATION, 3, 1, turned, 0, 0)


def _strip_png(data: bytes) -> bytes:
  parts, position, turned = [], len(_PNG_START), 1
  while position + 8 <= len(data):
    length, kind = struct.unpack_from(">I4s", data, position)
    end = position + 12 + length
    if kind in _PNG_PIXELS:
      parts.append(data[position:end])
    elif kind == b"eXIf":
      turned = orientation(data[position + 8 : end - 4])
    position = end
  if turned != 1:
    exif = b"eXIf" + _exif(turned)
    chunk = struct.pack(">I", len(exif) - 4) + exif
    # Behind the header.
    parts.insert(1, chunk + struct.pack(">I", zlib.crc32(exif)))
  return b"".join([_PNG_START, *parts])


def _strip_webp(data: bytes) -> bytes | None:
  if data[8:12] != b"WEBP":
    return None
  parts, position, turned = [], 12, 1
  while position + 8 <= len(data):
    kind, length = struct.unpack_from("<4sI", data, position)
    end = position + 8 + length + length % 2
    if kind in _WEBP_PIXELS:
      parts.append(data[position:end])
    elif kind == b"EXIF":
      turned = orientation(data[position + 8 : end])
    position = end
  extended = bool(parts) and parts[0][:4] == b"VP8X" and len(parts[0]) == 18
  if extended:
    # Bits of this byte say that there are a profile, EXIF and XMP.
    flags = parts[0][8] & ~0x2C | (0x08 if turned != 1 else 0)
    parts[0] = parts[0][:8] + bytes([flags]) + parts[0][9:]
  if turned != 1 and extended:
    exif = _exif(turned)
    parts.append(b"EXIF" + struct.pack("<I", len(exif)) + exif)
  body = b"WEBP" + b"".join(parts)
  return b"RIFF" + struct.pack("<I", len(body)) + body


def _strip_tiff(data: bytes) -> bytes:
  """Leaves the tags of the first image that decide its pixels; all stay in place."""
  order = "<" if data[:2] == b"II" else ">"
  (version,) = struct.unpack_from(f"{order}H", data, 2)
  # BigTIFF has wider numbers.
  wide = version == 43
  offset, number, entry = ("Q", "Q", 20) if wide else ("I", "H", 12)
  (start,) = struct.unpack_from(order + offset, data, 8 if wide else 4)
  (count,) = struct.unpack_from(order + number, data, start)
  first = start + struct.calcsize(number)
  kept = []
  for i in range(count):
    (tag,) = struct.unpack_from(f"{order}H", data, first + entry * i)
    if tag in _TIFF_PIXELS:
      kept.append(data[first + entry * i : first + entry * (i + 1)])
  table = struct.pack(order + number, len(kept)) + b"".join(kept)
  # No image follows.
  table += bytes(struct.calcsize(offset))
  return data[:start] + table + data[start + len(table) :]


def _strip_jp2(data: bytes) -> bytes:
  """Leaves out the boxes of text, and resolutions."""
  parts = []
  for kind, header, body in _boxes(data):
    if kind == b"jp2h":
      inner = b"".join(h + b for k, h, b in _boxes(body) if k != b"res ")
      parts.append(struct.pack(">I4s", 8 + len(inner), kind) + inner)
    elif kind in _JP2_PIXELS:
      parts.append(header + body)
  return b"".join(parts)


def _boxes(data: bytes) -> list[tuple[bytes, bytes, bytes]]:
  """Returns (kind, header, body) of the boxes of a JPEG 2000 file."""
  boxes, position = [], 0
  while position + 8 <= len(data):
    size, kind = struct.unpack_from(">I4s", data, position)
    start = position + 8
    if size == 1:
      (size,) = struct.unpack_from(">Q", data, start)
      start += 8
    end = len(data) if size == 0 else position + size
    if end < start:
      break
    boxes.append((kind, data[position:start], data[start:end]))
    position = end
  return boxes


def _hide_bmff_items(data: bytes) -> bytes:
  """Gives the items of EXIF and XMP a kind that no decoder of AVIF or HEIF knows.

  Orientations are properties of the image in these formats.
  """
  start = data.find(b"iinf")
  if start < 4:
    return data
  end = start - 4 + int.from_bytes(data[start - 4 : start], "big")
  table = data[start:end].replace(b"Exif", b"xxxx").replace(b"mime", b"xxxx")
  return data[:start] + table + data[end:]


_STRIPPERS: tuple[tuple[bytes, Callable[[bytes], bytes | None]], ...] = (
  (b"\xff\xd8", _strip_jpeg),
  (_PNG_START, _strip_png),
  (b"RIFF", _strip_webp),
  (b"II", _strip_tiff),
  (b"MM", _strip_tiff),
  (b"\x00\x00\x00\x0cjP  \r\n\x87\n", _strip_jp2),
)

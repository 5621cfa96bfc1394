"""What a damaged file may do: give its content, or be one clear error.

Each fuzzer makes a damaged input of a seed and reads it. `test_fuzz.py` runs a few
seeds of each. For many more: python tests/fuzzers.py NAME FIRST COUNT.
"""

from collections.abc import Callable
import contextlib
import io
import json
import math
from pathlib import Path
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
from unittest import mock
import warnings
import zipfile
import zlib

import numpy as np
from PIL import Image, PngImagePlugin
import safetensors.numpy

from insvp_jax import errors, files, trees
from insvp_jax.checkpoints import files as checkpoint_files
from insvp_jax.config import defaults
from insvp_jax.data import cache, decode, folder_or_zip, vpt_lists
from insvp_jax.data.sources import cifar_npz, labels_csv, stored_splits, tfrecords
from insvp_jax.data.splits import ArraySplit, TaskData
from insvp_jax.distributed import lock
from insvp_jax.logs import writers
from insvp_jax.models import weights
from insvp_jax.models.swin import Swin
from insvp_jax.models.vit import ViT
from insvp_jax.models.weights import formats, names_swin

# Seconds and bytes that a small input may take.
MAX_SECONDS, MAX_BYTES = 5.0, 2**30
_NUMBERS = (0, 1, 2, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1)


# --- Making damaged inputs.


def mutate(data: bytes, rng: random.Random) -> bytes:
  """Returns the bytes with some changed, left out, put in, or made large numbers."""
  out = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 3, 8))):
    # Headers come first, directories last.
    place = rng.choice((rng.random(), rng.random() ** 4, 1 - rng.random() ** 4))
    at, kind = int(place * len(out)), rng.randrange(8)
    if kind < 2 and at < len(out):
      out[at] = rng.randrange(256)
    elif kind == 2 and at < len(out):
      out[at] ^= 1 << rng.randrange(8)
    elif kind == 3:
      del out[at : at + rng.choice((1, 4, 32))]
    elif kind == 4:
      out[at:at] = rng.randbytes(rng.choice((1, 4, 32)))
    elif kind == 5:
      packing = rng.choice(("<I", ">I", "<Q", ">Q"))
      number = struct.pack(packing, rng.choice(_NUMBERS))
      out[at : at + len(number)] = number
    elif kind == 6:
      out[at : at + rng.choice((1, 4, 32))] = out[at // 2 :][: rng.choice((1, 4, 32))]
    elif rng.random() < 0.2:
      del out[at:]
  return bytes(out)


def random_json(rng: random.Random, depth: int = 0):
  """Returns any JSON value, also ones that are legal but odd."""
  kind = rng.randrange(10 if depth < 3 else 8)
  if kind < 2:
    return rng.choice((None, True, False))
  if kind < 4:
    return rng.choice((0, -1, 3, 2**31, 2**70, 10**400, 1.5, math.nan, math.inf, 1e999))
  if kind < 8:
    odd = ("", "x", "../x", "/dev/zero", "\ud800", "a\nb", "é" * 9, "0" * 64, "\0")
    return rng.choice(odd)
  if kind == 8:
    return [random_json(rng, depth + 1) for _ in range(rng.randrange(4))]
  return {str(rng.randrange(9)): random_json(rng, depth + 1) for _ in range(3)}


def damaged_json(value, rng: random.Random) -> bytes:
  """Returns the text of a value of which one part is another, or that is damaged."""
  kind = rng.randrange(8)
  if kind == 0:
    return b"[" * 100_000
  if kind < 4:
    value = _replaced(value, rng)
  text = json.dumps(value).encode()
  return text if kind < 4 else mutate(text, rng)


def _replaced(value, rng: random.Random):
  if rng.random() < 0.3 or not isinstance(value, dict | list) or not value:
    return random_json(rng)
  changed = value.copy()
  key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
  changed[key] = _replaced(value[key], rng)
  return changed


def _noise(height: int = 24, width: int = 32) -> Image.Image:
  rng = np.random.default_rng(0)
  blocks = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
  return Image.fromarray(blocks.repeat(8, 0).repeat(8, 1))


def _encoded(image: Image.Image, file_format: str, **options) -> bytes:
  stream = io.BytesIO()
  image.save(stream, file_format, **options)
  return stream.getvalue()


def _exif(orientation: int = 6) -> bytes:
  exif = Image.Exif()
  exif[0x0112], exif[0x010E], exif[0x011A] = orientation, "x" * 40, 72.0
  exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
  return exif.tobytes()


def _formats() -> list[str]:
  formats = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000"]
  with contextlib.suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()
    formats.append("HEIF")
  return formats


class _Kept(dict):
  """Inputs that are made once."""

  def __call__(self, key, make: Callable):
    if key not in self:
      self[key] = make()
    return self[key]


_KEPT = _Kept()


def sample_images() -> list[bytes]:
  """Returns a small file of every format and mode that are read."""
  two = _noise()
  deep = Image.fromarray(np.asarray(two.convert("L")).astype(np.uint16) * 16)
  images = [_encoded(two, name) for name in _formats()]
  images += [_encoded(two.convert("RGBA"), n) for n in ("PNG", "WEBP", "TIFF", "AVIF")]
  images += [_encoded(two.quantize(8), n) for n in ("PNG", "GIF", "TIFF", "BMP")]
  images += [_encoded(deep, n) for n in ("PNG", "TIFF", "JPEG2000", "PPM")]
  images += [_encoded(two.convert("CMYK"), n) for n in ("JPEG", "TIFF")]
  images += [_encoded(two, "TIFF", compression=c) for c in ("tiff_lzw", "jpeg")]
  images.append(_encoded(two, "JPEG", progressive=True, exif=_exif()))
  images.append(_encoded(two, "GIF", save_all=True, append_images=[two.rotate(180)]))
  images.append(_encoded(two, "PNG", save_all=True, append_images=[two.rotate(180)]))
  return images


# --- The fuzzers. Each takes a seed and raises where something is wrong.


class Found(AssertionError):
  """What a fuzzer was looking for."""


@contextlib.contextmanager
def _clear_errors():
  """Lets pass what this package raises in one line; the rest is found."""
  try:
    yield
  except errors.INPUT_ERRORS as error:
    if not errors.is_ours(error) or "\n" in errors.one_line(error):
      raise Found(f"no error of this package: {error!r}") from error


def image_bytes(seed: int) -> None:
  """Damaged files of every format decode, or are an error that names them."""
  rng = random.Random(seed)
  options = decode.DecodeOptions(
    max_16bit=rng.choice((0, 0, 255, 4095)), max_pixels=2**22
  )
  data = mutate(rng.choice(_KEPT("images", sample_images)), rng)
  with _clear_errors():
    try:
      pixels = decode.decode_image(data, "x", options)
    except ValueError as error:
      assert str(error).startswith("x "), str(error)
      raise
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.size


def _with_metadata(rng: random.Random) -> tuple[str, bytes]:
  """Returns (format, file) of a sound picture with metadata that may be damaged."""
  kind = rng.choice(("exif", "exif", "icc_profile", "xmp", "chunk", "segment"))
  block = _exif() if kind == "exif" else rng.randbytes(rng.randrange(1, 200))
  block, two = mutate(block, rng) or b"x", _noise()
  if kind == "chunk":
    names = "tEXt zTXt iTXt iCCP pHYs gAMA cHRM sRGB tIME bKGD sBIT acTL fcTL eXIf hIST"
    name = rng.choice(names.split()).encode()
    zeros = zlib.compress(bytes(2_000_000))
    forms = (block, b"a\0\0" + zlib.compress(block), b"a\0\0" + block, b"a\0\0" + zeros)
    info = PngImagePlugin.PngInfo()
    info.add(name, body := rng.choice((*forms, b"a\0\1\0\0\0" + block)))
    data = _encoded(two, "PNG", pnginfo=info)
    if rng.random() < 0.2 and name in data:  # another checksum
      end = data.index(name) + 4 + len(body)
      data = data[:end] + rng.randbytes(4) + data[end + 4 :]
    return "PNG", data
  formats = [name for name in _formats() if name in ("JPEG", "PNG", "WEBP", "AVIF")]
  file_format = "JPEG" if kind == "segment" else rng.choice(formats)
  if file_format == "JPEG":
    starts = (b"", b"JFIF\0", b"Exif\0\0", b"ICC_PROFILE\0", b"MPF\0", b"JFXX\0")
    start = b"Exif\0\0" if kind == "exif" else rng.choice(starts)
    marker = 0xE1 if kind == "exif" else rng.choice((0xE0, 0xE1, 0xE2, 0xED, 0xFE))
    body = start + block
    segment = struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body
    data = _encoded(two, "JPEG")
    return "JPEG", data[:2] + segment + data[2:]
  if kind == "exif":
    block = b"Exif\0\0" + block
  try:
    return file_format, _encoded(two, file_format, **{kind: block})
  except Exception:  # PIL reads some of what it writes
    return file_format, _encoded(two, file_format)


def image_metadata(seed: int) -> None:
  """Sound pixels decode whatever the metadata hold, turned or not."""
  file_format, data = _with_metadata(random.Random(seed))
  expected = _KEPT(
    file_format, lambda: decode.decode_image(_encoded(_noise(), file_format), "x")
  )
  try:
    pixels = decode.decode_image(data, "x")
  except ValueError as error:
    raise Found(f"{file_format} does not decode: {error}") from error
  turned = [f(np.rot90(expected, n)) for n in range(4) for f in (np.array, np.fliplr)]
  assert any(np.array_equal(pixels, other) for other in turned), file_format


def _zip(compression: int) -> bytes:
  stream = io.BytesIO()
  with zipfile.ZipFile(stream, "w", compression) as archive:
    for i in range(3):
      archive.writestr(f"train/c{i % 2}/{i}.txt", b"content" * 30)
    archive.comment = b"c"
  return stream.getvalue()


def zip_directory(seed: int) -> None:
  """A damaged archive is an error, or its members are, or give their content."""
  rng = random.Random(seed)
  kinds = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)
  data = mutate(_zip(rng.choice((*kinds, zipfile.ZIP_LZMA))), rng)
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "x.zip"
    path.write_bytes(data)
    with _clear_errors(), folder_or_zip.open_folder_or_zip(str(path)) as root:
      names = root.entries().files
      assert len(root.sizes(names)) == len(names)
      json.dumps(root.fingerprint(names))
      for name in names:
        with _clear_errors():
          assert isinstance(root.read(name, 2**20), bytes)
  # Files that end in an archive's directory are told apart from archives.
  _with_file(data, cache.file_fingerprint)


def _with_file(data: bytes, read: Callable[[Path], object], name: str = "x") -> None:
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / name
    path.write_bytes(data)
    with _clear_errors():
      read(path)


def _npz(**arrays) -> bytes:
  stream = io.BytesIO()
  np.savez(stream, **arrays)
  return stream.getvalue()


def _npz_with_header(data: bytes, rng: random.Random) -> bytes:
  """Returns an `.npz` file, whose checksums fit, with other claims in a header."""
  shapes = (
    "(3, 4)",
    "(4, 3)",
    "(1099511627776,)",
    "(-1, 12)",
    "(2**40,)",
    "()",
    "(0,)",
  )
  dtypes = ("'<f4'", "'|O'", "'<f8'", "'|V2'", "'<U9999999'", "[('a', '<f4')]", "'x'")
  stream, source = io.BytesIO(), zipfile.ZipFile(io.BytesIO(data))
  chosen = rng.choice(source.namelist())
  with zipfile.ZipFile(stream, "w", rng.choice((0, 8))) as archive:
    for name in source.namelist():
      body = source.read(name)
      if name == chosen:
        length = 10 + int.from_bytes(body[8:10], "little")
        order = rng.choice(("True", "False", "0"))
        text = (
          f"{{'descr': {rng.choice(dtypes)}, 'fortran_order': {order}, 'shape': "
          f"{rng.choice(shapes)}, }}"
        )
        header = text.encode().ljust(118)[:117] + b"\n"
        major = rng.choice((1, 1, 1, 2, 3, 9))
        size = struct.pack("<H" if major == 1 else "<I", len(header))
        body = b"\x93NUMPY" + bytes([major, 0]) + size + header + body[length:]
      archive.writestr(name, mutate(body, rng) if rng.random() < 0.1 else body)
  return stream.getvalue()


def _damaged_npz(data: bytes, rng: random.Random) -> bytes:
  return _npz_with_header(data, rng) if rng.random() < 0.5 else mutate(data, rng)


def npz_arrays(seed: int) -> None:
  """An `.npz` file gives arrays or an error, whatever its headers claim."""
  rng = random.Random(seed)
  data = _npz(a=np.ones((3, 4), np.float32), b=np.array(["x", "yz"]), c=np.ones(3))
  data = _damaged_npz(data, rng)

  def read(path: Path) -> None:
    headers = files.npz_headers(path)
    assert {k: v.shape for k, v in files.read_npz(path).items()} == {
      name: header.shape for name, header in headers.items()
    }

  _with_file(data, read)


def npz_backbone(seed: int) -> None:
  """So does a backbone's."""
  rng = random.Random(seed)
  fields = {"width": 4, "depth": 1, "mlp_dim": 4, "num_heads": 1, "patch_size": 4}
  vit = ViT(image_size=8, **fields)

  def leaves() -> bytes:
    from insvp_jax.models.weights import load

    return _npz(
      **{n: np.ones(s, np.float32) for n, s in load._expected_shapes(vit).items()}
    )

  data = _damaged_npz(_KEPT("leaves", leaves), rng)
  with mock.patch.object(
    weights.load,
    "_expected_shapes",
    lambda _, f=weights.load._expected_shapes: _KEPT("shapes", lambda: f(vit)),
  ):
    _with_file(data, lambda path: weights.load_backbone(path, vit), "x.npz")


def _swin() -> dict[str, np.ndarray]:
  """Returns the arrays of a Swin Transformer, in published names."""
  import jax

  swin = Swin(width=4, depths=(1,), num_heads=1, window=1, image_size=4)
  images = jax.ShapeDtypeStruct((1, 4, 4, 3), np.float32)
  shapes = trees.flatten(jax.eval_shape(swin.init, jax.random.key(0), images)["params"])
  leaves = {name: np.ones(leaf.shape, np.float32) for name, leaf in shapes.items()}
  inverted = names_swin.invert(leaves)
  return {name: np.ascontiguousarray(array) for name, array in inverted.items()}


def _torch_zip() -> bytes:
  stream = io.BytesIO()
  with zipfile.ZipFile(stream, "w") as archive:
    archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
    archive.writestr("archive/version", b"3\n")
  return stream.getvalue()


def published_weights(seed: int) -> None:
  """So do others' files of weights, and the JSON files beside them."""
  rng = random.Random(seed)
  arrays = _KEPT("swin", _swin)
  whole = _KEPT("safetensors", lambda: safetensors.numpy.save(arrays))
  config = {"input_size": [3, 4, 4], "mean": [0.5] * 3, "std": [0.5] * 3}
  config |= {"crop_pct": 0.9, "interpolation": "bicubic", "architecture": "swin"}
  index = {"weight_map": dict.fromkeys(arrays, "model.safetensors")}
  sound = {
    "config.json": json.dumps(config).encode(),
    "index.json": json.dumps(index).encode(),
    "model.safetensors": whole,
    "model.pth": _KEPT("torch", _torch_zip),
  }
  damaged, kind = dict(sound), rng.randrange(6)
  if kind == 0:
    damaged["config.json"] = damaged_json(config, rng)
  elif kind == 1:
    damaged["index.json"] = damaged_json(index, rng)
  elif kind == 2:
    # The lengths fit, but the header says something else.
    length = 8 + int.from_bytes(whole[:8], "little")
    header = damaged_json(json.loads(whole[8:length]), rng)
    size = len(header).to_bytes(8, "little")
    damaged["model.safetensors"] = size + header + whole[length:]
  else:
    name = "model.pth" if kind == 3 else "model.safetensors"
    damaged[name] = mutate(sound[name], rng)
  with tempfile.TemporaryDirectory() as folder:
    for name, data in damaged.items():
      (Path(folder) / name).write_bytes(data)
    for name in ("model.safetensors", "model.pth", "index.json"):
      path = Path(folder) / name
      with _clear_errors():
        weights.pixels_of(str(path))
      with _clear_errors():
        weights.architecture_of(str(path))
      with _clear_errors():
        assert all(np.isfinite(x).all() for x in formats.read(path).leaves.values())


def npz_images(seed: int) -> None:
  """So does one of JPEG files."""
  from insvp_jax.data import preprocess

  rng = random.Random(seed)
  jpeg = np.frombuffer(_encoded(_noise(8, 8), "JPEG"), np.uint8)
  arrays = {
    "jpeg": np.tile(jpeg, 2),
    "offsets": np.arange(3) * len(jpeg),
    "labels": np.arange(2),
    "class_names": np.array(["a", "b"]),
  }
  if rng.random() < 0.5:
    name = rng.choice(list(arrays))
    others = (np.array([2**40, -1]), np.zeros((2, 2)), np.array(3), np.array([]))
    arrays[name] = rng.choice((*others, np.array(["x"]), arrays["labels"][:1]))
  data = _npz(**arrays)
  data = data if rng.random() < 0.3 else _damaged_npz(data, rng)
  preset, options = preprocess.get_preset("vtab"), decode.DecodeOptions()
  _with_file(data, lambda path: cifar_npz._read(path, preset, 8, options))


def cached_data(seed: int) -> None:
  """Whatever a file of the cache holds, the data are those of the source."""
  rng = random.Random(seed)
  labels = np.arange(2, dtype=np.int32)
  task = TaskData(
    "t", ("a", "b"), {"train": ArraySplit(np.ones((2, 4, 4, 3), np.uint8), labels)}
  )
  index = {"offset": np.arange(3), "names": np.array(["a", "b", "c"])}
  cases = (
    (cache.cached_task, lambda: task, lambda got: got.splits["train"].images),
    (cache.cached_split, lambda: task.splits["train"], lambda got: got.images),
    (cache.cached_arrays, lambda: index, lambda got: got["offset"]),
  )
  cached, make, pixels = rng.choice(cases)
  with tempfile.TemporaryDirectory() as folder:
    expected = pixels(cached({}, make, folder))
    (path,) = Path(folder).iterdir()
    # Changes that fit the checksums are nobody's accident.
    path.write_bytes(mutate(path.read_bytes(), rng))
    with mock.patch.object(cache.logging, "warning"):
      got = pixels(cached({}, make, folder))
    assert np.array_equal(got, expected), "other data"


def record_starts(seed: int) -> None:
  """The lengths in a TFRecord file may be anything."""
  rng = random.Random(seed)
  record = struct.pack("<Q", 20) + bytes(4 + 20 + 4)
  data = mutate(record * 3, rng)

  def read(path: Path) -> None:
    position, number = tfrecords._record_start(path, 3)
    assert position >= 0 and 0 <= number <= 3

  _with_file(data, read)


def checksums(seed: int) -> None:
  """Lists of checksums, and the description beside them."""
  rng = random.Random(seed)
  with tempfile.TemporaryDirectory() as folder:
    where = Path(folder) / "3"
    for item in ("adapter", "progress", "meta"):
      (where / item).mkdir(parents=True)
      (where / item / checkpoint_files.JSON_FILE).write_text('{"step": 3}')
    checkpoint_files.write_checksums(where)
    file = where / checkpoint_files.CHECKSUMS
    file.write_bytes(damaged_json(json.loads(file.read_text()), rng))
    with _clear_errors():
      checkpoint_files.verify(where)
    meta = where / "meta" / checkpoint_files.JSON_FILE
    meta.write_bytes(damaged_json({"config": {"seed": 1}, "classes": ["a"]}, rng))
    with _clear_errors():
      assert isinstance(checkpoint_files.read_json(where, "meta"), dict)


def run_files(seed: int) -> None:
  """config.json and result.json."""
  value = {"test_accuracy": 0.5, "config": {"data": {"root": "x"}}, "names": ["a", "b"]}
  data = damaged_json(value, random.Random(seed))
  _with_file(data, checkpoint_files.load_json)


def _made_run() -> Path:
  from tiny_runs import make_run

  return make_run(Path(tempfile.mkdtemp()))[0]


def run_meta(seed: int) -> None:
  """The descriptions of a run and of its progress, of which a value is another."""
  from insvp_jax import run as run_lib
  from insvp_jax.tools import run_data

  rng, workdir = random.Random(seed), _KEPT("run", _made_run)
  with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
    # That it has no checksums.
    warnings.simplefilter("ignore")
    where = Path(folder) / "checkpoints" / "1"
    shutil.copytree(workdir / "checkpoints" / "1", where)
    (where / checkpoint_files.CHECKSUMS).unlink()
    file = where / rng.choice(("meta", "meta", "meta", "progress")) / "metadata"
    file.write_text(json.dumps(_replaced(json.loads(file.read_text()), rng)))
    with _clear_errors():
      checkpoint_files.read_progress(where)
    with _clear_errors():
      run = run_lib.load_run(folder)
      assert run.decode_options.max_pixels > 0
      if seed % 20 == 0:
        run.predict(np.zeros((3, 3, 3), np.uint8))
      run_data.read(run)


def metrics_lines(seed: int) -> None:
  """Of metrics.jsonl whole lines up to a step are kept."""
  rng = random.Random(seed)
  lines = [damaged_json({"step": i, "loss": 1.5}, rng) for i in range(2)]
  lines.insert(rng.randrange(3), b'{"step": 0}')
  data = rng.choice((b"\n", b"\r\n", b"")).join(lines) + rng.choice((b"\n", b""))

  def read(path: Path) -> None:
    kept = writers._kept_lines(path, 5, rng.choice((None, 0, 2)))
    assert data.startswith(b"".join(kept))
    assert all(json.loads(line)["step"] <= 5 for line in kept)

  _with_file(data, read)


def lock_files(seed: int) -> None:
  """Whatever a lock file holds, a workdir that nobody has is free."""
  rng = random.Random(seed)
  data = damaged_json({"host": "h", "pid": 3, "started": "2020"}, rng)
  with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / lock.LOCK_FILE).write_bytes(data)
    with contextlib.redirect_stderr(io.StringIO()) as said, lock.hold(folder):
      pass
    assert said.getvalue().count("\n") <= 1, said.getvalue()


def split_lists(seed: int) -> None:
  """JSON lists of splits."""
  rng = random.Random(seed)
  good = {"a/1.jpg": 1, "a/2.jpg": 1, "b/1.jpg": "2"}
  with tempfile.TemporaryDirectory() as folder:
    for name in ("train", "val"):
      members = {f"{name}/{key}": value for key, value in good.items()}
      if rng.random() < 0.7:
        members = dict.fromkeys(members, rng.choice((1, "1", 2**70)))
      (Path(folder) / f"{name}.json").write_bytes(damaged_json(members, rng))
    with _clear_errors():
      lists = vpt_lists.read_lists(folder, ("train", "val"))
      vpt_lists.labels_of_lists(lists, rng.choice((1, 2)), folder)


def stored_splits_lists(seed: int) -> None:
  """The lists of files that a run keeps."""
  rng = random.Random(seed)
  value = {
    "class_names": ["a", "b"],
    "splits": {
      "train": {"a": ["a/1.png"], "b": ["b/1.png"]},
      "test": {"a": ["a/2.png"]},
    },
  }
  with tempfile.TemporaryDirectory() as folder:
    for name in ("a/1.png", "a/2.png", "b/1.png"):
      path = Path(folder) / name
      path.parent.mkdir(exist_ok=True)
      path.write_bytes(b"x")
    path = Path(folder) / "splits.json"
    path.write_bytes(damaged_json(value, rng))
    with _clear_errors(), folder_or_zip.open_folder_or_zip(folder) as root:
      class_names, splits, _ = stored_splits.read(root, str(path))
      labels = [label for members in splits.values() for _, label in members]
      assert all(0 <= label < len(class_names) for label in labels)


def label_tables(seed: int) -> None:
  """CSVs of labels: of images that are there, with classes and splits as they say."""
  rng = random.Random(seed)
  names = ["a/1.png", "a/2.png", "b/1.png", "b/2.png", "c.jpg"]
  rows = [(name, name[0], rng.choice(("train",) * 9 + ("val",))) for name in names]
  width, end = rng.choice((2, 3)), rng.choice(("\n", "\r\n", "\r"))
  cells = [row[:width] for row in [("path", "label", "split"), *rows]]
  delimiter = rng.choice(",;\t|")
  lines = [delimiter.join(row) for row in cells[rng.randrange(2) :]]
  data = end.join(lines).encode(rng.choice(("utf-8", "utf-8-sig", "utf-16")))
  with tempfile.TemporaryDirectory() as folder:
    for name in names:
      path = Path(folder) / name
      path.parent.mkdir(exist_ok=True)
      path.write_bytes(b"x")
    path = Path(folder) / "labels.csv"
    path.write_bytes(mutate(data, rng) if rng.random() < 0.8 else data)
    config = defaults().data
    config.labels = str(path)
    told = mock.patch.object(labels_csv.logging, "warning")
    with told, _clear_errors(), folder_or_zip.open_folder_or_zip(folder) as root:
      layout = labels_csv.find_layout(root, config)
      listed = [member for some in layout.splits.values() for member in some]
      assert {name for name, _ in listed} <= {*names, "labels.csv"}
      assert all(0 <= label < len(layout.class_names) for _, label in listed)
      assert len(layout.class_names) > 1 and layout.splits["train"]


FUZZERS = (
  *(image_bytes, image_metadata, zip_directory, npz_arrays, npz_backbone, npz_images),
  *(cached_data, record_starts, checksums, run_files, run_meta, metrics_lines),
  *(lock_files, split_lists, stored_splits_lists, published_weights, label_tables),
)


def _main(name: str, first: int, count: int) -> None:
  """Runs many seeds of a fuzzer, and prints what is found."""
  fuzzer = next(fuzzer for fuzzer in FUZZERS if fuzzer.__name__ == name)
  fuzzer(first)  # What is made once takes time.
  resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
  num_found, slowest = 0, 0.0
  highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  for seed in range(first, first + count):
    start = time.monotonic()
    try:
      fuzzer(seed)
    except Exception:
      num_found += 1
      if num_found <= 5:
        print(f"{name} {seed}:", traceback.format_exc(limit=-4))
    seconds = time.monotonic() - start
    slowest = max(slowest, seconds)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if seconds > MAX_SECONDS or (rss - highest) * 1024 > MAX_BYTES // 4:
      print(f"{name} {seed}: {seconds:.1f} s, {rss / 1024:.0f} MiB", flush=True)
    highest = max(highest, rss)
  print(
    f"{name}: {count} examples, {num_found} found, slowest {slowest:.2f} s, at most "
    f"{highest / 1024:.0f} MiB"
  )


if __name__ == "__main__":
  _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

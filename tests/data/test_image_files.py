"""Image files of any size and kind: what is read of them, and how."""

import dataclasses
import functools
import os
import runpy
import sys
import tracemalloc
import zipfile

from data_fixtures import (
  data_config,
  deep_png,
  encode,
  numbered_files,
  pixels,
  png,
  write_folder,
  write_zip,
)
import numpy as np
from PIL import Image
import pytest

from insvp_jax.data import decode, image_files, load_data, preprocess
from insvp_jax.data.folder_or_zip import open_folder_or_zip
from insvp_jax.data.image_files import ImageFiles

_PRESET = preprocess.get_preset("modern")


def _files(root, **options):
  """Returns the list of all files of a folder or archive."""
  with open_folder_or_zip(str(root)) as tree:
    names = sorted(tree.entries().files)
  return ImageFiles(
    str(root),
    names,
    np.zeros(len(names), np.int32),
    options=decode.DecodeOptions(**options),
  )


def _squares(images, size=8, skip_corrupt=False):
  return list(image_files.read_all(images, _PRESET, size, skip_corrupt))


def _warnings(caplog):
  return [record.getMessage() for record in caplog.records]


def _irregular(folder):
  """Writes a good image beside what is none: returns the names of these."""
  write_folder(folder, {"good.png": png(pixels(1))})
  os.mkfifo(folder / "fifo.png")
  (folder / "zero.png").symlink_to("/dev/zero")
  (folder / "link.png").symlink_to("fifo.png")
  with (folder / "vast.png").open("wb") as file:
    file.truncate(2**42)
  return {
    "fifo.png": "a pipe",
    "zero.png": "a device",
    "link.png": "a pipe",
    "vast.png": "has 4194304.0 MiB, expected at most 512.0",
  }


def test_what_is_no_file_is_named_or_left_out(tmp_path, caplog):
  names = _irregular(tmp_path)
  # As where they came after the files were listed, or a list names them.
  listed = sorted([*names, "good.png"])
  images = dataclasses.replace(
    _files(tmp_path), names=listed, labels=np.zeros(len(listed), np.int32)
  )
  for name, kind in names.items():
    alone = dataclasses.replace(images, names=[name], labels=images.labels[:1])
    with pytest.raises(ValueError, match=f"{name} (is )?{kind}.* Copy the file anew"):
      _squares(alone)
  squares = _squares(images, skip_corrupt=True)
  assert [square is not None for square in squares] == [
    n not in names for n in images.names
  ]
  assert len(_warnings(caplog)) == 4
  with open_folder_or_zip(str(tmp_path)) as root:
    sizes = dict(zip(images.names, root.sizes(images.names), strict=True))
  assert [sizes[n] for n in ("fifo.png", "zero.png", "link.png")] == [-1, -1, -1]


def test_a_member_that_unpacks_to_much_is_not_unpacked(tmp_path, caplog):
  path = write_zip(tmp_path / "x.zip", {"a.png": png(pixels(1))})
  with (
    zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
    archive.open("b.png", "w", force_zip64=True) as member,
  ):
    for _ in range(64):
      member.write(bytes(2**20))
  assert path.stat().st_size < 2**18
  images = _files(path, max_bytes=2**20)
  tracemalloc.start()
  with pytest.raises(ValueError, match=r"x.zip/b.png has 64.0 MiB, .*data.max_file_mb"):
    _squares(images)
  first, second = _squares(images, skip_corrupt=True)
  assert first is not None and second is None
  assert tracemalloc.get_traced_memory()[1] < 2**24
  tracemalloc.stop()
  assert "b.png has 64.0 MiB" in _warnings(caplog)[0]
  # The limit is raised by a key: then it is read, and is no image.
  raised = dataclasses.replace(images, options=decode.DecodeOptions(max_bytes=2**28))
  with pytest.raises(ValueError, match="b.png is not an image"):
    _squares(raised)


def test_the_limits_are_keys(tmp_path):
  content = {f"{name}/{i}.png": png(pixels(i)) for name in "ab" for i in range(9)}
  root = write_folder(tmp_path, content)
  config = data_config(root=str(root), max_pixels=60, max_file_mb=7, max_16bit=4095)
  options = decode.DecodeOptions.from_config(config)
  assert options == decode.DecodeOptions(60, 7 * 2**20, 4095)
  images = dataclasses.replace(_files(root), options=options)
  with pytest.raises(ValueError, match="has suspiciously many pixels.*max_pixels=64"):
    _squares(images)


def test_what_changes_pixels_or_what_is_read_changes_keys(tmp_path):
  root = write_folder(tmp_path, {"a.png": png(pixels(1))})
  stream = _files(root).stream(_PRESET, 8)
  deep = _files(root, max_16bit=4095).stream(_PRESET, 8)
  small = _files(root, max_pixels=9).stream(_PRESET, 8)
  assert stream.digest != deep.digest
  assert stream.digest == small.digest and stream.stamp != small.stamp


def test_elongated_images_are_named(tmp_path):
  thin = Image.fromarray(np.zeros((1, 40_000, 3), np.uint8))
  root = write_folder(tmp_path, {"thin.png": encode(thin, "PNG")})
  images = _files(root)
  preset = preprocess.get_preset("insvp_release")
  read = functools.partial(image_files.read_all, images, preset, 224)
  with pytest.raises(ValueError, match="thin.png: .* too elongated .* Copy"):
    list(read(False))
  assert list(read(True)) == [None]


# --- Sets of 16-bit images.


def _deep_set(root, highest, split="train", number=6):
  rng = np.random.default_rng(0)
  for name in "ab":
    for i in range(number):
      values = rng.integers(0, highest + 1, (8, 8, 1)).astype(np.uint16)
      values[0, 0] = highest
      write_folder(root, {f"{split}/{name}/{i}.png": deep_png(values)})
  return root


def _load(root, **changes):
  changes = {"val_fraction": 0.2} | changes
  return load_data("folder", data_config(root=str(root), **changes), 8)


@pytest.mark.parametrize("resident_mb", [0, 1024])
def test_unused_bits_are_told_once_of_a_set(tmp_path, caplog, resident_mb):
  root = _deep_set(tmp_path / "set", 4000)
  cache = str(tmp_path / "cache")
  for _ in range(2):  # the second time from the cache
    caplog.clear()
    _load(root, resident_mb=resident_mb, cache_dir=cache)
    told = [text for text in _warnings(caplog) if "16-bit" in text]
    assert len(told) == 1 and str(root) in told[0]
    assert (
      "is above 4000, " in told[0] and "config.data.max_16bit=4095 (12 bits)" in told[0]
    )


def test_one_image_of_the_full_range_is_enough(tmp_path, caplog):
  root = _deep_set(tmp_path, 4000)
  values = np.full((8, 8, 1), 65535, np.uint16)
  write_folder(root, {"train/a/full.png": deep_png(values)})
  _load(root)
  assert not _warnings(caplog)


def test_sets_of_8_bits_are_told_nothing(tmp_path, caplog, monkeypatch):
  dark = {
    k: png(pixels(0) // 255) for k in numbered_files({"train/a": 5, "train/b": 5})
  }
  root, cache = write_folder(tmp_path / "set", dark), str(tmp_path / "cache")
  _load(root, cache_dir=cache)
  # From the cache nothing is decoded, to look for 16 bits either.
  monkeypatch.setattr(decode, "decoded", None)
  _load(root, cache_dir=cache)
  assert not [text for text in _warnings(caplog) if "16-bit" in text]


@pytest.fixture(scope="module")
def twelve_bit(shared_dir, tmp_path_factory):
  """The sets of ../shared/cases/twelve-bit."""
  make = shared_dir / "cases" / "twelve-bit" / "make.py"
  if not make.is_file():
    pytest.skip(f"no {make}")
  out = tmp_path_factory.mktemp("twelve-bit")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "argv", [str(make), str(out)])
    runpy.run_path(str(make), run_name="__main__")
  return out


def test_twelve_bits_in_sixteen_are_told_and_can_be_set(twelve_bit, caplog):
  raw, full = (_squares(_files(twelve_bit / name), 32) for name in ("raw12", "full16"))
  told = _squares(_files(twelve_bit / "raw12", max_16bit=4095), 32)
  assert len(np.unique(raw)) < 5  # grey levels
  # 65520 is as good as white.
  assert np.abs(np.stack(told).astype(int) - np.stack(full)).max() <= 1
  assert len(np.unique(told)) > 20
  _load(twelve_bit / "raw12")
  _load(twelve_bit / "full16")
  messages = [text for text in _warnings(caplog) if "16-bit" in text]
  assert (
    len(messages) == 1 and "raw12" in messages[0] and "4095 (12 bits)" in messages[0]
  )


def test_the_range_of_a_folder_can_be_set(twelve_bit, caplog):
  raw = _load(twelve_bit / "raw12", max_16bit=4095)
  full = _load(twelve_bit / "full16")
  for name, split in full.splits.items():
    difference = split.images.astype(int) - raw.splits[name].images
    assert np.abs(difference).max() <= 1 and split.images.max() > 20
  assert not [text for text in _warnings(caplog) if "16-bit" in text]


@pytest.mark.parametrize("resident_mb", [0, 1024])
def test_limits_of_a_folder_hold_whatever_is_cached(tmp_path, resident_mb):
  root = write_folder(
    tmp_path / "set",
    numbered_files({"train/a": 9, "train/b": 9, "test/a": 2, "test/b": 2}),
  )
  large = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
  write_folder(root, {"train/a/large.png": png(large)})
  changes = {"resident_mb": resident_mb, "cache_dir": str(tmp_path / "cache")}
  changes["skip_corrupt"] = True
  for max_pixels, skipped in ((81, 0), (80, 1), (81, 0)):
    assert _load(root, max_pixels=max_pixels, **changes).skipped == skipped
  whole = _load(root, max_file_mb=1, **changes)
  assert whole.skipped == 0
  if resident_mb:
    with pytest.raises(
      ValueError, match="large.png has .* --config.data.max_pixels=81"
    ):
      _load(root, max_pixels=80)

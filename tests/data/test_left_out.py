"""Every file of a folder or archive is used, or counted and named."""

import os
import struct
import zipfile
import zlib

import data_fixtures as fixtures
from data_fixtures import data_config, pixels, png
import hypothesis
from hypothesis import strategies as st
import numpy as np
from PIL import Image
import pytest

from insvp_jax.data import folder_or_zip, image_kinds, load_data, splits
from insvp_jax.data.folder_or_zip import open_folder_or_zip

_SET = fixtures.numbered_files({"a": 5, "b": 5})


def _load(root, **changes):
  changes = {"val_fraction": 0.0, "test_fraction": 0.0, **changes}
  return load_data("folder", data_config(root=str(root), **changes), 8)


def _found(root):
  with open_folder_or_zip(str(root)) as tree:
    return image_kinds.find_images(tree)


def _line(root):
  return image_kinds.left_out_line(_found(root).left_out)


def _encoded(file_format):
  return fixtures.encode(Image.fromarray(pixels(7, 16)), file_format)


_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")


@pytest.mark.parametrize("file_format", _FORMATS)
@pytest.mark.parametrize("archive", [False, True])
def test_an_image_of_any_ending_is_found_by_its_content(tmp_path, file_format, archive):
  data = _encoded(file_format)
  content = {"b/c.png": png(pixels(1))}
  content |= {f"a/{name}": data for name in ("none", "x.tmp", "y.jpg_large", "z.JFIF")}
  write = fixtures.write_zip if archive else fixtures.write_folder
  root = write(tmp_path / ("x.zip" if archive else "x"), content)
  loaded = _load(root)
  assert len(loaded.splits["train"]) == 5
  assert not _line(root)
  for image in splits.to_memory(loaded.splits["train"]).images[:4]:
    np.testing.assert_allclose(image, pixels(7), atol=12)


@pytest.mark.parametrize(
  "head",
  [
    b"",
    b"{}",
    b"BM of the board",
    b"P1 10 20 of whom",
    b"P5\nis a suite",
    b"RIFF\x10\0\0\0WAVEfmt ",
    b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom",
    b"II and III",
    b"\xff\xd8",
    b"PK\x03\x04",
  ],
)
def test_what_looks_like_no_image(head):
  assert not image_kinds.looks_like_image(head)


@hypothesis.given(st.binary(max_size=300))
@hypothesis.settings(max_examples=200)
def test_any_bytes_are_judged(head):
  for start in (b"", b"P6\n", b"BM", b"RIFF", b"\xff\xff\xff\xffftyp", b"\0\0\0\0ftyp"):
    assert image_kinds.looks_like_image(start + head) in (True, False)


@pytest.mark.parametrize("archive", [False, True])
def test_one_line_counts_and_names_by_reason(tmp_path, archive, caplog):
  content = {
    **_SET,
    "readme.txt": b"text",
    "a/labels.json": b"{}",
    "a/empty": b"",
    "a/.hidden.png": png(pixels(0)),
    ".git/objects/1.png": png(pixels(0)),
    "loose.png": png(pixels(1)),
    # An operating system's own: without a word.
    **{
      f"a/{name}": b"x" for name in (".DS_Store", "Thumbs.db", "._1.png", "Desktop.ini")
    },
    "a/@eaDir/1.png/x.jpg": b"x",
    "__MACOSX/a/._1.png": b"x",
    "a/1.png:Zone.Identifier": b"x",
  }
  write = fixtures.write_zip if archive else fixtures.write_folder
  data = _load(write(tmp_path / ("x.zip" if archive else "x"), content))
  assert len(data.splits["train"]) == 10
  (record,) = caplog.records
  for part in (
    "3 no image (a/empty, a/labels.json, readme.txt)",
    "2 hidden (.git/, a/.hidden.png)",
    "1 in no class folder (loose.png)",
  ):
    assert part in record.message
  assert record.message.count(" (") == 3


_FILES = {
  **{name: png(pixels(3)) for name in ("1.png", "2", "3.jfif", "4.bin", ".5.png")},
  **{name: b"text" for name in ("6.txt", "7", ".8")},
}
_SYSTEM_FILES = ("._9.png", "Thumbs.db", "desktop.ini")
_NAMES = st.sampled_from([*_FILES, *_SYSTEM_FILES])
_FOLDERS = st.sampled_from(["", "a/", "a/b/", "c/", "\u732b/"])


@hypothesis.given(st.sets(st.tuples(_FOLDERS, _NAMES).map("".join)))
@hypothesis.settings(max_examples=60)
def test_every_file_is_used_or_counted(tmp_path_factory, names):
  root = tmp_path_factory.mktemp("x")
  content = {name: _FILES.get(name.split("/")[-1], b"x") for name in names}
  for path in (
    fixtures.write_folder(root, content),
    fixtures.write_zip(tmp_path_factory.mktemp("y") / "y.zip", content),
  ):
    found = _found(path)
    told = [
      *found.images,
      *(name for names in found.left_out.values() for name in names),
    ]
    assert sorted(told) == sorted(n for n in names if not n.endswith(_SYSTEM_FILES))


def test_a_known_ending_is_an_image_whatever_is_in_it(tmp_path):
  root = fixtures.write_folder(tmp_path, {**_SET, "a/x.jfif": b"", "b/y.jpe": b"text"})
  with pytest.raises(ValueError, match="x.jfif is empty"):
    _load(root)
  assert _load(root, skip_corrupt=True).skipped == 2


def test_files_of_known_endings_are_not_read_to_be_found(tmp_path, monkeypatch):
  root = fixtures.write_folder(tmp_path, _SET)
  monkeypatch.setattr(folder_or_zip._Folder, "head", None)
  assert len(_found(root).images) == 10


def test_what_is_no_regular_file_is_named_and_never_opened(tmp_path):
  root = fixtures.write_folder(tmp_path / "x", _SET)
  os.mkfifo(root / "a" / "pipe.png")
  os.mkfifo(root / "a" / "pipe")
  (root / "b" / "zero.jpg").symlink_to("/dev/zero")
  (root / "b" / "gone.jpg").symlink_to(tmp_path / "nowhere")
  (root / "b" / "self").symlink_to("self")
  line = _line(root)
  assert "3 no regular file (a/pipe, a/pipe.png, b/zero.jpg)" in line
  assert "2 behind a link that leads nowhere (b/gone.jpg, b/self)" in line
  assert len(_load(root).splits["train"]) == 10


def test_only_a_folder_in_itself_is_a_circle(tmp_path):
  fixtures.write_folder(
    tmp_path, fixtures.numbered_files({"pool": 4, "x/a": 3, "x/b": 3})
  )
  for name in ("a", "b"):
    (tmp_path / "x" / name / "more").symlink_to(tmp_path / "pool")
  (tmp_path / "pool" / "back").symlink_to(tmp_path / "x")
  found = _found(tmp_path / "x")
  assert len(found.images) == 2 * (3 + 4)
  circles = ["a/more/back/", "b/more/back/"]
  assert sorted(found.left_out[folder_or_zip.CIRCULAR]) == circles
  # By way of a folder around the root.
  (tmp_path / "x" / "a" / "up").symlink_to(tmp_path)
  assert len(_found(tmp_path / "x").images) == 2 * (3 + 4) + 4


def test_links_that_multiply_without_end_are_refused(tmp_path):
  for i in range(30):
    (tmp_path / str(i)).mkdir()
    for name in "xy":
      (tmp_path / str(i) / name).symlink_to(tmp_path / str(i + 1))
  (tmp_path / "30").mkdir()
  with pytest.raises(ValueError, match="/30 in more than 1000 ways; expected a tree"):
    _found(tmp_path / "0")


# --- Archives of other systems.


def _raw_zip(path, members, extra=lambda name: b""):
  """Writes an archive whose names are just these bytes."""
  out, directory = b"", b""
  for name, data in members:
    more = extra(name)
    sizes = (len(data), len(data), len(name), len(more))
    common = struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 33, zlib.crc32(data), *sizes)
    directory += b"PK\x01\x02" + struct.pack("<H", 20) + common
    directory += struct.pack("<HHHII", 0, 0, 0, 0, len(out)) + name + more
    out += b"PK\x03\x04" + common + name + more + data
  end = struct.pack(
    "<HHHHIIH", 0, 0, len(members), len(members), len(directory), len(out), 0
  )
  path.write_bytes(out + directory + b"PK\x05\x06" + end)
  return path


def _members(*names, count=5, sep=b"/"):
  """Returns images for each folder; no two are alike."""
  return [
    (name + sep + f"{i}.png".encode(), png(pixels(1000 * k + i)))
    for k, name in enumerate(names)
    for i in range(count)
  ]


@pytest.mark.parametrize(
  "encoding,names",
  [
    ("cp932", ("表", "ソ", "能", "犬", "猫")),  # all but two end in a backslash's byte
    ("gbk", ("狗", "猫", "俓")),
    ("big5", ("功", "許", "狗")),
    ("cp949", ("개", "고양이")),
    ("cp1251", ("кошка", "собака")),
    ("cp866", ("кошка", "собака")),
    ("latin-1", ("é", "è", "café")),
    ("cp437", ("é", "ü")),
    ("utf-8", ("犬", "é", "кошка")),
  ],
)
@pytest.mark.parametrize("sep", [b"/", b"\\"])
def test_names_in_other_encodings_stay_apart(tmp_path, encoding, names, sep, caplog):
  raw = [b"set" + sep + b"train" + sep + name.encode(encoding) for name in names]
  root = _raw_zip(tmp_path / "x.zip", _members(*raw, sep=sep))
  data = _load(root)
  assert data.num_classes == len(names)
  assert np.bincount(data.splits["train"].labels).tolist() == [5] * len(names)
  assert all(name.isprintable() for name in data.class_names)
  if encoding == "utf-8":
    assert data.class_names == tuple(sorted(names)) and not caplog.records
    return
  assert "are not UTF-8 are shown by their bytes" in caplog.text
  # Unpacked without a word on the encoding, it is the same set.
  folder = os.fsencode(tmp_path / "folder")
  for k, name in enumerate(names):
    inner = os.path.join(folder, b"train", name.encode(encoding))
    os.makedirs(inner)
    for i in range(5):
      with open(os.path.join(inner, f"{i}.png".encode()), "wb") as file:
        file.write(png(pixels(1000 * k + i)))
  unpacked = _load(tmp_path / "folder")
  assert unpacked.class_names == data.class_names
  np.testing.assert_array_equal(
    unpacked.splits["train"].images, data.splits["train"].images
  )


def test_info_zips_unicode_names_are_used(tmp_path):
  def extra(name):
    field = (
      b"\x01" + struct.pack("<I", zlib.crc32(name)) + name.decode("cp866").encode()
    )
    return struct.pack("<HH", 0x7075, len(field)) + field

  members = _members(*(name.encode("cp866") for name in ("кошка", "собака")))
  data = _load(_raw_zip(tmp_path / "x.zip", members, extra))
  assert data.class_names == ("кошка", "собака")


@pytest.mark.parametrize("prefix", ["./", "/", ".//set/./", "set/../"])
def test_prefixes_of_members_do_not_matter(tmp_path, prefix, caplog):
  content = {f"{prefix}{name}": data for name, data in _SET.items()}
  data = _load(fixtures.write_zip(tmp_path / "x.zip", content))
  assert data.class_names == ("a", "b") and len(data.splits["train"]) == 10
  assert not caplog.records


def test_members_that_leave_the_archive_or_come_twice_are_named(tmp_path, caplog):
  path = fixtures.write_zip(tmp_path / "x.zip", {**_SET, "../a/9.png": png(pixels(9))})
  with (
    zipfile.ZipFile(path, "a") as archive,
    pytest.warns(UserWarning, match="Duplicate name"),
  ):
    archive.writestr("a/000.png", png(pixels(99)))
  with zipfile.ZipFile(path, "a") as archive:
    archive.writestr("./b/000.png", png(pixels(98)))
    link = zipfile.ZipInfo("b/link.png")
    link.external_attr = 0o120777 << 16
    archive.writestr(link, "000.png")
  data = _load(path)
  numbers = [fixtures.number_of(image) for image in data.splits["train"].images]
  assert numbers == [99, 1, 2, 3, 4, 98, 6, 7, 8, 9]
  (record,) = caplog.records
  for part in (
    "1 outside of the archive's root (../a/9.png)",
    "2 replaced by a later member of the same name (a/000.png, b/000.png)",
    "1 a link in an archive (b/link.png)",
  ):
    assert part in record.message


def test_a_member_that_unpacks_to_too_much_is_named(tmp_path):
  content = {**_SET, "a/bomb.png": bytes(10_000_000)}
  with open_folder_or_zip(str(fixtures.write_zip(tmp_path / "x.zip", content))) as root:
    with pytest.raises(ValueError, match="bomb.png unpacks from .* no photograph"):
      root.read("a/bomb.png", 20_000_000)
    with pytest.raises(ValueError, match="bomb.png has 9.5 MiB, expected at most 1.0"):
      root.read("a/bomb.png", 2**20)
    assert len(root.read("a/bomb.png", 40_000_000)) == 10_000_000
  with (
    open_folder_or_zip(str(fixtures.write_folder(tmp_path / "x", content))) as root,
    pytest.raises(ValueError, match="bomb.png has 9.5 MiB, expected at most 1.0"),
  ):
    root.read("a/bomb.png", 2**20)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=150)
def test_damaged_archives_end_in_one_line(tmp_path_factory, data):
  folder = tmp_path_factory.getbasetemp() / "damaged"
  folder.mkdir(exist_ok=True)
  content = bytearray(
    fixtures.write_zip(folder / "x.zip", {**_SET, "a/é.png": b"x"}).read_bytes()
  )
  # Mostly the directory, at the end.
  places = st.integers(0, 400) | st.integers(0, len(content) - 1)
  for place in data.draw(st.lists(places, min_size=1, max_size=4)):
    content[len(content) - 1 - place] = data.draw(st.integers(0, 255))
  (folder / "y.zip").write_bytes(content)
  try:
    _load(folder / "y.zip", skip_corrupt=True)
  except (ValueError, FileNotFoundError) as error:
    assert "\n" not in str(error) and "y.zip" in str(error)


_PARTS = st.sampled_from(
  ["a", "b", "..", ".", "", "c\\d", "é", "__MACOSX", ".x", "x.png"]
)


@hypothesis.given(st.lists(st.lists(_PARTS, max_size=6).map("/".join), max_size=8))
@hypothesis.settings(max_examples=100)
def test_every_member_is_a_file_or_named(tmp_path_factory, names):
  path = tmp_path_factory.getbasetemp() / "members.zip"
  names = [name for name in dict.fromkeys(names) if name]
  fixtures.write_zip(path, {name: png(pixels(0)) for name in names})
  with open_folder_or_zip(str(path)) as tree:
    entries = tree.entries()
    for name in entries.files:
      assert not {"", ".", ".."} & {*name.split("/")}
      tree.read(name)


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "{root}/../secret"])
def test_a_listed_name_stays_in_its_folder(tmp_path, name):
  (tmp_path / "set" / "a").mkdir(parents=True)
  (tmp_path / "secret").write_bytes(b"x")
  with open_folder_or_zip(str(tmp_path / "set")) as root:
    for wrong in (name.format(root=tmp_path / "set"), "a\0b"):
      assert root.sizes([wrong]) == [-1] and root.head(wrong, 1) is None
      assert root.fingerprint([wrong])[1] == [[wrong]]
      with pytest.raises(ValueError, match="cannot read"):
        root.read(wrong)

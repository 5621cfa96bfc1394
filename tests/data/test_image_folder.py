import dataclasses
import importlib.metadata
import os
import sys
import zipfile

import data_fixtures as fixtures
from data_fixtures import data_config, number_of, pixels, png
import numpy as np
from PIL import Image
import pytest

from insvp_jax.data import StreamSplit, decode, load_data, splits

_SPLIT = {
  "train/cat": 4,
  "train/dog": 3,
  "val/cat": 2,
  "val/dog": 1,
  "test/cat": 2,
  "test/dog": 2,
}
_FLAT = {"ant": 10, "bee": 20, "fly": 3}


def _load(root, image_size=8, **changes):
  config = data_config(root=str(root), **changes)
  return load_data("folder", config, image_size)


def _numbers(split):
  return [number_of(image) for image in split.images]


def _assert_equal(left, right):
  assert left.class_names == right.class_names
  assert list(left.splits) == list(right.splits)
  for name, split in left.splits.items():
    np.testing.assert_array_equal(split.images, right.splits[name].images)
    np.testing.assert_array_equal(split.labels, right.splits[name].labels)


def test_the_splits_on_disk_are_kept(tmp_path):
  root = fixtures.write_folder(tmp_path / "pets", fixtures.numbered_files(_SPLIT))
  data = _load(root)
  assert data.name == "pets" and data.class_names == ("cat", "dog")
  assert data.summary().splitlines() == [
    "pets: 2 classes, train 7, val 3, test 4, train_val 10",
    "images of each class (train/val/test): cat 4/2/2, dog 3/1/2",
  ]
  assert _numbers(data.splits["train"]) == [0, 1, 2, 3, 4, 5, 6]
  assert data.splits["train"].labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
  assert _numbers(data.splits["val"]) == [7, 8, 9]
  assert _numbers(data.splits["test"]) == [10, 11, 12, 13]
  assert _numbers(data.splits["train_val"]) == list(range(10))
  assert data.splits["train_val"].labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 1]


def test_an_archive_equals_the_folder(tmp_path):
  content = fixtures.numbered_files(_SPLIT)
  folder = _load(fixtures.write_folder(tmp_path / "pets", content))
  noise = {
    "__MACOSX/pets/train/._cat": b"x",
    "pets/.DS_Store": b"x",
    "pets/train/.hidden/000.png": b"x",
    "pets/train/cat/._000.png": b"x",
    "pets/readme.txt": b"x",
  }
  bare = fixtures.write_zip(tmp_path / "bare.zip", content)
  wrapped = {f"pets/{name}": data for name, data in content.items()}
  wrapped = fixtures.write_zip(tmp_path / "wrapped.zip", {**noise, **wrapped})
  for path in (bare, wrapped):
    data = _load(path)
    assert data.name == path.stem
    _assert_equal(data, folder)
  assert not list(tmp_path.glob("**/extracted*"))


def test_a_folder_around_everything_and_other_names_for_val(tmp_path):
  content = {
    name.replace("val/", "Validation/"): data
    for name, data in fixtures.numbered_files(_SPLIT).items()
  }
  content = {f"a/b/{name}": data for name, data in content.items()}
  data = _load(fixtures.write_folder(tmp_path, content))
  assert _numbers(data.splits["val"]) == [7, 8, 9]


def test_archives_made_on_windows(tmp_path):
  path = tmp_path / "w.zip"
  with zipfile.ZipFile(path, "w") as archive:
    for name, data in fixtures.numbered_files(_SPLIT).items():
      info = zipfile.ZipInfo("x")
      info.filename = name.replace("/", "\\")
      archive.writestr(info, data)
  assert len(_load(path).splits["train"]) == 7


def test_classes_alone_are_split_by_share_and_seed(tmp_path):
  root = fixtures.write_folder(tmp_path, fixtures.numbered_files(_FLAT))
  data = _load(root, val_fraction=0.1, test_fraction=0.2)
  counts = {name: np.bincount(s.labels).tolist() for name, s in data.splits.items()}
  assert counts == {
    "train": [7, 14, 1],
    "val": [1, 2, 1],
    "test": [2, 4, 1],
    "train_val": [8, 16, 2],
  }
  parts = [_numbers(data.splits[name]) for name in ("train", "val", "test")]
  assert sorted(sum(parts, [])) == list(range(33))
  assert _numbers(data.splits["train_val"]) == parts[0] + parts[1]
  _assert_equal(data, _load(root, val_fraction=0.1, test_fraction=0.2))
  other = _load(root, split_seed=1)
  assert _numbers(other.splits["test"]) != parts[2]


def test_only_the_missing_split_is_taken_from_train(tmp_path):
  content = fixtures.numbered_files({"train/a": 10, "train/b": 10, "test/a": 2})
  data = _load(fixtures.write_folder(tmp_path, content), val_fraction=0.2)
  assert [len(data.splits[n]) for n in ("train", "val", "test")] == [16, 4, 2]
  data = _load(tmp_path, val_fraction=0.0)
  assert "val" not in data.splits
  assert data.splits["train_val"] is data.splits["train"]
  assert len(data.splits["train"]) == 20


def test_a_class_that_cannot_be_split_stays_in_train_and_is_named(tmp_path, caplog):
  files = fixtures.numbered_files({"a": 9, "b": 2, "c": 1})
  root = fixtures.write_folder(tmp_path, files)
  with caplog.at_level("WARNING", "absl"):
    splits = _load(root).splits
  assert {name: set(splits[name].labels) for name in ("train", "val", "test")} == {
    "train": {0, 1, 2},
    "val": {0},
    "test": {0, 1},
  }
  assert "2 of the classes have too few images for one in val: b, c" in caplog.text
  assert "1 of the classes have too few images for one in test: c" in caplog.text
  assert len(_load(root, test_fraction=0.0).splits["train"]) == 10
  with pytest.raises(ValueError, match="together below 1"):
    _load(root, val_fraction=0.7, test_fraction=0.3)


def test_labels_follow_sorted_names_in_every_split(tmp_path):
  counts = {"train/10": 1, "train/2": 1, "train/é": 1, "val/2": 1, "test/e\u0301": 1}
  data = _load(fixtures.write_folder(tmp_path, fixtures.numbered_files(counts)))
  assert data.class_names == ("10", "2", "é")
  assert data.splits["val"].labels.tolist() == [1]
  assert data.splits["test"].labels.tolist() == [2]


def test_labels_that_differ_between_splits_are_listed(tmp_path):
  counts = {**_SPLIT, "val/Dog": 1, "val/cow": 1}
  root = fixtures.write_folder(tmp_path, fixtures.numbered_files(counts))
  with pytest.raises(ValueError, match="val of .*'Dog', 'cow'.*Did you mean 'dog'"):
    _load(root)


@pytest.mark.parametrize("empty", ["train/cow", "val/cat2", "test/x"])
def test_a_class_without_images_is_named(tmp_path, empty):
  content = {**fixtures.numbered_files(_SPLIT), empty: None}
  name = empty.split("/")[1]
  for root in (
    fixtures.write_folder(tmp_path / "f", content),
    fixtures.write_zip(tmp_path / "f.zip", content),
  ):
    with pytest.raises(ValueError, match=f"class '{name}' of .* has no images"):
      _load(root)
  (tmp_path / "f" / empty / "notes.txt").write_text("nothing here")
  with pytest.raises(ValueError, match=f"class '{name}' of .* has no images"):
    _load(tmp_path / "f")


@pytest.mark.parametrize(
  "content,message",
  [
    ({}, "no class folders"),
    ({"a.png": png(pixels(0))}, "no class folders.*1 images lie there"),
    ({"a/1.png": png(pixels(0))}, "only one class, 'a'"),
    ({"val/a/1.png": png(pixels(0)), "test/a/1.png": b""}, "but no train folder"),
    (
      {"train/1.png": png(pixels(0)), "val/a/1.png": b""},
      "no class folders in .*train",
    ),
    (
      {"train/a/1.png": b"", "train/b/1.png": b"", "val/x.png": b""},
      "no class folders in .*val",
    ),
    (
      {"train/a/1.png": b"", "val/a/1.png": b"", "valid/a/1.png": b""},
      "val and valid, which both mean val",
    ),
  ],
)
def test_layouts_that_make_no_sense_are_explained(tmp_path, content, message):
  root = fixtures.write_folder(tmp_path / "f", content)
  root.mkdir(exist_ok=True)
  with pytest.raises(ValueError, match=message):
    _load(root)


def test_missing_roots(tmp_path):
  with pytest.raises(FileNotFoundError, match="root is empty.*train/<class"):
    _load("")
  with pytest.raises(FileNotFoundError, match="no .*nowhere; expected a folder or"):
    _load(tmp_path / "nowhere")
  (tmp_path / "x.zip").write_bytes(b"not a zip" * 30)
  with pytest.raises(ValueError, match="x.zip is no readable zip archive"):
    _load(tmp_path / "x.zip")
  whole = fixtures.write_zip(tmp_path / "y.zip", fixtures.numbered_files(_SPLIT))
  whole.write_bytes(whole.read_bytes()[:-200])
  with pytest.raises(ValueError, match="y.zip is no readable zip archive"):
    _load(whole)


@pytest.mark.parametrize("archive", [False, True])
def test_corrupt_images_are_named_or_counted(tmp_path, archive):
  content = fixtures.numbered_files({"train/a": 40, "train/b": 40, "test/a": 3})
  bad = {
    "train/a/017.png": b"",
    "train/b/003.png": png(np.eye(9, dtype=np.uint8))[:50],
    "test/a/001.png": b"no image",
  }
  content.update(bad)
  root = (
    fixtures.write_zip(tmp_path / "d.zip", content)
    if archive
    else fixtures.write_folder(tmp_path / "d", content)
  )
  with pytest.raises(ValueError, match="train/a/017.png is empty.*skip_corrupt=True"):
    _load(root)
  data = _load(root, skip_corrupt=True, val_fraction=0.0)
  assert data.skipped == 3 and "3 unreadable images skipped" in data.summary()
  train, test = data.splits["train"], data.splits["test"]
  assert _numbers(train) == [i for i in range(80) if i not in (17, 43)]
  assert train.labels.tolist() == [0] * 39 + [1] * 39
  assert _numbers(test) == [80, 82]


def _newer_files():
  """Returns two classes of six images in the formats that not every decoder knows."""
  pytest.importorskip("pillow_heif").register_heif_opener()
  kinds = {"avif": "AVIF", "jp2": "JPEG2000", "HEIC": "HEIF"}
  return {
    f"{label}/{i}.{suffix}": fixtures.encode(
      Image.new("RGB", (48, 32), (colour, 0, 0)), file_format
    )
    for label, colour in (("a", 90), ("b", 180))
    for suffix, file_format in kinds.items()
    for i in range(2)
  }


@pytest.mark.parametrize("preset", ["vtab", "insvp_release"])
def test_newer_formats_are_found_and_decoded(tmp_path, preset):
  root = fixtures.write_folder(tmp_path, _newer_files())
  data = _load(root, 28, preset=preset, val_fraction=0.0, test_fraction=0.0)
  # Their headers say that they are elongated.
  assert (_streamed(data) == set()) == (preset == "vtab")
  split = splits.to_memory(data.splits["train"])
  assert len(split) == 12
  for image, label in zip(split.images, split.labels, strict=True):
    np.testing.assert_allclose(image[..., 0], (90, 180)[label], atol=3)


def test_without_its_decoder_an_image_is_named_or_counted(tmp_path, monkeypatch):
  root = fixtures.write_folder(tmp_path / "x", _newer_files())
  monkeypatch.setitem(sys.modules, "pillow_heif", None)
  advice = r"a/0.HEIC is a HEIC image, .*'insvp_jax\[heif\]'. Mend or remove the file"
  with pytest.raises(ValueError, match=advice):
    _load(root)
  changes = {"skip_corrupt": True, "cache_dir": str(tmp_path / "cache")}

  def not_installed(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, "version", not_installed)
  assert _load(root, **changes).skipped == 4
  # What the cache holds is of other decoders.
  monkeypatch.undo()
  assert _load(root, **changes).skipped == 0


def test_a_class_of_nothing_but_corrupt_images_is_named(tmp_path):
  content = fixtures.numbered_files({"a": 4, "b": 4})
  content.update({f"c/{i}.jpg": b"junk" for i in range(3)})
  root = fixtures.write_folder(tmp_path, content)
  with pytest.raises(ValueError, match="class 'c' of train .* no readable images"):
    _load(root, skip_corrupt=True)


def test_a_damaged_archive_member_is_named(tmp_path):
  path = tmp_path / "d.zip"
  with zipfile.ZipFile(path, "w") as archive:  # stored, so the bytes can be found
    for name, data in fixtures.numbered_files({"a": 4, "b": 4}).items():
      archive.writestr(name, data)
  raw = path.read_bytes()
  at = raw.index(b"IDAT", raw.index(b"b/002.png"))
  path.write_bytes(raw[: at + 6] + bytes([raw[at + 6] ^ 255]) + raw[at + 7 :])
  with pytest.raises(ValueError, match="d.zip/b/002.png is damaged"):
    _load(path)


def test_links_are_followed_but_not_round_in_circles(tmp_path):
  files = fixtures.numbered_files({"real": 5, "set/b": 5})
  fixtures.write_folder(tmp_path, files)
  (tmp_path / "set" / "a").symlink_to(tmp_path / "real")
  (tmp_path / "set" / "b" / "loop").symlink_to(tmp_path / "set")
  data = _load(tmp_path / "set")
  assert data.class_names == ("a", "b")
  assert sum(len(data.splits[n]) for n in ("train", "val", "test")) == 10


def test_images_of_all_sizes_get_the_presets_size(tmp_path):
  content = {
    f"{label}/{i}.png": png(np.full((5 + 9 * i, 30 - 4 * i, 3), 90, np.uint8))
    for label in "ab"
    for i in range(4)
  }
  root = fixtures.write_folder(tmp_path, content)
  for preset, size in {"vtab": 14, "insvp_release": 16}.items():
    images = splits.to_memory(_load(root, 14, preset=preset).splits["train"]).images
    assert images.shape[1:] == (size, size, 3) and (images == 90).all()


def test_the_cache_follows_the_files(tmp_path):
  content = fixtures.numbered_files(_FLAT)
  root = fixtures.write_folder(tmp_path / "f", content)
  cache_dir = tmp_path / "cache"

  def load(**changes):
    return _load(root, cache_dir=str(cache_dir), **changes)

  first = load()
  assert len(list(cache_dir.iterdir())) == 1
  # A file of equal size and time is not looked at again: the cache was used.
  target = root / "ant" / "000.png"
  status = target.stat()
  target.write_bytes(bytes(status.st_size))
  os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
  _assert_equal(load(), first)
  # The split is drawn anew from the same images, without decoding them again.
  assert len(load(test_fraction=0.5).splits["test"]) > len(first.splits["test"])
  assert len(list(cache_dir.iterdir())) == 1
  os.utime(target)
  with pytest.raises(ValueError, match="ant/000.png"):
    load()
  target.write_bytes(content["ant/000.png"])
  target.with_name("new.png").write_bytes(png(pixels(40)))
  assert 40 in sum((_numbers(split) for split in load().splits.values()), [])
  # Another preset resizes differently, so it has its own file.
  before = len(list(cache_dir.iterdir()))
  load(preset="modern")
  assert len(list(cache_dir.iterdir())) == before + 1


def test_a_cached_archive_is_found_again_under_another_name(tmp_path):
  path = fixtures.write_zip(tmp_path / "a.zip", fixtures.numbered_files(_SPLIT))
  cache_dir = tmp_path / "cache"
  first = _load(path, cache_dir=str(cache_dir))
  path = path.rename(tmp_path / "b.zip")
  second = _load(path, cache_dir=str(cache_dir))
  assert len(list(cache_dir.iterdir())) == 1
  assert second.name == "b" and str(path) in second.source
  _assert_equal(first, second)


def _count_decodes(monkeypatch):
  """Returns a list that grows by the name of each file that is decoded."""
  decoded, original = [], decode.decoded

  def counted(data, name, *options):
    decoded.append(name)
    return original(data, name, *options)

  monkeypatch.setattr(decode, "decoded", counted)
  return decoded


def _streamed(data):
  return {n for n, split in data.splits.items() if isinstance(split, StreamSplit)}


@pytest.mark.parametrize("counts", [_SPLIT, _FLAT])
@pytest.mark.parametrize("archive", [False, True])
def test_large_sets_are_streamed_and_otherwise_the_same(tmp_path, counts, archive):
  content = fixtures.numbered_files(counts)
  write = fixtures.write_zip if archive else fixtures.write_folder
  root = write(tmp_path / ("x.zip" if archive else "x"), content)
  small, large = _load(root), _load(root, resident_mb=0)
  assert not _streamed(small) and _streamed(large) == set(small.splits)
  assert "(streamed)" in large.summary()
  taken = {name: splits.to_memory(split) for name, split in large.splits.items()}
  _assert_equal(small, dataclasses.replace(large, splits=taken))


def test_large_sets_are_split_without_decoding(tmp_path, monkeypatch):
  root = fixtures.write_folder(tmp_path, fixtures.numbered_files(_FLAT))
  decoded = _count_decodes(monkeypatch)
  data = [_load(root, resident_mb=0, split_seed=seed) for seed in (0, 1)]
  assert not decoded
  val, other = (_numbers(splits.to_memory(d.splits["val"])) for d in data)
  assert len(val) == len(other) == 4 and val != other


@pytest.mark.parametrize("skip_corrupt", [False, True])
@pytest.mark.parametrize("preset", ["vtab", "insvp_release"])
def test_small_sets_are_decoded_once(tmp_path, monkeypatch, skip_corrupt, preset):
  content = fixtures.numbered_files({"train/a": 9, "train/b": 9, "test/a": 3})
  root = fixtures.write_folder(tmp_path / "x", content)
  decoded = _count_decodes(monkeypatch)
  changes = {"skip_corrupt": skip_corrupt, "preset": preset}
  changes["cache_dir"] = str(tmp_path / "cache")
  first = _load(root, **changes)
  assert sorted(decoded) == sorted(f"{root}/{name}" for name in content)
  _assert_equal(_load(root, **changes), first)
  # Nor are other parts of the same images decoded anew.
  assert len(_load(root, val_fraction=0.5, **changes).splits["val"]) == 10
  assert len(decoded) == len(content)


def test_large_sets_are_checked_once_where_corrupt_images_are_skipped(
  tmp_path, monkeypatch
):
  content = fixtures.numbered_files({"train/a": 20, "train/b": 20, "test/a": 3})
  content["train/a/017.png"] = b""
  content["test/a/001.png"] = b"no image"
  root = fixtures.write_folder(tmp_path / "x", content)
  decoded = _count_decodes(monkeypatch)
  changes = {"resident_mb": 0, "skip_corrupt": True}
  changes["cache_dir"] = str(tmp_path / "cache")
  data = _load(root, **changes)
  assert len(decoded) == len(content)
  assert data.skipped == 2
  _load(root, **changes)
  assert len(decoded) == len(content)
  whole = _load(root, resident_mb=0, skip_corrupt=True, val_fraction=0.0)
  train, test = (splits.to_memory(whole.splits[name]) for name in ("train", "test"))
  assert _numbers(train) == [i for i in range(40) if i != 17]
  assert train.labels.tolist() == [0] * 19 + [1] * 20
  assert _numbers(test) == [40, 42]
  # Another limit finds its own in the cache.
  changes["cache_dir"] = str(tmp_path / "other cache")
  assert not _streamed(_load(root, **{**changes, "resident_mb": 9}))
  assert _streamed(_load(root, **changes)) == set(data.splits)
  for name in ("000", "002"):
    (root / f"test/a/{name}.png").write_bytes(b"junk")
  with pytest.raises(ValueError, match="class 'a' of test .* no readable images"):
    _load(root, **changes)


def test_a_corrupt_image_of_a_large_set_is_named_when_it_is_met(tmp_path):
  content = {**fixtures.numbered_files({"a": 4, "b": 4}), "b/002.png": b""}
  root = fixtures.write_folder(tmp_path, content)
  data = _load(root, resident_mb=0, val_fraction=0.0, test_fraction=0.0)
  with pytest.raises(ValueError, match="b/002.png is empty.*skip_corrupt=True"):
    splits.to_memory(data.splits["train"])


@pytest.mark.parametrize("skip_corrupt", [False, True])
def test_elongated_training_images_stay_in_their_files(tmp_path, skip_corrupt):
  wide = np.tile(np.arange(60, dtype=np.uint8)[:, None], (40, 1, 3))
  content = {f"{c}/{i:02d}.png": png(wide) for c in "ab" for i in range(10)}
  if skip_corrupt:
    content["a/03.png"] = b""
  root = fixtures.write_folder(tmp_path, content)
  data = _load(root, 28, preset="insvp_release", skip_corrupt=skip_corrupt)
  assert data.skipped == skip_corrupt
  assert _streamed(data) == {"train", "train_val"}
  split = data.splits["train"]
  ((image,),) = split.read([np.array([0])], whole=True)
  assert image.shape == (32, 48, 3)
  everything = splits.to_memory(data.splits["train_val"])
  assert len(everything) == len(split) + len(data.splits["val"])
  assert not _streamed(_load(root, 28, preset="vpt", skip_corrupt=skip_corrupt))


def test_one_large_split_does_not_move_the_others(tmp_path):
  # 341 squares of 32 pixels are a little below 1 MiB.
  content = fixtures.numbered_files({"train/a": 171, "train/b": 171, "test/a": 1})
  data = _load(fixtures.write_folder(tmp_path, content), 32, resident_mb=1)
  assert len(data.splits["val"]) == 34 and len(data.splits["train"]) == 308
  assert _streamed(data) == {"train_val"}
  data = _load(tmp_path, 32, resident_mb=1, val_fraction=0.0)
  assert _streamed(data) == {"train", "train_val"}
  assert data.splits["train_val"] is data.splits["train"]


def test_real_images(shared_dir, tmp_path):
  # Every 20th photograph, to be quick.
  with zipfile.ZipFile(shared_dir / "data" / "trashnet.zip") as archive:
    names = [name for name in archive.namelist() if not name.endswith("/")]
    content = {name: archive.read(name) for name in names[::20]}
  data = _load(fixtures.write_zip(tmp_path / "t.zip", content), 32)
  assert data.num_classes == 6
  for split in ("train", "val", "test"):
    wanted = sum(f"/{split}/" in name for name in content)
    assert len(data.splits[split]) == wanted
  assert data.splits["test"].images[..., 0].std() > 20

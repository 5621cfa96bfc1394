"""Which folders are splits, classes, runs, or nothing of the data set."""

import data_fixtures as fixtures
from data_fixtures import data_config
import pytest

from insvp_jax.data import load_data
from insvp_jax.data.sources import split_names


def _write(root, *folders, count=10):
  """Writes so many images, all different, into each folder."""
  return fixtures.write_folder(
    root, fixtures.numbered_files({name: count for name in folders})
  )


def _load(root, **changes):
  return load_data("folder", data_config(root=str(root), **changes), 8)


def _sizes(data):
  return {name: len(data.splits[name]) for name in ("train", "val", "test")}


_BOTH = ("cats", "dogs")


def _in(*around):
  return [f"{folder}/{name}" for folder in around for name in _BOTH]


@pytest.mark.parametrize(
  "train,val,test",
  [
    ("training_set", None, "test_set"),
    ("training_set/training_set", None, "test_set/test_set"),
    ("seg_train/seg_train", None, "seg_test/seg_test"),
    ("Train", "Valid", "Test"),
    ("TRAIN", "DEV", "TEST"),
    ("train2017", "val2017", "test2017"),
    ("images_train", "images_val", "images_test"),
    ("trainset", "valset", "testset"),
    ("TrainImages", "ValidationImages", "TestImages"),
    ("pets_train", "pets_val", "pets_test"),
    ("tr", "va", "te"),
    ("train", "dev", "holdout"),
    ("train", "val", "eval"),
    ("train", "eval", "test"),
    ("trainval", None, "hold-out"),
    ("train_64x64", "val_64x64", "test_64x64"),
    ("chest_xray_train", "validation", "test data"),
    ("train/train", "val/val", "test/test"),
    ("train/images", "val/images", "test/images"),
  ],
)
@pytest.mark.parametrize("wrap", ["", "a set/"])
def test_splits_by_the_names_that_data_sets_have(tmp_path, train, val, test, wrap):
  for folder, count in ((train, 10), (val, 3), (test, 2)):
    if folder:
      _write(tmp_path, *_in(f"{wrap}{folder}"), count=count)
  data = _load(tmp_path)
  assert data.class_names == _BOTH
  expected = {"train": 20, "val": 6} if val else {"train": 18, "val": 2}
  assert _sizes(data) == {**expected, "test": 4}


@pytest.mark.parametrize(
  "name,split,rest",
  [
    ("seg_train", "train", ("seg",)),
    ("Training Images", "train", ()),
    ("val2017", "val", ()),
    ("testset", "test", ()),
    ("train_val", "train", ()),
    ("unlabeled", "unlabelled", ()),
    ("seg_pred", "unlabelled", ("seg",)),
    ("test_tube", "test", ("tube",)),
  ],
)
def test_what_a_name_says(name, split, rest):
  parsed = split_names.parse(name)
  assert (parsed.split, parsed.rest) == (split, rest)


@pytest.mark.parametrize(
  "name", ["cat", "contest", "trains", "latest", "tree", "train_test", "", "2017", "犬"]
)
def test_names_that_speak_of_no_split(name):
  assert split_names.parse(name) is None


@pytest.mark.parametrize(
  "names",
  [
    ("test", "control"),
    ("train", "bus"),
    ("train", "test", "val", "bus"),
    ("test_tube", "train_station"),
    ("bullet_train", "freight_train"),
    ("tr", "de", "en"),
    ("valid", "invalid"),
    ("predict", "cat"),
  ],
)
@pytest.mark.parametrize("around", ["", "set/", "train/"])
def test_classes_may_be_called_like_splits(tmp_path, names, around):
  data = _load(_write(tmp_path, *(f"{around}{name}" for name in names)))
  assert data.class_names == tuple(sorted(names))


@pytest.mark.parametrize(
  "folders,message",
  [
    (("train", "test"), "no class folders in .*test.* are read as splits"),
    (("train", "test", "pred"), "no class folders"),
    (("dogs_train", "dogs_test", "cats"), "dogs_test, dogs_train are read as splits"),
    (_in("A", "B"), "A, B of .* would be the classes, .* sub-folders: cats, dogs"),
    ((*_in("A", "B"), "rest"), "hold the same sub-folders"),
    (("cat/train", "cat/test", "dog/train", "dog/test"), "sub-folders: test, train"),
    (("a", "b", "set/a", "set/b"), "holds a, b, and so does set in it, .* a class"),
    (_in("train/1", "train/2"), "1, 2 of .*train would be the classes"),
    (_in("test", "val"), "test, val but no train folder"),
    (_in("dev", "eval"), "dev, eval but no train folder"),
    ((*_in("train"), "test"), "no class folders in .*test.* no labels"),
    ((*_in("seg_train"), "seg_test"), "no class folders in .*seg_test"),
    (_in("train2014", "train2017", "val"), "which both mean train: keep one"),
    (_in("train", "val", "eval", "test"), "which both mean val: keep one"),
    ((*_in("train"), "bus", "car"), "directly in bus, car beside it"),
  ],
)
def test_what_is_no_set_of_classes_is_refused(tmp_path, folders, message):
  with pytest.raises(ValueError, match=message) as caught:
    _load(_write(tmp_path, *folders, count=2))
  assert "\n" not in str(caught.value)


def test_one_sub_folder_of_the_same_name_is_no_doubt(tmp_path):
  data = _load(_write(tmp_path, "cat/images", "dog/images", "cow/images"))
  assert data.class_names == ("cat", "cow", "dog")


def test_a_set_that_is_called_train(tmp_path):
  folders = _in("train/train", "train/val", "train/test")
  assert _sizes(_load(_write(tmp_path, *folders))) == dict.fromkeys(
    ("train", "val", "test"), 20
  )


def test_annotations_beside_the_images_are_no_class(tmp_path):
  _write(tmp_path, *_in("images/train", "images/test"))
  notes = {
    f"labels/{split}/{i}.txt": b"0 1" for split in ("train", "test") for i in "ab"
  }
  data = _load(fixtures.write_folder(tmp_path, notes))
  assert data.class_names == _BOTH and len(data.splits["test"]) == 20


def test_what_lies_beside_splits_is_named_in_the_one_line(tmp_path, caplog):
  _write(
    tmp_path, *_in("seg_train", "seg_test"), "seg_pred", "seg_train", "unlabeled/x"
  )
  _load(tmp_path)
  (line,) = [r.message for r in caplog.records if "left out" in r.message]
  assert "2 beside the splits (seg_pred/, unlabeled/)" in line
  assert "10 in no class folder (seg_train/000.png, " in line and ", ...)" in line
  assert "read seg_train/ as train, seg_test/ as test" in caplog.text


def test_a_clean_set_makes_no_lines(tmp_path, caplog):
  _load(_write(tmp_path, *_in("train", "val", "test")))
  assert not caplog.records


def _run(root, *files):
  return fixtures.write_folder(root, {name: b"{}" for name in files})


@pytest.mark.parametrize(
  "files",
  [
    ("metrics.jsonl",),
    ("config.json", "result.json"),
    ("config.json", "parameters.txt"),
    ("checkpoints/100/meta/metadata", "checkpoints/100/checksums.json"),
  ],
)
@pytest.mark.parametrize("around", ["", "train/", "set/"])
@pytest.mark.parametrize("inner", ["", "folder/insvp/seed0/"])
def test_runs_and_their_pictures_are_no_class(tmp_path, files, around, inner, caplog):
  _write(tmp_path, *(f"{around}{name}" for name in _BOTH))
  _write(tmp_path, "runs/prompts" if not inner else "runs", count=3)
  _run(tmp_path / "runs" / inner, *files)
  (tmp_path / "runs").rename(tmp_path / around / "runs")
  data = _load(tmp_path)
  assert data.class_names == _BOTH and len(data.splits["train_val"]) == 16
  assert f"1 of a run ({around}runs/)" in caplog.text


def test_a_class_that_a_workdir_lies_in_stays_one(tmp_path):
  _run(_write(tmp_path, *_BOTH) / "cats" / "run", "metrics.jsonl", "config.json")
  _write(tmp_path, "cats/run/figures", count=3)
  data = _load(tmp_path, val_fraction=0.0, test_fraction=0.0)
  assert data.class_names == _BOTH and len(data.splits["train"]) == 20


def test_a_root_that_is_a_run_of_itself(tmp_path):
  _run(_write(tmp_path, *_BOTH), "metrics.jsonl", "checkpoints/7/meta/metadata")
  assert _load(tmp_path).class_names == _BOTH


def test_a_class_may_be_called_checkpoints(tmp_path):
  data = _load(_write(tmp_path, "checkpoints/0", "checkpoints/1", "other"))
  assert data.class_names == ("checkpoints", "other")


def test_class_names_that_differ_in_case_or_spaces_alone_are_one_warning(
  tmp_path, caplog
):
  names = ("Cat", "cat", "big dog", "big\u00a0dog", "bigdog\u200b", "cow")
  data = _load(_write(tmp_path, *names))
  assert data.class_names == tuple(sorted(names))
  (record,) = caplog.records
  assert "'Cat' and 'cat'" in record.message and "cow" not in record.message
  assert "'big dog' and 'bigdog\\u200b' and 'big\\xa0dog'" in record.message


def test_the_summary_has_the_images_of_each_class(tmp_path):
  data = _load(_write(tmp_path, *_in("train", "test")), val_fraction=0.2)
  line = data.summary().splitlines()[1]
  assert line == "images of each class (train/val/test): cats 8/2/10, dogs 8/2/10"

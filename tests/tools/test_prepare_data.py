"""The tool that downloads and prepares data sets, and says what each takes.

Nothing is downloaded here: TFDS finds what it would have downloaded, or fails as it
does without a network.
"""

import dataclasses
import importlib.util
import inspect
import json
from pathlib import Path
import re
import subprocess
import sys

from data_fixtures import write_folder
import numpy as np
import pytest
import requests

from insvp_jax.data import availability, downloads, original_rows
from insvp_jax.data.sources import tfds_builder
from insvp_jax.data.tasks import TASKS, Subset
from insvp_jax.tools import prepare_data

tfds = pytest.importorskip("tensorflow_datasets")


@pytest.fixture
def small(monkeypatch):
  """cifar100 with splits that small fixtures can hold."""
  task = dataclasses.replace(
    TASKS["cifar100"], train="train[:80]", val="train[90:95]", num_test=12
  )
  monkeypatch.setitem(TASKS, "cifar100", task)


def prepare_cifar100(root, number):
  """Writes what TFDS would prepare as cifar100, with images that do not decode.

  The i-th of the training images, and of the 12 test images, is of class i % 100.
  """
  tf = pytest.importorskip("tensorflow")
  builder = tfds_builder.import_tfds().builder("cifar100", data_dir=str(root))
  Path(builder.data_dir).mkdir(parents=True)
  infos = []
  for split, size in {"train": number, "test": 12}.items():
    template = tfds.core.ShardedFileTemplate(
      data_dir=builder.data_path,
      dataset_name=builder.name,
      split=split,
      filetype_suffix="tfrecord",
    )
    path = template.sharded_filepath(shard_index=0, num_shards=1)
    with tf.io.TFRecordWriter(str(path)) as writer:
      for i in range(size):
        writer.write(_example(tf, f"{split}_{i:05d}".encode(), i % 100))
    infos.append(
      tfds.core.SplitInfo(
        name=split, shard_lengths=[size], num_bytes=1, filename_template=template
      )
    )
  # The names come with the download: here they are ours.
  builder.info.features["label"].names = [f"thing {i:02d}" for i in range(100)]
  builder.info.set_splits(tfds.core.splits.SplitDict(infos))
  builder.info.write_to_directory(builder.data_path)
  return root


def _example(tf, name, label):
  def of_bytes(value):
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

  def of_int(value):
    return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))

  features = {"id": of_bytes(name), "image": of_bytes(b"no image")}
  features |= {"label": of_int(label), "coarse_label": of_int(0)}
  example = tf.train.Example(features=tf.train.Features(feature=features))
  return example.SerializeToString()


@pytest.fixture
def no_download(monkeypatch):
  """Makes any attempt to prepare a data set fail as without a network."""
  tried = []

  def fail(builder, **kwargs):
    tried.append(builder.info.full_name)
    raise requests.exceptions.ConnectionError("Failed to resolve 'some.host'\nmore")

  monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
  return tried


def run(capsys, *arguments):
  """Returns the exit status and the printed lines."""
  status = prepare_data.main([str(argument) for argument in arguments])
  captured = capsys.readouterr()
  assert captured.err == ""
  return status, captured.out.splitlines()


def state_of(name, **places):
  return availability.check_task(TASKS[name], availability.Locations(**places))


# --list


def test_list_and_list_indices_run_without_tensorflow(root, tmp_path):
  # Whoever imports these ends.
  for name in ("tensorflow", "tensorflow_datasets"):
    (tmp_path / f"{name}.py").write_text("raise SystemExit('imported TensorFlow')")
  code = "import sys; from insvp_jax.tools import prepare_data as tool; "
  code += "tool.main(['--list']); "
  code += "tool.main(['--list-indices', '--task=cifar100', '--split=val'])"
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=root,
    env={"PYTHONPATH": f"{tmp_path}:{root}", "PATH": "", "HOME": str(tmp_path)},
    capture_output=True,
    text=True,
  )
  assert (done.returncode, done.stderr) == (0, "")
  lines = done.stdout.splitlines()
  assert [line.split()[0] for line in lines[2 : 2 + len(TASKS)]] == list(TASKS)
  assert lines[-1].startswith("cifar100 val, 200 rows of train: 13431 9237 17462 ")


def test_list_shows_what_a_task_is_and_what_it_takes(capsys):
  status, lines = run(capsys, "--list", "--task", "cifar100", "resisc45", "hta_nabirds")
  assert status == 0
  cells = [re.split(r"\s{2,}", line.strip()) for line in lines]
  assert cells[0] == [
    *("task", "group", "classes", "train", "val", "test"),
    *("read from", "by hand"),
  ]
  cifar = ["cifar100", "natural", "100", "800", "200", "10000", "TFDS, folder"]
  assert cells[2] == cifar
  assert cells[3][-2:] == ["TFDS, folder", "a"]
  birds = ["hta_nabirds", "hta", "555", "21536", "2393", "24633", "folder", "b"]
  assert cells[4] == birds
  assert "  a: NWPU-RESISC45.rar" in lines
  assert "  b: the images and VPT's lists" in lines
  assert "  official: cifar100, resisc45" in lines
  assert "  official, insvp_release: hta_nabirds" in lines


@pytest.mark.parametrize("names", [["all"], *([name] for name in TASKS)])
def test_list_fits_100_columns_and_leaves_nothing_out(names, capsys):
  _, lines = run(capsys, "--list", "--task", *names)
  assert max(map(len, lines)) <= 100
  text = " ".join(" ".join(lines).split())
  tasks = prepare_data.select_tasks(names)
  for task in tasks:
    assert task.name in text and downloads.fetched_by_hand(task) in text
    assert all(subset in text for subset in task.subsets)
  if len(tasks) == 1:
    (task,) = tasks
    assert task.spec in text
    for subset in task.subsets.values():
      assert f"{subset.train} train, {subset.val} val, {task.num_test} test" in text
    if task.folder_format:
      assert downloads.folder_content(task) in text
    if manual := downloads.requirements(task).manual:
      assert manual.where in text
  else:
    # Whole groups go by their names; what is no row of the table is named, too.
    assert "official: natural, specialized, structured, cifar100_lt" in text
    assert "other tasks: folder, segment_folder, digits, cifar10_npz" in text


def test_names_groups_and_all_stand_for_each_task_once():
  def names(*chosen):
    return [task.name for task in prepare_data.select_tasks(chosen)]

  assert names("all") == list(TASKS)
  assert names("dmlab,vtab", "specialized") == [
    "dmlab",
    *(n for n, t in TASKS.items() if t.benchmark == "vtab" and n != "dmlab"),
  ]


# --list-indices

# First four rows and sum of train800 and of val200, from the published lists.
_ROWS = {
  "cifar100": (
    ("train", [16399, 1680, 47917, 17307], 20135529),
    ("train", [13431, 9237, 17462, 32685], 5048484),
  ),
  "svhn": (
    ("train", [16399, 1680, 47917, 17307], 30231982),
    ("train", [21145, 64736, 23870, 1919], 6945712),
  ),
  "dsprites_location dsprites_orientation": (
    ("train", [16399, 634903, 206287, 470425], 295636588),
    ("train", [220697, 85843, 84902, 106270], 68639137),
  ),
  "smallnorb_azimuth smallnorb_elevation": (
    ("train", [16399, 1680, 17307, 1456], 9846660),
    ("test", [23018, 16932, 19084, 9933], 2456687),
  ),
  "patch_camelyon": (
    ("train", [251464, 132287, 133786, 86259], 104253048),
    ("validation", [3270, 10310, 20603, 11608], 3417930),
  ),
  "clevr_count clevr_distance": (
    ("train", [43876, 33421, 62025, 21419], 28805322),
    ("train", [35084, 29360, 4525, 24831], 7108492),
  ),
}


@pytest.mark.parametrize("tasks", _ROWS)
def test_the_rows_of_vtab_are_the_published_ones(tasks, capsys):
  names = tasks.split()
  status, lines = run(capsys, "--list-indices", "--task", *names)
  assert status == 0
  assert len(lines) == 2 * len(names)
  for i, line in enumerate(lines):
    source, first, total = _ROWS[tasks][i % 2]
    number, split = (800, "train") if i % 2 == 0 else (200, "val")
    head, _, text = line.partition(": ")
    assert head == f"{names[i // 2]} {split}, {number} rows of {source}"
    rows = [int(row) for row in text.split()]
    assert (len(set(rows)), rows[:4], sum(rows)) == (number, first, total)


def test_test_rows_are_apart_from_val_and_as_many_as_published():
  for name, known in {"smallnorb_azimuth": 12150, "clevr_count": 15000}.items():
    source, rows = original_rows.rows_of_split(TASKS[name], "test")
    assert len(set(rows)) == len(rows) == known == TASKS[name].num_test
    val_source, val = original_rows.rows_of_split(TASKS[name], "val")
    assert val_source != source or not set(rows) & set(val)


def test_rows_in_the_order_of_the_files(capsys):
  arguments = ["--task=hta_cifar10", "--subset=insvp_release", "--list-indices"]
  _, (train, val) = run(capsys, *arguments)
  assert [int(n) for n in train.split(": ")[1].split()] == list(range(40_000))
  assert [int(n) for n in val.split(": ")[1].split()] == list(range(40_000, 50_000))
  _, (test,) = run(capsys, "--task=hta_cifar10", "--list-indices", "--split=test")
  assert sorted(int(n) for n in test.split(": ")[1].split()) == list(range(10_000))


def test_rows_that_no_rule_tells_are_an_error():
  with pytest.raises(ValueError, match="dtd by names of files.*known for cifar100, "):
    original_rows.rows_of_split(TASKS["dtd"], "train")
  with pytest.raises(ValueError, match="by the images' labels.*--subset=insvp_release"):
    original_rows.rows_of_split(TASKS["hta_svhn"], "val")
  with pytest.raises(ValueError, match="--split test.$"):
    original_rows.rows_of_split(TASKS["cifar100_lt10"], "train")


# Ready


def test_a_ready_task_is_counted_without_decoding(
  small, no_download, tmp_path, capsys, caplog
):
  prepare_cifar100(tmp_path, 100)
  status, lines = run(capsys, "--task=cifar100", f"--data_dir={tmp_path}")
  assert status == 0 and not no_download
  assert "published" not in caplog.text  # said once, below
  assert lines[0].startswith("cifar100: ready: tfds cifar100/3.0.2 (tensorflow-")
  assert lines[0].endswith(f" in {tmp_path}/cifar100/3.0.2")
  spread = "of 100 classes, smallest 1, median 1, largest 1"
  assert lines[1:5] == [
    f"  train: 80 images of 80 {spread}",
    f"  val: 5 images of 5 {spread}",
    f"  train_val: 85 images of 85 {spread}",
    f"  test: 12 images of 12 {spread}",
  ]
  assert lines[5:] == [
    "  warning: cifar100: the train split has 80 images, published are 800",
    "  warning: cifar100: the val split has 5 images, published are 200",
    "  warning: train_val has no image of 15 of 100 classes: thing 80, thing 81, "
    "thing 82, thing 83, thing 84, ...",
    "  warning: test has no image of 88 of 100 classes: thing 12, thing 13, thing 14, "
    "thing 15, thing 16, ...",
    "tasks: 1 ready",
  ]


def test_classes_are_counted_each(small, monkeypatch, tmp_path):
  # The first ten classes come a second time.
  task = dataclasses.replace(TASKS["cifar100"], train="train[:110]", val="train[:3]")
  monkeypatch.setitem(TASKS, "cifar100", task)
  data = state_of("cifar100", data_dir=str(prepare_cifar100(tmp_path, 120))).data
  counts = availability.class_counts(data, "train")
  assert counts.tolist() == [2] * 10 + [1] * 90
  assert list(prepare_data.split_lines(data))[0] == (
    "train: 110 images of 100 of 100 classes, smallest 1, median 1, largest 2"
  )


# Downloadable


def test_check_downloads_nothing_and_says_what_it_would_take(
  no_download, tmp_path, capsys
):
  folder = tmp_path / "tfds"
  arguments = ["--check", f"--data_dir={folder}"]
  status, lines = run(capsys, "--task", "cifar100", "caltech101", *arguments)
  assert status == 1 and not no_download and not folder.exists()
  assert lines == [
    "cifar100: downloadable: TFDS downloads up to 0.17 GB and makes cifar100/3.0.2 in "
    f"{folder}",
    "caltech101: downloadable: TFDS downloads up to 0.27 GB and makes "
    f"caltech101/3.0.2 in {folder}",
    f"  note: {downloads.REQUIREMENTS['caltech101'].note}",
    "tasks: 2 downloadable",
  ]


@pytest.fixture
def downloaded(monkeypatch, tmp_path):
  """Lets TFDS prepare a small CIFAR-100 in the form of the original files.

  The i-th image is of class i % 100.
  """
  folder = tmp_path / "downloaded" / "cifar-100-binary"
  content = {
    "fine_label_names.txt": "\n".join(f"thing {i:02d}" for i in range(100)).encode(),
    "coarse_label_names.txt": "\n".join(f"kind {i:02d}" for i in range(20)).encode(),
  }
  for name, number in {"train.bin": 300, "test.bin": 12}.items():
    rows = np.zeros((number, 2 + 3 * 32 * 32), np.uint8)
    rows[:, 1] = np.arange(number) % 100
    content[name] = rows.tobytes()
  write_folder(folder, content)
  asked = []

  def find(manager, url):
    asked.append((url, manager.manual_dir if manager._manual_dir_instructions else ""))
    return str(folder.parent)

  manager = tfds.download.DownloadManager
  monkeypatch.setattr(manager, "download_and_extract", find)
  monkeypatch.setattr(manager, "downloaded_size", 1)
  return asked


def test_what_is_downloadable_is_prepared_once_for_all_its_tasks(
  small, downloaded, monkeypatch, tmp_path, capsys
):
  other = dataclasses.replace(TASKS["cifar100"], name="other", train="train[80:300]")
  monkeypatch.setitem(TASKS, "other", other)
  folder = tmp_path / "tfds"
  arguments = ["--task", "cifar100", "other", f"--data_dir={folder}"]
  status = prepare_data.main(arguments)
  lines = capsys.readouterr().out.splitlines()
  assert status == 0
  assert [url for url, _ in downloaded] == [
    "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
  ]
  heads = [line for line in lines if re.match(r"\w+: (preparing|ready)", line)]
  assert [head.split(": ")[:2] for head in heads] == [
    ["cifar100", "preparing"],
    ["cifar100", "ready"],
    ["other", "ready"],
  ]
  assert lines[-1] == "tasks: 2 ready"
  # TFDS itself orders rows by the rule that --list-indices goes by.
  rows = np.array(original_rows.tfds_order("train", range(300)))
  counts = np.bincount(rows[80:] % 100)
  assert (
    f"  train: 220 images of {(counts > 0).sum()} of 100 classes, smallest 1, median "
    f"{np.median(counts[counts > 0]):g}, largest {counts.max()}"
  ) in lines
  data = state_of("cifar100", data_dir=str(folder)).data
  np.testing.assert_array_equal(data.splits["train"].labels, rows[:80] % 100)
  np.testing.assert_array_equal(data.splits["val"].labels, rows[90:95] % 100)
  # What is there stays as it is.
  assert prepare_data.main(arguments) == 0
  assert len(downloaded) == 1


def test_after_a_failed_download_the_others_go_on(small, no_download, tmp_path, capsys):
  prepare_cifar100(tmp_path, 100)
  names = ["clevr_count", "clevr_distance", "cifar100"]
  status, lines = run(capsys, "--task", *names, f"--data_dir={tmp_path}")
  assert status == 1
  assert no_download == ["clevr/3.1.0"]
  failed = (
    "failed: ConnectionError: Failed to resolve 'some.host'. TFDS also takes "
    f"CLEVR_v1.0.zip from {tmp_path}/downloads/manual, if laid there."
  )
  assert lines[0].startswith("clevr_count: preparing: TFDS downloads up to 19.02 GB")
  assert lines[1:3] == [f"clevr_count: {failed}", f"clevr_distance: {failed}"]
  assert lines[3].startswith("cifar100: ready: ")
  assert lines[-1] == "tasks: 2 failed, 1 ready"


def test_a_missing_package_is_named_before_anything_is_downloaded(
  no_download, monkeypatch, tmp_path, capsys
):
  find_spec, absent = importlib.util.find_spec, {"cv2"}
  monkeypatch.setattr(
    importlib.util,
    "find_spec",
    lambda name: None if name in absent else find_spec(name),
  )
  arguments = ["--task=sun397", f"--data_dir={tmp_path}"]
  status, lines = run(capsys, *arguments, "--check")
  assert status == 1
  assert lines[0].endswith("it needs cv2, not here: pip install opencv-python-headless")
  status, lines = run(capsys, *arguments)
  assert status == 1 and not no_download
  assert lines[1] == (
    "sun397: failed: not begun, because packages are missing: pip install "
    "opencv-python-headless"
  )
  absent.clear()
  monkeypatch.setitem(
    downloads.REQUIREMENTS, "sun397", downloads.Requirements(("scipy",))
  )
  text = state_of("sun397", data_dir=str(tmp_path)).text
  assert text.endswith("it needs scipy, installed here")


@pytest.mark.parametrize("missing", ["tensorflow", "tensorflow_datasets"])
def test_without_tfds_its_tasks_are_unavailable_and_folders_are_read(
  three_birds, missing, monkeypatch, tmp_path, capsys
):
  monkeypatch.setitem(sys.modules, missing, None)
  root = _lists_folder(tmp_path, {"train": 7, "val": 2, "test": 4})
  names = ["hta_svhn", "fgvc_cub", "cifar100"]
  status, lines = run(capsys, "--task", *names, f"--root={root}")
  assert status == 1
  needs = "needs TensorFlow Datasets: pip install 'insvp_jax[tfds]'"
  assert lines[0] == f"hta_svhn: unavailable: hta_svhn {needs}"
  assert lines[1] == f"fgvc_cub: ready: images of {root}"
  assert "Or leave --root out: unavailable: cifar100 needs TensorFlow Da" in lines[-2]
  state = state_of("svhn", data_dir=str(tmp_path))
  assert state.text == f"svhn {needs}; or name its files by --root"
  assert original_rows.rows_of_split(TASKS["svhn"], "val")[0] == "train"


def test_a_version_that_no_task_reads_is_named(small, tmp_path):
  folder = prepare_cifar100(tmp_path, 100) / "cifar100"
  (folder / "3.0.2").rename(folder / "1.0.0")
  state = state_of("cifar100", data_dir=str(tmp_path))
  assert state.status == "downloadable"
  assert state.notes == (f"prepared before: only 1.0.0 in {folder}",)


def test_food101_is_prepared_with_the_ids_that_its_subsets_need(tmp_path):
  state = state_of("hta_food101", data_dir=str(tmp_path))
  assert "makes food101/2.1.0" in state.text
  builder = tfds.builder(downloads.prepared_spec(state.task), data_dir=str(tmp_path))
  assert state.task.id_feature in builder.info.features


# By hand


def test_files_that_a_person_has_to_fetch(no_download, tmp_path, capsys):
  places = [f"--data_dir={tmp_path}"]
  status, lines = run(capsys, "--task=resisc45", *places)
  assert status == 1 and not no_download
  assert lines[0] == (
    "resisc45: manual: resisc45/3.0.0 is made of NWPU-RESISC45.rar from "
    "https://1drv.ms/u/s!AmgKYzARBl5ca3HNaHIlzp_IXjs, extracted to "
    f"{tmp_path}/downloads/manual/NWPU-RESISC45/<class>/*.jpg"
  )
  by_hand = write_folder(tmp_path / "mine", {"NWPU-RESISC45/lake/1.jpg": b""})
  status, lines = run(capsys, "--task=resisc45", *places, f"--manual_dir={by_hand}")
  assert no_download == ["resisc45/3.0.0"]
  assert lines[0].endswith(
    f"makes resisc45/3.0.0 in {tmp_path} of the files in {by_hand}"
  )
  assert lines[1].startswith("resisc45: failed: ConnectionError")


def test_every_file_that_a_person_has_to_fetch_is_looked_for(tmp_path):
  places = {"data_dir": str(tmp_path), "manual_dir": str(tmp_path / "mine")}
  names = ["train/1.jpeg", "test/1.jpeg", "sample/1.jpeg", "trainLabels.csv"]
  for name in names:
    state = state_of("diabetic_retinopathy", **places)
    assert state.status == "manual" and "kaggle.com" in state.text
    write_folder(tmp_path / "mine", {name: b""})
  assert state_of("diabetic_retinopathy", **places).status == "downloadable"


def test_a_set_whose_hosts_are_gone_is_made_of_files_from_elsewhere(tmp_path):
  places = {"data_dir": str(tmp_path), "subset": "drawn"}
  state = state_of("fgvc_stanford_cars", **places)
  assert state.status == "unavailable"
  assert "hosts" in state.text and "cars_train.tgz" in state.text
  assert "give --root with stanford-cars/" in state.text
  files = downloads.REQUIREMENTS["cars196"].manual.needs
  write_folder(tmp_path / "downloads" / "manual", dict.fromkeys(files, b""))
  assert state_of("fgvc_stanford_cars", **places).status == "downloadable"


def test_lists_of_tfds_images_are_asked_for_before_and_after(
  no_download, monkeypatch, tmp_path
):
  task = dataclasses.replace(
    TASKS["fgvc_cub"], spec="cifar100:3.*.*", id_feature="id", num_classes=100
  )
  monkeypatch.setitem(TASKS, "fgvc_cub", task)
  folder = str(tmp_path / "tfds")
  wanted = "its subset vpt is listed in VPT's train.json"
  state = state_of("fgvc_cub", data_dir=folder)
  assert state.status == "downloadable"
  assert state.notes[0].startswith(f"when it is prepared: {wanted}")
  prepare_cifar100(Path(folder), 200)
  state = state_of("fgvc_cub", data_dir=folder)
  assert state.status == "manual"
  assert state.text.startswith(f"cifar100/3.0.2 is prepared, but {wanted}")
  assert state.text.endswith("give --lists, or take --subset=drawn")
  state = state_of("fgvc_cub", data_dir=folder, lists=str(tmp_path))
  assert state.status == "manual"
  # One folder of lists, or one with a folder for each data set.
  lists = tmp_path / "lists" / "CUB_200_2011"
  split = {"train": range(100), "val": range(100, 110)}
  lists.mkdir(parents=True)
  for name, numbers in split.items():
    members = {f"train_{i:05d}": i % 100 for i in numbers}
    (lists / f"{name}.json").write_text(json.dumps(members))
  for path in (lists, lists.parent):
    state = state_of("fgvc_cub", data_dir=folder, lists=str(path))
    assert state.ready, state.text
    assert availability.class_counts(state.data, "train").sum() == 100
    assert len(state.data.splits["val"]) == 10


# Folders of files


def _lists_folder(root, counts):
  """Writes CUB as files that do not decode: three classes of so many images."""
  content, number = {}, 0
  for split, count in counts.items():
    members = {}
    for i in range(count):
      members[f"{i % 3}/{number}.jpg"] = i % 3 + 1
      content[f"CUB_200_2011/images/{i % 3}/{number}.jpg"] = b"no image"
      number += 1
    content[f"CUB_200_2011/{split}.json"] = json.dumps(members).encode()
  return write_folder(root, content)


@pytest.fixture
def three_birds(monkeypatch):
  task = dataclasses.replace(TASKS["fgvc_cub"], num_classes=3)
  monkeypatch.setitem(TASKS, "fgvc_cub", task)


def test_a_folder_with_lists_is_counted_without_decoding(three_birds, tmp_path, capsys):
  root = _lists_folder(tmp_path, {"train": 7, "val": 2, "test": 4})
  arguments = ["--task=fgvc_cub", f"--root={root}", f"--data_dir={tmp_path}"]
  status, lines = run(capsys, *arguments)
  assert status == 0
  assert lines[:4] == [
    f"fgvc_cub: ready: images of {root}",
    "  train: 7 images of 3 of 3 classes, smallest 2, median 2, largest 3",
    "  val: 2 images of 2 of 3 classes, smallest 1, median 1, largest 1",
    "  train_val: 9 images of 3 of 3 classes, smallest 2, median 3, largest 4",
  ]
  lists = tmp_path / "lists"
  lists.mkdir()
  for path in (root / "CUB_200_2011").glob("*.json"):
    path.rename(lists / path.name)
  status, lines = run(capsys, *arguments, f"--lists={lists}")
  assert status == 0
  (root / "CUB_200_2011" / "images" / "1" / "1.jpg").unlink()
  status, lines = run(capsys, *arguments, f"--lists={lists}", "--check")
  assert status == 1
  assert "train.json names 1 files that are not there" in lines[0]


def test_folders_that_tfds_lacks_are_described(tmp_path, capsys):
  status, lines = run(capsys, "--task", "fgvc_nabirds", "hta_gtsrb")
  assert status == 1
  assert "give --root with nabirds/ with the images" in lines[0]
  assert "https://dl.allaboutbirds.org/nabirds" in lines[0]
  assert "give --root with gtsrb/ with GTSRB/Training/<class>/*.ppm" in lines[1]
  assert lines[2] == "tasks: 2 manual"
  status, lines = run(capsys, "--task", "hta_gtsrb", f"--root={tmp_path}")
  assert status == 1
  assert lines[0].startswith(f"hta_gtsrb: manual: --root: {tmp_path} is not GTSRB")


def test_gtsrb_and_noah_folders_are_counted_without_decoding(monkeypatch, tmp_path):
  half = dataclasses.replace(
    TASKS["hta_gtsrb"], subsets={"official": Subset("stratified", 215, 215)}
  )
  monkeypatch.setitem(TASKS, "hta_gtsrb", half)
  content = {
    f"gtsrb/GTSRB/Training/{k:05d}/{i}.ppm": b"no image"
    for k in range(43)
    for i in range(10)
  }
  rows = ["Filename;Width;ClassId"] + [f"{k}.ppm;9;{k}" for k in range(43)]
  content["gtsrb/GT-final_test.csv"] = "\n".join(rows).encode()
  for k in range(43):
    content[f"gtsrb/GTSRB/Final_Test/Images/{k}.ppm"] = b"no image"
  lines = [f"images/{i}.jpg {i % 5}" for i in range(30)]
  for name, part in {
    "train800": lines[:10],
    "val200": lines[10:15],
    "train800val200": lines[:15],
    "test": lines[15:],
  }.items():
    content[f"dtd/{name}.txt"] = "\n".join(part).encode()
  content |= {f"dtd/{line.split()[0]}": b"no image" for line in lines}
  root = str(write_folder(tmp_path, content))
  state = state_of("hta_gtsrb", root=root)
  assert state.ready, state.text
  assert (availability.class_counts(state.data, "train") == 5).all()
  state = state_of("dtd", root=root)
  assert state.ready, state.text
  counts = availability.class_counts(state.data, "train_val")
  assert counts.tolist() == [3] * 5 + [0] * 42
  assert any("no image of 42 of 47 classes: class 5, " in n for n in state.notes)
  # A folder that contradicts itself is no reason to look elsewhere.
  (tmp_path / "dtd" / "val200.txt").write_text(lines[0])
  state = state_of("dtd", root=root)
  assert state.status == "broken" and "share 1 images" in state.text


def test_a_task_that_the_folder_lacks_may_be_prepared_already(
  small, no_download, tmp_path, capsys
):
  root = tmp_path / "files"
  root.mkdir()
  arguments = ["--task=cifar100", f"--root={root}", f"--data_dir={tmp_path}"]
  status, lines = run(capsys, *arguments)
  # A folder of files is no order to download.
  assert status == 1 and not no_download
  assert lines[0].startswith(f"cifar100: manual: --root: {root} holds neither test.txt")
  assert "It needs cifar/ with train800.txt" in lines[0]
  assert "Or leave --root out: downloadable: TFDS" in lines[0]
  prepare_cifar100(tmp_path, 100)
  status, lines = run(capsys, *arguments)
  assert status == 0
  assert any(line.startswith(f"  warning: not there: --root: {root}") for line in lines)


# What cannot be read


def test_damaged_records_are_broken_and_stay(small, no_download, tmp_path, capsys):
  folder = prepare_cifar100(tmp_path, 100) / "cifar100" / "3.0.2"
  path = folder / "cifar100-train.tfrecord-00000-of-00001"
  raw = bytearray(path.read_bytes())
  raw[300] ^= 255
  path.write_bytes(bytes(raw))
  status, lines = run(capsys, "--task=cifar100", f"--data_dir={tmp_path}")
  assert status == 1 and not no_download
  assert re.match(r"cifar100: broken: .*-train.tfrecord-.* is damaged", lines[0])
  assert lines[1:] == [
    f"  note: for TFDS to prepare it anew, delete {folder} first",
    "tasks: 1 broken",
  ]


def test_a_version_that_this_tfds_does_not_know_is_unavailable(monkeypatch, tmp_path):
  task = dataclasses.replace(TASKS["cifar100"], spec="cifar100:9.*.*")
  monkeypatch.setitem(TASKS, "cifar100", task)
  state = state_of("cifar100", data_dir=str(tmp_path))
  assert state.status == "unavailable"
  assert "TFDS has no cifar100:9.*.*" in state.text


@pytest.mark.parametrize(
  "arguments, line",
  [
    (["--task=cifar10"], "unknown task 'cifar10'. Nearest: cifar100, hta_cifar10"),
    (["--task=dtd", "--subset=vpt"], "subset is 'vpt', but dtd has official"),
    (["--task=dtd", "--check", "--root=nowhere"], "--root is 'nowhere', but there is"),
    (["--task=dtd", "--lists=nowhere"], "--lists is 'nowhere'"),
    (["--task=dtd", "--manual_dir=nowhere"], "--manual_dir is 'nowhere'"),
    (["--task="], "no task is named, expected some of those of"),
    (["--task=dtd", "--data_dir=gs://b/x"], "--data_dir is gs://b/x, a URL"),
    (["--task=dtd", "--list-indices"], "row numbers are known for cifar100, svhn"),
    (["--task=svhn", "--list-indices", "--split=x"], "--split has 'x', expected some"),
  ],
)
def test_bad_input_is_one_line_and_status_2(capsys, arguments, line):
  assert prepare_data.main(arguments) == 2
  captured = capsys.readouterr()
  assert captured.out == ""
  assert captured.err.startswith("insvp_jax: ") and line in captured.err
  assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
  "arguments, line",
  [
    ([], "--task is missing"),
    (["--task=svhn", "--split=val"], "--split belongs to --list-indices"),
    (["--task=svhn", "--list", "--check"], "not allowed with argument --list"),
  ],
)
def test_flags_that_do_not_go_together_are_status_2(capsys, arguments, line):
  with pytest.raises(SystemExit) as stop:
    prepare_data.main(arguments)
  assert stop.value.code == 2
  assert line in capsys.readouterr().err


def test_an_interrupted_download_ends_in_one_line(monkeypatch, tmp_path, capsys):
  def interrupt(builder, **kwargs):
    raise KeyboardInterrupt

  monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", interrupt)
  assert prepare_data.main(["--task=dmlab", f"--data_dir={tmp_path}"]) == 130
  assert capsys.readouterr().err.count("\n") == 1


# The table of what data sets take


# Where TFDS's file of a builder imports a package for another config or builder.
_FOR_OTHERS = {"eurosat": {"tifffile"}, "caltech_birds2011": {"scipy"}}


@pytest.fixture(scope="module")
def builders():
  """Returns TFDS's builders, by name, of the versions that are prepared."""
  tfds_builder.import_tfds()
  tasks = {downloads.builder_name(t): t for t in TASKS.values() if t.spec}
  return {
    name: tfds.builder(downloads.prepared_spec(task), data_dir="/nonexistent")
    for name, task in tasks.items()
  }


def test_packages_are_those_that_tfds_imports(builders):
  assert set(downloads.REQUIREMENTS) <= set(builders)
  for name, builder in builders.items():
    source = inspect.getsource(sys.modules[type(builder).__module__])
    found = set(re.findall(r"lazy_imports\.([A-Za-z0-9]+)", source))
    found -= _FOR_OTHERS.get(name, set())
    assert (
      set(downloads.REQUIREMENTS.get(name, downloads.Requirements()).packages) == found
    )


def test_versions_can_be_prepared_and_what_is_manual_is_so_in_tfds(builders):
  for name, builder in builders.items():
    # TFDS prepares only its default version and its newest.
    assert builder.version in (builder.canonical_version, max(builder.versions)), name
    needs = downloads.REQUIREMENTS.get(name, downloads.Requirements())
    manual = needs.manual is not None and not needs.gone
    assert manual == (builder.MANUAL_DOWNLOAD_INSTRUCTIONS is not None), name
    if needs.gone:
      files = {info.filename for info in builder.url_infos.values()}
      assert set(needs.manual.needs) == files


def test_sizes_of_keys_hold_the_published_splits():
  for name in original_rows.tasks_with_rows():
    task = TASKS[name]
    splits = ("train", "val", "test") if task.benchmark == "vtab" else ("test",)
    for split in splits:
      published = {"train": 800, "val": 200, "test": task.num_test}[split]
      assert len(original_rows.rows_of_split(task, split)[1]) == published, (
        name,
        split,
      )


@pytest.mark.parametrize("more", [[], ["--check"]])
@pytest.mark.parametrize("flag", ["data_dir", "root", "lists", "manual_dir"])
def test_a_folder_that_is_none_is_named(flag, more, no_download, tmp_path, capsys):
  file = tmp_path / "file"
  file.write_text("")
  values = {"": "empty", " ": "empty", f"{file}": f"{file} is no folder"}
  if flag == "data_dir":
    values[f"{file}/below"] = f"{file} is no folder"
  if flag == "root":
    del values[f"{file}"]
    values["/dev/null"] = "/dev/null is no folder"
  for value, expected in values.items():
    status = prepare_data.main(["--task=svhn", *more, f"--{flag}={value}"])
    said = capsys.readouterr()
    assert status == 2 and not said.out
    assert said.err.startswith(f"insvp_jax: --{flag} is ") and expected in said.err
    assert said.err.count("\n") == 1

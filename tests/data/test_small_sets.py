"""The handwritten digits of scikit-learn, and CIFAR-10 as JPEG bytes in .npz."""

import sys

from data_fixtures import data_config, encode, number_of, numbered_files, write_folder
import numpy as np
from PIL import Image
import pytest

from insvp_jax.data import load_data
from insvp_jax.data.tasks import TASKS


def _rows(split):
  return [image.tobytes() for image in split.images]


def test_digits():
  data = load_data("digits", data_config(), 8)
  sizes = {name: len(split) for name, split in data.splits.items()}
  assert sizes == {"train": 800, "val": 200, "train_val": 1000, "test": 797}
  assert data.class_names == tuple("0123456789")
  assert "scikit-learn" in data.source
  for split in data.splits.values():
    shares = np.bincount(split.labels) / len(split)
    assert np.abs(shares - 0.1).max() < 0.01
  train, val = data.splits["train"], data.splits["val"]
  assert _rows(data.splits["train_val"]) == _rows(train) + _rows(val)
  # Real digits: 0 has a hole, 1 has none.
  images, labels = data.splits["test"].images, data.splits["test"].labels
  holes = images[:, 3:5, 3:5].mean(axis=(1, 2, 3))
  assert holes[labels == 0].mean() < 40 < 180 < holes[labels == 1].mean()
  assert images.max() == 255


def test_digits_splits_do_not_overlap_and_follow_the_seed():
  from sklearn.datasets import load_digits

  first = load_data("digits", data_config(), 8)
  parts = sum((_rows(first.splits[n]) for n in ("train", "val", "test")), [])
  grey = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
  rows = [np.repeat(image[..., None], 3, axis=-1).tobytes() for image in grey]
  assert sorted(parts) == sorted(rows)
  again = load_data("digits", data_config(), 8)
  other = load_data("digits", data_config(split_seed=1), 8)
  assert _rows(first.splits["val"]) == _rows(again.splits["val"])
  assert _rows(first.splits["val"]) != _rows(other.splits["val"])


def test_digits_are_enlarged():
  assert load_data("digits", data_config(), 32).splits["val"].images.shape[1] == 32


def _write_npz(path, num_examples, num_classes=10, size=32):
  files = []
  for i in range(num_examples):
    colour = np.full((size, size, 3), (i % 256, i // 256, 77), np.uint8)
    # JPEG keeps flat colours within a level or two; PNG bytes decode as well.
    files.append(encode(Image.fromarray(colour), "PNG"))
  offsets = np.concatenate([[0], np.cumsum([len(f) for f in files])])
  np.savez(
    path,
    jpeg=np.frombuffer(b"".join(files), np.uint8),
    offsets=offsets.astype(np.int64),
    labels=(np.arange(num_examples) % num_classes).astype(np.int32),
    class_names=np.array([f"class {i}" for i in range(num_classes)]),
  )


@pytest.fixture
def cifar(tmp_path):
  _write_npz(tmp_path / "cifar10_train.npz", 200)
  _write_npz(tmp_path / "cifar10_test.npz", 30)
  return tmp_path


def test_cifar_npz(cifar):
  config = data_config(root=str(cifar), cache_dir=str(cifar / "cache"))
  for _ in range(2):  # the second time from the cache
    data = load_data("cifar10_npz", config, 32)
    sizes = {name: len(split) for name, split in data.splits.items()}
    assert sizes == {"train": 180, "val": 20, "train_val": 200, "test": 30}
    assert data.class_names[3] == "class 3"
    for split in data.splits.values():
      numbers = [number_of(image) for image in split.images]
      assert [n % 10 for n in numbers] == split.labels.tolist()
    val = {number_of(image) for image in data.splits["val"].images}
    train = {number_of(image) for image in data.splits["train"].images}
    assert not val & train and val | train == set(range(200))
    assert np.bincount(data.splits["val"].labels).tolist() == [2] * 10
  other = load_data("cifar10_npz", config.copy_and_resolve_references(), 32)
  assert {number_of(image) for image in other.splits["val"].images} == val
  config.split_seed = 1
  other = load_data("cifar10_npz", config, 32)
  assert {number_of(image) for image in other.splits["val"].images} != val
  assert len(list((cifar / "cache").iterdir())) == 1


def test_cifar_npz_bad_files(cifar):
  config = data_config(root=str(cifar))
  (cifar / "cifar10_test.npz").rename(cifar / "moved.npz")
  with pytest.raises(FileNotFoundError, match="cifar10_test.npz.*config.data.root"):
    load_data("cifar10_npz", config, 32)
  np.savez(cifar / "cifar10_test.npz", images=np.zeros(3))
  with pytest.raises(ValueError, match="cifar10_test.npz is damaged or not of"):
    load_data("cifar10_npz", config, 32)
  np.savez(cifar / "cifar10_test.npz", jpeg=np.array([{}], object))
  with pytest.raises(ValueError, match="cifar10_test.npz is damaged or not of"):
    load_data("cifar10_npz", config, 32)
  with np.load(cifar / "moved.npz") as stored:
    content = {name: stored[name] for name in stored.files}
  content["jpeg"][content["offsets"][7] : content["offsets"][8]] = 0
  np.savez(cifar / "cifar10_test.npz", **content)
  with pytest.raises(ValueError, match="image 7 of .*cifar10_test.npz"):
    load_data("cifar10_npz", config, 32)


def test_real_cifar_test_set(shared_dir, tmp_path):
  # The training file takes seconds to decode; the test set in its place does not.
  source = shared_dir / "data" / "cifar10_test.npz"
  with np.load(source, allow_pickle=False) as stored:
    few = stored["offsets"][:301]
    content = {
      "jpeg": stored["jpeg"][: few[-1]],
      "offsets": few,
      "labels": stored["labels"][:300],
      "class_names": stored["class_names"],
    }
  for name in ("train", "test"):
    np.savez(tmp_path / f"cifar10_{name}.npz", **content)
  data = load_data("cifar10_npz", data_config(root=str(tmp_path)), 32)
  assert data.class_names[0] == "airplane" and len(data.splits["test"]) == 300
  # Ships and planes stand before blue; frogs do not.
  images, labels = data.splits["test"].images, data.splits["test"].labels
  blue = images[..., 2].astype(float).mean((1, 2)) - images[..., 0].mean((1, 2))
  assert blue[(labels == 0) | (labels == 8)].mean() > blue[labels == 6].mean() + 10


@pytest.fixture
def without_tfds(monkeypatch):
  """Makes TensorFlow and TFDS look as if they were not installed."""
  for name in ("tensorflow", "tensorflow_datasets"):
    monkeypatch.setitem(sys.modules, name, None)


def test_files_are_read_without_tensorflow(without_tfds, tmp_path):
  assert load_data("digits", data_config(), 8).num_classes == 10
  root = write_folder(tmp_path / "pets", numbered_files({"a": 9, "b": 9}))
  assert load_data("folder", data_config(root=str(root)), 8).num_classes == 2
  _write_npz(tmp_path / "cifar10_train.npz", 60)
  _write_npz(tmp_path / "cifar10_test.npz", 20)
  assert load_data("cifar10_npz", data_config(root=str(tmp_path)), 32).num_classes == 10
  lines = [f"images/{i:03d}.png {i}\n" for i in range(4)]
  parts = {"train800": [0, 1], "val200": [2], "train800val200": [0, 1, 2], "test": [3]}
  content = numbered_files({"images": 4})
  for name, numbers in parts.items():
    content[f"{name}.txt"] = "".join(lines[i] for i in numbers).encode()
  root = write_folder(tmp_path / "svhn", content)
  assert load_data("svhn", data_config(root=str(root)), 8).num_classes == 10


@pytest.mark.parametrize("missing", ["tensorflow", "tensorflow_datasets"])
def test_without_tfds_its_tasks_say_what_they_need(missing, monkeypatch):
  monkeypatch.setitem(sys.modules, missing, None)
  for name, task in TASKS.items():
    if task.spec:
      with pytest.raises(ValueError) as found:
        load_data(name, data_config(), 8)
      needs = f"{name} needs TensorFlow Datasets: pip install 'insvp_jax[tfds]'"
      assert str(found.value).startswith(needs)

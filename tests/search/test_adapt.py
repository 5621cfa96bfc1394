"""Own images in three lines of Python: whatever form they have, it is the same run."""

import csv
import io
import signal
import types

import data_fixtures as fixtures
from data_fixtures import data_config
import jax
import numpy as np
from PIL import Image
import pytest
from tiny_commands import BACKBONE, make_place
from tiny_training import CLASSES, SIZE, at_step, stop_by

import insvp_jax
from insvp_jax import trees
from insvp_jax.data import StreamSplit, decode, load_data, pipeline
from insvp_jax.data.sources import memory
from insvp_jax.distributed.stopping import Stopped
from insvp_jax.tools import evaluate

# None of this is about devices, and for one all compiles sooner.
pytestmark = pytest.mark.usefixtures("one_device")

TINY = {
  "method": "linear",
  "backbone": "mu/4",
  "image_size": SIZE,
  "batch_size": 4,
  "total_steps": 5,
  "tensorboard": False,
  "optim": {"warmup_epochs": 0.0},
  "data": {"cache_dir": "off"},
  **{f"backbone.{name}": value for name, value in BACKBONE.items()},
}


def make_images(counts=(12, 8, 6)):
  """Returns (images of different sizes, names of their classes), class by class."""
  rng, images, labels = np.random.default_rng(0), [], []
  for label, number in enumerate(counts):
    for i in range(number):
      image = rng.integers(0, 128, (SIZE + i % 3, SIZE + 5, 3), np.uint8)
      image[..., label] += 100
      images.append(image)
      labels.append(CLASSES[label])
  return images, labels


def write_folder(root, images, labels):
  for i, (image, label) in enumerate(zip(images, labels, strict=True)):
    path = root / label / f"{i:02d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
  return root


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder of photos/, a CSV of them in another order, and photos.zip."""
  place = tmp_path_factory.mktemp("adapt")
  photos = write_folder(place / "photos", *make_images())
  rows = [(p.relative_to(place), p.parent.name) for p in photos.glob("*/*.png")]
  with (place / "labels.csv").open("w") as file:
    csv.writer(file).writerows([("file", "kind"), *sorted(rows, reverse=True)])
  return place


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """The settings of a small run, whose backbone is read: to draw it takes longest."""
  weights = make_place(tmp_path_factory.mktemp("backbones")) / "backbone0.npz"
  return {**TINY, "backbone.weights": str(weights)}


@pytest.fixture(scope="module")
def run(place, tiny):
  """The run on arrays; its lr was chosen."""
  return insvp_jax.adapt(make_images(), workdir=place / "run", **tiny)


def assert_same_params(one, two):
  one, two = trees.flatten(one.params), trees.flatten(two.params)
  assert one.keys() == two.keys()
  for name, leaf in one.items():
    assert np.asarray(leaf).tobytes() == np.asarray(two[name]).tobytes(), name


@pytest.mark.parametrize("train", ["photos", "labels.csv"])
def test_a_folder_and_a_csv_give_the_bits_of_the_arrays(
  tiny, place, run, tmp_path, train
):
  lr = run.result["lr"]
  other = insvp_jax.adapt(place / train, workdir=tmp_path, lr=lr, **tiny)
  assert_same_params(other, run)
  assert other.class_names == run.class_names == CLASSES
  same = ("test_accuracy", "data_sha256", "lr", "train_split", "test_by_class")
  assert all(other.result[name] == run.result[name] for name in same)
  assert run.result["task"] == "memory" and run.result["train_split"] == "train_val"
  # The test split is read again from the files.
  assert evaluate.main(["--run", str(other.workdir)]) == 0


def test_the_same_call_returns_the_finished_run(tiny, place, run, monkeypatch):
  monkeypatch.setattr(
    "insvp_jax.train.trainer.train_loop", lambda *_, **__: pytest.fail("it trained")
  )
  again = insvp_jax.adapt(make_images(), workdir=place / "run", **tiny)
  assert_same_params(again, run)
  assert again.predict(make_images()[0][:2]).shape == (2, 3)


@pytest.mark.parametrize("what", ["a pixel", "a label"])
def test_other_images_in_the_same_workdir_are_refused(tiny, place, run, what, capsys):
  images, labels = make_images()
  if what == "a pixel":
    images[0] = np.full_like(images[0], 7)
  else:
    labels[0] = "bee"
  with pytest.raises(ValueError, match="holds a run of other images: they or their"):
    insvp_jax.adapt((images, labels), workdir=place / "run", **tiny)
  # Before any trial.
  assert "trial  step" not in capsys.readouterr().err


def test_stopped_and_called_again_equals_uninterrupted(tiny, monkeypatch, tmp_path):
  images, labels = make_images()
  given = {"val": (images[::4], labels[::4]), "lr": 0.01, **tiny}
  whole = insvp_jax.adapt((images, labels), workdir=tmp_path / "whole", **given)
  assert not (tmp_path / "whole" / "linear" / "trials.jsonl").exists()
  at_step(monkeypatch, 3, stop_by(signal.SIGTERM))
  with pytest.raises(Stopped):
    insvp_jax.adapt((images, labels), workdir=tmp_path / "stopped", **given)
  monkeypatch.undo()
  again = insvp_jax.adapt((images, labels), workdir=tmp_path / "stopped", **given)
  assert_same_params(again, whole)


def test_images_of_memory_are_not_read_again_but_a_folder_is_scored(place, run, capsys):
  assert evaluate.main(["--run", str(run.workdir)]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert "given in Python and are stored nowhere" in line
  photos = str(place / "photos")
  assert evaluate.main(["--run", str(run.workdir), "--root", photos]) == 0


def test_splits_that_lie_apart_are_one_set(tiny, place, tmp_path, capsys):
  images, labels = make_images((4, 4, 4))
  test = write_folder(tmp_path / "elsewhere" / "test", images, labels)
  adapted = insvp_jax.adapt(
    place / "labels.csv", test=test, workdir=tmp_path / "run", lr=0.01, **tiny
  )
  assert adapted.result["num_test_examples"] == 12
  accuracy = adapted.result["test_accuracy"]
  capsys.readouterr()
  assert evaluate.main(["--run", str(adapted.workdir)]) == 0
  printed = capsys.readouterr()
  assert f"test: accuracy {100 * accuracy:.2f}%" in printed.out
  assert "note" not in printed.err


# Forms of the same images; none of them trains.


def read(given, **changes):
  config = data_config(**changes)
  if not (isinstance(given, dict) and "train" in given):
    given = {"train": given}
  examples = {k: memory.collect(images, k, config) for k, images in given.items()}
  return load_data(
    "memory", config, SIZE, lambda config, size: memory.load(examples, config, size)
  )


class HubLike:
  """As a data set of Hugging Face: columns, features with names, images of Pillow."""

  def __init__(self, images, labels):
    self.features = {
      "img": object(),
      "fine_label": types.SimpleNamespace(names=list(CLASSES)),
    }
    self.column_names = list(self.features)
    self._images, self._labels = images, [CLASSES.index(name) for name in labels]

  def __len__(self):
    return len(self._images)

  def __getitem__(self, key):
    if key == "fine_label":
      return self._labels
    assert isinstance(key, int), "images are decoded one by one"
    image = Image.fromarray(self._images[key])
    return {"img": image, "fine_label": self._labels[key]}


class VisionLike:
  """As a data set of torchvision."""

  classes = list(CLASSES)

  def __init__(self, images, labels):
    self._images, self._labels = images, labels

  def __len__(self):
    return len(self._images)

  def __getitem__(self, index):
    label = CLASSES.index(self._labels[index])
    return Image.fromarray(self._images[index]), label


def png(image):
  stream = io.BytesIO()
  Image.fromarray(image).save(stream, "PNG")
  return stream.getvalue()


FORMS = {
  "Hugging Face": HubLike,
  "torchvision": VisionLike,
  "pairs": lambda images, labels: list(zip(images, labels, strict=True)),
  "a generator": lambda images, labels: zip(images, labels, strict=True),
  "dicts": lambda images, labels: [
    {"image": {"bytes": png(x), "path": None}, "label": y, "id": 3}
    for x, y in zip(images, labels, strict=True)
  ],
  "dicts of other names": lambda images, labels: (
    {"x": x, "t": y} for x, y in zip(images, labels, strict=True)
  ),
  "columns": lambda images, labels: {"image": images, "label": np.array(labels)},
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_are_the_same_data(form):
  images, labels = make_images()
  expected, found = read((images, labels)), read(FORMS[form](images, labels))
  assert found.class_names == CLASSES
  for name, split in expected.splits.items():
    assert split.digest == found.splits[name].digest, name


def test_whole_numbers_are_classes_in_their_order():
  images, labels = make_images()
  numbers = np.array([(2, 10, 1)[CLASSES.index(name)] for name in labels], np.int64)
  data = read((np.stack([image[:SIZE] for image in images]), numbers))
  assert data.class_names == ("1", "2", "10")


@pytest.mark.parametrize("given", ["drawn", "own"])
def test_large_sets_are_streamed_in_the_same_batches(given):
  images, labels = make_images()
  own = {"val": (images[1::5], labels[1::5])} if given == "own" else {}
  small, large = (
    read({"train": (images, labels), **own}, resident_mb=mb) for mb in (1024, 0)
  )
  for name, split in small.splits.items():
    stream = large.splits[name]
    assert isinstance(stream, StreamSplit)
    batches = [
      next(pipeline.train_batches(s, batch_size=len(split), seed=1))
      for s in (split, stream)
    ]
    assert all(
      np.array_equal(*map(np.asarray, x))
      for x in zip(*(jax.tree.leaves(batch) for batch in batches), strict=True)
    )
  images[0] = np.zeros_like(images[0])
  other = read({"train": (images, labels), **own}, resident_mb=0)
  assert other.splits["train_val"].digest != large.splits["train_val"].digest


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16", "exif"])
def test_images_of_pillow_are_those_of_their_files(mode):
  image = Image.fromarray(
    fixtures.pixels(77, 8) + np.arange(8, dtype=np.uint8)[:, None]
  )
  options = {}
  if mode == "I;16":
    image = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 999)
  elif mode == "exif":
    exif = Image.Exif()
    exif[0x0112] = 6
    options["exif"] = exif.tobytes()
  else:
    image = image.convert(mode)
    if mode in ("RGBA", "LA"):
      image.putalpha(Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)))
  data = fixtures.encode(image, "TIFF" if mode == "CMYK" else "PNG", **options)
  with Image.open(io.BytesIO(data)) as opened:
    found = decode.from_pillow(opened, "it")
  np.testing.assert_array_equal(found, decode.decode_image(data, "it"))


IMAGE = np.zeros((8, 8, 3), np.uint8)
BAD = {
  "no images": ([], "train has no images"),
  "a number": (3, "train is a int, expected a path, a pair"),
  "lengths": (([IMAGE], [0, 1]), "1 images and 2 labels"),
  "images alone": (np.stack([IMAGE] * 3), "example 0 of train is a ndarray"),
  "one class": (([IMAGE] * 3, [1, 1, 1]), "only one class, '1'"),
  "one-hot": (([IMAGE] * 3, np.eye(3)), r"shape \[3, 3\].*argmax"),
  "no label": (([IMAGE] * 2, ["a", None]), "label of image 1 of train is None"),
  "an empty label": (([IMAGE] * 2, ["a", " "]), "label of image 1 of train is empty"),
  "half a label": (
    ([IMAGE] * 2, [0.5, 1]),
    "image 0 of train is 0.5, expected a whole",
  ),
  "floats": (([IMAGE / 255] * 4, [0, 1] * 2), r"image 0 of train is float64.*uint8\("),
  "channels first": (([IMAGE.T.copy()] * 4, [0, 1] * 2), "moveaxis"),
  "no pixels": (([IMAGE[:0]] * 4, [0, 1] * 2), "image 0 of train is uint8"),
  "no image": (([b"x"] * 4, [0, 1] * 2), "image 0 of train"),
  "splits": ({"train": HubLike([IMAGE], ["ant"])}, "give one of them"),
  "columns": ([{"a": IMAGE, "b": 1, "c": 2}], "which column has the labels"),
  "unlabelled": (
    [{"image": IMAGE, "label": -1}],
    "label of image 0 of train is -1, expected 0 to 2",
  ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_labelled_images_is_one_line(case):
  given, message = BAD[case]
  if case == "unlabelled":
    given = HubLike([IMAGE], ["ant"])
    given._labels = [-1]
  with pytest.raises(ValueError, match=message):
    read(given if case != "splits" else {"train": given})


@pytest.mark.parametrize(
  "given, settings, message",
  [
    ((), {"total_epoch": 3}, "total_epoch, which is no key.*'total_epochs'"),
    ((), {"optim": {"lr": 1.0}, "lr": 1.0}, "both lr and optim.lr"),
    ((), {"optim": {"lr": 1.0}, "optim.lr": 1.0}, "optim.lr twice"),
    ((), {"optim": {"lr": "high"}}, "optim.lr is 'high', expected a number"),
    ((), {"tune": {"methods": ("vpt",)}}, "takes no tune.methods: adapt trains one"),
    (("photos",), {}, "val is a path and train is not"),
    (([IMAGE] * 2, [0, 2]), {}, "label of image 1 of val is '2', a class that train"),
  ],
)
def test_wrong_calls_are_one_line(tiny, place, tmp_path, given, settings, message):
  images, labels = [IMAGE] * 8, [0, 1] * 4
  val = str(place / given[0]) if len(given) == 1 else given or None
  with pytest.raises(ValueError, match=message):
    insvp_jax.adapt((images, labels), val, workdir=tmp_path, **{**tiny, **settings})


@pytest.mark.parametrize(
  "splits, message",
  [
    (("photos", "photos.zip"), "test is in .*photos.zip; of several paths"),
    (("both", "photos"), "both, given as train, has a split test in it"),
    (("photos", "both"), "both, given as test, has a split test in it"),
    (("photos", "other"), "has the class 'dog', which train does not have"),
  ],
)
def test_paths_that_do_not_go_together_are_one_line(
  tiny, place, tmp_path, splits, message
):
  import shutil

  for name in {*splits} - {"photos"}:
    if name == "photos.zip":
      shutil.make_archive(str(tmp_path / "photos"), "zip", place / "photos")
    elif name == "other":
      write_folder(tmp_path / name, *make_images())
      (tmp_path / name / "bee").rename(tmp_path / name / "dog")
    else:
      for split in ("train", "test"):
        write_folder(tmp_path / name / split, *make_images((3, 3, 3)))
  train, test = ((place if n == "photos" else tmp_path) / n for n in splits)
  with pytest.raises(ValueError, match=message):
    insvp_jax.adapt(train, test=test, workdir=tmp_path / "run", **tiny)

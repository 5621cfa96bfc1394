"""Images with masks: layouts, labels, what is wrong with them, and random crops."""

import io
import json
import shutil

import numpy as np
from PIL import Image
import pytest
from segment_fixtures import CLASSES, SIZE, SPLITS, draw, write_shapes

from insvp_jax.config import defaults
from insvp_jax.data import load_data, mask_batches
from insvp_jax.data.label_maps import IGNORED, MaskStyle
from insvp_jax.data.mask_batches import Crops, crop, distort, train_batches
from insvp_jax.tools import masks


def load(root, **changes):
  config = defaults().data
  config.update({"root": str(root), "cache_dir": "off", **changes})
  return load_data("segment_folder", config, SIZE)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
  return write_shapes(tmp_path_factory.mktemp("shapes"))


def labels_of(split, position=0):
  return next(iter(split.pairs([position])))[1]


def test_images_come_with_the_classes_of_their_pixels(shapes):
  data = load(shapes)
  assert data.class_names == CLASSES
  sizes = {name: len(split) for name, split in data.splits.items()}
  assert sizes == {**SPLITS, "train_val": SPLITS["train"] + SPLITS["val"]}
  for i, (image, labels) in enumerate(data.splits["val"].pairs(range(3))):
    expected, mask = draw(i, 1)
    np.testing.assert_array_equal(image, expected)
    np.testing.assert_array_equal(
      labels, np.where(mask == 255, IGNORED, mask.astype(int))
    )
  masks = [draw(i, 0)[1] for i in range(SPLITS["train"])]
  counts = data.splits["train"].class_counts(3)
  assert counts.tolist() == [sum((m == c).sum() for m in masks) for c in range(3)]


def test_the_layouts_of_others_and_archives_are_the_same(shapes, tmp_path):
  ade = tmp_path / "ade"
  for kind, other in (("images", "images"), ("masks", "annotations")):
    for split, name in (("train", "training"), ("val", "validation")):
      shutil.copytree(shapes / kind / split, ade / other / name)
  # As ADE20K has it: the test images have no masks, the list of classes is a table.
  shutil.copytree(shapes / "images" / "test", ade / "images" / "test")
  rows = ["Idx\tRatio\tTrain\tVal\tName"]
  rows += [f"{i}\t0\t0\t0\t{name}" for i, name in enumerate(CLASSES)]
  (ade / "objectInfo150.txt").write_text("\n".join(rows))
  inside = tmp_path / "inside"
  for kind in ("images", "masks"):
    for split in SPLITS:
      shutil.copytree(shapes / kind / split, inside / "set" / split / kind)
  shutil.copy(shapes / "classes.txt", tmp_path)
  archive = shutil.make_archive(tmp_path / "zipped", "zip", inside)
  whole = load(shapes)
  for root, names, changes in (
    (ade, ("train", "val"), {"test_fraction": 0.0}),
    (inside, SPLITS, {"classes": str(tmp_path / "classes.txt")}),
    (archive, SPLITS, {"classes": str(tmp_path / "classes.txt")}),
  ):
    data = load(root, **changes)
    assert data.class_names == CLASSES
    assert set(data.splits) - {"train_val"} == set(names)
    assert data.digest(names) == whole.digest(names)


def test_missing_splits_are_drawn_and_nothing_is_in_two(tmp_path):
  root = write_shapes(tmp_path, {"train": 10})
  data = load(root, val_fraction=0.2, test_fraction=0.3)
  names = {n: data.splits[n].files.masks for n in ("train", "val", "test")}
  assert {name: len(found) for name, found in names.items()} == {
    "train": 5,
    "val": 2,
    "test": 3,
  }
  assert len({mask for found in names.values() for mask in found}) == 10
  assert load(root, val_fraction=0.2, test_fraction=0.3).digest(names) == data.digest(
    names
  )
  with pytest.raises(ValueError, match="data.shots is 3, which is of images with one"):
    load(root, shots=3)
  with pytest.raises(ValueError, match="leave none of the 10 images"):
    load(root, val_fraction=0.5, test_fraction=0.5)


def test_zero_may_be_no_class(tmp_path):
  root = write_shapes(tmp_path, {"train": 2})
  (root / "classes.txt").unlink()
  numbered = load(root, val_fraction=0.0, test_fraction=0.0)
  assert numbered.class_names == ("0", "1", "2")
  data = load(root, val_fraction=0.0, test_fraction=0.0, reduce_zero_label=True)
  assert data.class_names == ("1", "2")
  mask = draw(0, 0)[1].astype(int)
  expected = np.where((mask == 255) | (mask == 0), IGNORED, mask - 1)
  np.testing.assert_array_equal(labels_of(data.splits["train"]), expected)


def rewrite(root, change, name="train/0.png"):
  """Changes a mask: its array becomes a PIL image."""
  path = root / "masks" / name
  change(np.asarray(Image.open(path))).save(path)


def as_rgb(mask):
  colors = np.array([[1, 2, 3], [250, 0, 0], [0, 0, 250]], np.uint8)
  return Image.fromarray(np.where((mask == 255)[..., None], 255, colors[mask % 255]))


def as_palette(mask):
  image = Image.fromarray(mask).convert("P")
  image.putpalette([x for c in range(256) for x in (255 - c, c, c // 2)])
  image.putdata(mask.ravel().tolist())
  return image


COLORS = [
  {"name": "ground", "color": [1, 2, 3]},
  {"name": "square", "color": "#fa0000"},
  {"name": "disc", "color": "0,0,250"},
  {"name": "ignore", "color": "#ffffff"},
]
CSV = "name,r,g,b\nground,1,2,3\nsquare,250,0,0\ndisc,0,0,250\nignore,255,255,255\n"
VALUES = {"ground": 0, "square": 400, "disc": 65535, "ignore": 7}


@pytest.mark.parametrize("kind", ["json", "csv", "16bit", "palette"])
def test_colors_palettes_and_16_bits_become_the_same_labels(tmp_path, kind):
  root = write_shapes(tmp_path / "a", {"train": 1})
  none = {"val_fraction": 0.0, "test_fraction": 0.0}
  expected = labels_of(load(root, **none).splits["train"])
  (root / "classes.txt").unlink()
  if kind == "palette":
    # Its indices are the labels, whatever its colours.
    rewrite(root, as_palette)
    (root / "classes.txt").write_text("\n".join(CLASSES))
  elif kind == "16bit":
    values = np.array([0, 400, 65535, 7], np.uint16)
    rewrite(root, lambda m: Image.fromarray(values[np.where(m == 255, 3, m)]))
    (root / "classes.json").write_text(json.dumps(VALUES))
  else:
    rewrite(root, as_rgb)
    text = CSV if kind == "csv" else json.dumps(COLORS)
    (root / f"classes.{kind}").write_text(text)
  data = load(root, **none)
  assert data.class_names == CLASSES
  np.testing.assert_array_equal(labels_of(data.splits["train"]), expected)
  # What is predicted is written with the same values, and opens in the same colours.
  with Image.open(root / "masks" / "train" / "0.png") as image:
    has_colors = image.mode == "RGB"
    values, colors = np.asarray(image), np.asarray(image.convert("RGB"))
  png = masks.png(np.maximum(expected, 0), data.mask_style)
  with Image.open(io.BytesIO(png)) as image:
    is_real = expected != IGNORED
    assert image.mode == ("I;16" if kind == "16bit" else "P")
    own = expected if has_colors else values
    np.testing.assert_array_equal(np.asarray(image)[is_real], own[is_real])
    if kind != "16bit":
      shown = np.asarray(image.convert("RGB"))
      np.testing.assert_array_equal(shown[is_real], colors[is_real])
  # As a run keeps it.
  stored = json.loads(json.dumps(data.mask_style.to_json()))
  assert MaskStyle.from_json(stored, 3) == data.mask_style
  with pytest.raises(ValueError, match="3 values and . colors for 4 classes"):
    MaskStyle.from_json(stored, 4)


def smaller(mask):
  return Image.fromarray(mask[1:])


def with_label(mask):
  return Image.fromarray(np.where(mask == 2, 9, mask).astype(np.uint8))


BAD = {
  "size": (
    smaller,
    "0.png has 24 x 17 pixels, but its mask masks/train/0.png has 24 x",
  ),
  "label": (with_label, r"0.png has the label 9, expected 0 to 2, or 255, which is"),
  "rgb": (as_rgb, "0.png has colors .mode RGB., expected one channel of class indices"),
  "float": (lambda m: Image.fromarray(m.astype(np.float32)), "does not|floating-point"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_mask_is_one_line(tmp_path, case):
  root = write_shapes(tmp_path, {"train": 1})
  change, message = BAD[case]
  if case == "float":
    mask = root / "masks" / "train" / "0.png"
    change(np.asarray(Image.open(mask))).save(mask.with_suffix(".tiff"))
    mask.unlink()
  else:
    rewrite(root, change)
  with pytest.raises(ValueError, match=message) as error:
    load(root, val_fraction=0.0, test_fraction=0.0)
  assert "\n" not in str(error.value)


def test_what_is_wrong_with_a_folder_is_one_line(tmp_path):
  root = write_shapes(tmp_path, {"train": 3})
  none = {"val_fraction": 0.0, "test_fraction": 0.0}
  (root / "masks" / "train" / "1.png").unlink()
  with pytest.raises(ValueError, match=r"images/train/1.png has no mask; expected"):
    load(root, **none)
  (root / "images" / "train" / "1.png").unlink()
  for name, text, message in (
    ("classes.json", "[3]", "has 3 in place of a class"),
    ("classes.json", '{"a": [1, 2, 300]}', r"gives 'a' the color \[1, 2, 300\]"),
    ("classes.json", "{", "is no JSON"),
    ("classes.csv", "index\n1\n", "has no column 'name'"),
    ("classes.csv", "name,index\na,1\nb,1\n", "gives the index 1 to two classes"),
  ):
    (root / name).write_text(text)
    with pytest.raises(ValueError, match=message):
      load(root, **none)
    (root / name).unlink()
  shutil.rmtree(root / "masks")
  with pytest.raises(ValueError, match="there are no masks in .*; expected images/"):
    load(root, **none)


def test_a_color_that_no_class_has_is_one_line(tmp_path):
  root = write_shapes(tmp_path, {"train": 1})
  rewrite(root, as_rgb)
  (root / "classes.json").write_text(json.dumps(COLORS[:2]))
  (root / "classes.txt").unlink()
  with pytest.raises(ValueError, match="has the color #(ffffff|0000fa), which"):
    load(root, val_fraction=0.0, test_fraction=0.0)


# --- Random crops.


def test_image_and_mask_are_cropped_alike():
  # Pixels tell their label, so that any other window shows.
  labels = np.repeat(np.repeat(np.arange(48).reshape(6, 8), 8, 0), 8, 1).astype(
    np.int16
  )
  image = np.repeat((labels * 5).astype(np.uint8)[..., None], 3, -1)
  flipped = 0
  for seed in range(12):
    rng = np.random.default_rng(seed)
    pixels, window = crop(image, labels, rng, Crops(fill=(0, 0, 0)), 32)
    assert pixels.shape == (32, 32, 3) and window.shape == (32, 32)
    real = window != IGNORED
    assert not pixels[~real].any()
    # At borders of squares two labels are mixed.
    wrong = np.abs(pixels[..., 0].astype(int) - 5 * window)[real] > 5
    assert wrong.mean() < 0.4
    row = window[0][window[0] != IGNORED]
    flipped += bool(row[0] > row[-1])
  assert 0 < flipped < 12


def test_a_crop_at_scale_one_is_a_part_of_the_image():
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (20, 30, 3), np.uint8)
  labels = rng.integers(0, 5, (20, 30)).astype(np.int16)
  crops = Crops(resize="none", scales=(1.0, 1.0), flip=False)
  pixels, window = crop(image, labels, rng, crops, 16)
  where = [
    (y, x)
    for y in range(5)
    for x in range(15)
    if (labels[y : y + 16, x : x + 16] == window).all()
  ]
  assert len(where) == 1
  y, x = where[0]
  np.testing.assert_array_equal(pixels, image[y : y + 16, x : x + 16])


def test_a_class_does_not_fill_a_crop_if_it_can_be_helped():
  labels = np.zeros((40, 40), np.int16)
  labels[:, 30:] = 1
  image = np.zeros((40, 40, 3), np.uint8)
  crops = Crops(resize="none", scales=(1.0, 1.0))

  def shares(crops):
    rngs = map(np.random.default_rng, range(30))
    return [np.mean(crop(image, labels, rng, crops, 16)[1] == 0) for rng in rngs]

  free, limited = (
    np.mean(np.array(shares(each)) > 0.75)
    for each in (Crops(**{**vars(crops), "max_share": 1.0}), crops)
  )
  assert limited < 0.3 < free


def test_batches_depend_on_seed_and_step_alone(shapes, mesh):
  from insvp_jax.distributed import mesh as mesh_lib

  split = load(shapes).splits["train"]
  options = {"batch_size": 4, "crops": Crops(), "image_size": SIZE}

  def take(count, **changes):
    batches = train_batches(split, **{**options, "seed": 3, **changes})
    found = [{k: np.asarray(v) for k, v in next(batches).items()} for _ in range(count)]
    batches.close()
    return found

  whole = take(5)
  assert whole[0]["images"].dtype == np.uint8 and whole[0]["masks"].dtype == np.int16
  later = take(2, start_step=3)
  sharded = take(1, sharding=mesh_lib.batch_sharding(mesh))
  for found, expected in ((later, whole[3:]), (sharded, whole)):
    for batch, same in zip(found, expected, strict=False):
      for name in batch:
        np.testing.assert_array_equal(batch[name], same[name])
  other = take(1, seed=4)[0]
  assert (other["images"] != whole[0]["images"]).any()
  # Another epoch has other crops of the same image.
  assert (whole[0]["images"] != whole[2]["images"]).any()


def test_the_shorter_side_is_resized_unless_the_longer_becomes_too_long():
  assert mask_batches.base_scale(100, 200, "shorter", 50) == 0.5
  assert mask_batches.base_scale(100, 1000, "shorter", 50) == 0.2
  assert mask_batches.base_scale(100, 200, "none", 50) == 1


def test_colours_are_changed_as_drawn_and_masks_are_not():
  pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
  grey = np.full((4, 4, 3), 100, np.uint8)
  means = []
  for number in range(200):
    seed = (7, number)
    found = distort(pixels, np.random.default_rng(seed))
    again = distort(pixels, np.random.default_rng(seed))
    assert found.dtype == np.uint8 and found.shape == pixels.shape
    np.testing.assert_array_equal(found, again)
    # Grey stays grey: neither saturation nor hue changes it.
    other = distort(grey, np.random.default_rng(seed))
    assert len(np.unique(other)) == 1
    means.append(float(other[0, 0, 0]))
  # Within (100 +- 32) * [0.5, 1.5], the same in about a quarter of the cases.
  assert 34 <= min(means) < 60 and 140 < max(means) <= 198
  assert 0.15 < np.mean(np.array(means) == 100) < 0.35
  # All else is drawn as without.
  labels = np.random.default_rng(1).integers(0, 3, (20, 31)).astype(np.int16)
  image = np.random.default_rng(2).integers(0, 256, (20, 31, 3), np.uint8)
  crops = [
    crop(image, labels, np.random.default_rng(3), Crops(photometric=on), SIZE)
    for on in (False, True)
  ]
  np.testing.assert_array_equal(crops[0][1], crops[1][1])
  assert (crops[0][0] != crops[1][0]).any()

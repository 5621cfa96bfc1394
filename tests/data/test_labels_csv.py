"""CSVs of labels are read as people write them, or refused by file and row."""

import csv
import io
import os
from pathlib import Path
import shutil

import data_fixtures as fixtures
from data_fixtures import data_config
from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from insvp_jax.data import StreamSplit, load_data
from insvp_jax.data.folder_or_zip import open_folder_or_zip
from insvp_jax.data.sources import labels_csv
from insvp_jax.data.sources.class_names import class_name, in_order

# Names with all that separates cells, and what quotes them.
ODD = ("a,b.png", "c;d.png", "e|f.png", 'say "hi".jpg', "g/h i.PNG", "ü.webp", "j.gif")
COUNTS = {"ant": 6, "bee": 5, "cat": 4}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
  """A folder with files of odd names; what is in them does not matter here."""
  place = tmp_path_factory.mktemp("odd")
  for name in ODD:
    (place / name).parent.mkdir(exist_ok=True)
    (place / name).write_bytes(b"")
  return place


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """A folder of classes."""
  files = fixtures.numbered_files(COUNTS)
  return fixtures.write_folder(tmp_path_factory.mktemp("csv") / "photos", files)


def layout(path, text=None, root="", **changes):
  """Returns the layout of a CSV with some text, or bytes."""
  if text is not None:
    Path(path).write_bytes(text if isinstance(text, bytes) else text.encode())
  config = data_config(labels=str(path), root=str(root), **changes)
  with open_folder_or_zip(labels_csv.root_of(config)) as tree:
    return labels_csv.find_layout(tree, config)


def rows_of(photos):
  """Returns (path, label) of all images of a folder of classes."""
  paths = sorted(photos.glob("*/*.png"))
  return [(path.relative_to(photos).as_posix(), path.parent.name) for path in paths]


def table(rows, **options):
  stream = io.StringIO()
  csv.writer(stream, **options).writerows(rows)
  return stream.getvalue()


@given(
  words=st.lists(
    st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1)
    .map(str.strip)
    .filter(lambda word: word and class_name(word) == word),
    min_size=2,
    max_size=3,
    unique=True,
  ),
  delimiter=st.sampled_from(",;\t|"),
  quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
  encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
  end=st.sampled_from(["\n", "\r\n"]),
  header=st.sampled_from(
    [None, ("Path", "Label"), ("FILE", "what"), ("", "x"), ("x", "")]
  ),
  order=st.permutations(range(len(ODD))),
)
def test_a_table_is_read_however_it_is_written(
  odd, words, delimiter, quoting, encoding, end, header, order
):
  labels = {name: words[i % len(words)] for i, name in enumerate(ODD)}
  rows = [(ODD[i], labels[ODD[i]]) for i in order]
  text = table(
    [*([header] if header else []), *rows],
    delimiter=delimiter,
    quoting=quoting,
    lineterminator=end,
  )
  found = layout(odd / "labels.csv", text.encode(encoding))
  assert found.class_names == in_order(words)
  index = {name: found.class_names.index(label) for name, label in labels.items()}
  expected = sorted(index.items(), key=lambda member: (member[1], member[0]))
  assert found.splits == {"train": expected}


def assert_same(one, two):
  assert one.class_names == two.class_names and list(one.splits) == list(two.splits)
  for name, split in one.splits.items():
    assert split.digest == two.splits[name].digest
    np.testing.assert_array_equal(split.labels, two.splits[name].labels)


@pytest.mark.parametrize("resident_mb", [1024, 0])
def test_a_csv_equals_the_folder_whatever_the_order_of_its_rows(
  photos, tmp_path, resident_mb
):
  folder = load_data(
    "folder", data_config(root=str(photos), resident_mb=resident_mb), 8
  )
  rows = rows_of(photos)
  shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
  path = tmp_path / "labels.csv"
  path.write_text(table([("path", "label"), *shuffled]))
  config = data_config(root=str(photos), labels=str(path), resident_mb=resident_mb)
  found = load_data("folder", config, 8)
  assert isinstance(found.splits["train"], StreamSplit) == (not resident_mb)
  assert_same(found, folder)
  assert found.are_listed and not folder.are_listed
  # Of an archive, too.
  shutil.make_archive(str(tmp_path / "photos"), "zip", photos)
  config.root = str(tmp_path / "photos.zip")
  assert_same(load_data("folder", config, 8), folder)


def test_splits_of_a_column_are_kept_and_the_others_drawn(photos):
  rows = rows_of(photos)
  named = [(*row, "Validation" if i % 3 else "train") for i, row in enumerate(rows)]
  path = photos / "labels.csv"
  path.write_text(table([("image", "label", "split"), *named]))
  data = load_data("folder", data_config(labels=str(path)), 8)
  assert len(data.splits["val"]) == sum(i % 3 > 0 for i in range(len(rows)))
  assert len(data.splits["test"]) == 2  # of two classes; the third has one image
  assert layout(path).splits["val"] == [
    (name, sorted(COUNTS).index(label))
    for name, label, split in named
    if split != "train"
  ]


def test_numbers_are_classes_in_their_order(odd):
  text = table(zip(ODD, [10, 2, 1, 10, 2, 1, 1], strict=True))
  found = layout(odd / "labels.csv", text)
  assert found.class_names == ("1", "2", "10")


WHERE = {
  "below the root": lambda photos, place, name: name,
  "with ./ and ..": lambda photos, place, name: f"./x/../{name}",
  "of Windows": lambda photos, place, name: name.replace("/", "\\"),
  "absolute": lambda photos, place, name: str(photos / name),
  "beside the CSV": lambda photos, place, name: os.path.relpath(photos / name, place),
  "without ending": lambda photos, place, name: name.removesuffix(".png"),
}


@pytest.mark.parametrize("where", WHERE)
def test_paths_may_start_from_the_root_or_from_the_csv(photos, tmp_path, where):
  rows = [(WHERE[where](photos, tmp_path, name), c) for name, c in rows_of(photos)]
  found = layout(tmp_path / "labels.csv", table(rows), root=photos)
  expected = [(name, sorted(COUNTS).index(c)) for name, c in rows_of(photos)]
  assert found.splits == {"train": expected}


def test_columns_are_found_by_what_is_in_them_or_named(photos):
  rows = [(i, *row, i % 2, "x") for i, row in enumerate(rows_of(photos))]
  path = photos / "labels.csv"
  # The index of pandas, a column of paths of another name, others.
  text = table([("", "where", "species", "label_quality", "note"), *rows])
  expected = layout(path, table([row[1:3] for row in rows]))
  assert layout(path, text) == expected
  odd = layout(path, text, label_column="label_quality")
  assert odd.class_names == ("0", "1")
  assert layout(path, table([("Unnamed: 0", "id", "?"), *[r[:3] for r in rows]])) == (
    expected
  )


def test_rows_that_are_there_twice_count_once(photos, caplog):
  rows = rows_of(photos)
  expected = layout(photos / "labels.csv", table(rows))
  found = layout(photos / "labels.csv", table([*rows, rows[3], (), rows[0]]))
  assert found == expected
  assert "2 rows are there twice, and count once, first row 16" in caplog.text


HEAD = "path,label\nant/000.png,ant\n"
BAD = {
  "no row": ("", "has no rows"),
  "header alone": ("path,label\n", "no rows below its header"),
  "one column": ("ant/000.png\nbee/000.png\n", "has one column"),
  "ragged": (f"{HEAD}bee/000.png,a,b\n", "row 3: 3 cells, expected 2"),
  "quotes": (f'{HEAD}"bee/000.png,bee\n', "row 3: the quotes do not fit"),
  "quotes in the first row": ('"ant/000.png,ant\n', "row 1: the quotes do not fit"),
  "no label": (f"{HEAD}\nbee/000.png,\n", "row 4: no label of bee/000.png"),
  "no path": (f"{HEAD},bee\n", "row 3: no path"),
  "missing": (
    f"{HEAD}bee/066.png,bee\nbee/067.png,bee\n",
    "row 3: no image bee/066.png in .*, one of 2 that are missing. Set",
  ),
  "a folder": (f"{HEAD}bee,bee\n", "row 3: no image bee in"),
  "a URL": (f"{HEAD}https://a.b/c.png,bee\n", "row 3: https://a.b/c.png is a URL"),
  "outside": (f"{HEAD}../bee.png,bee\n", "row 3: ../bee.png is not in .*data.root"),
  "absolute": (f"{HEAD}/etc/passwd,bee\n", "row 3: /etc/passwd is not in"),
  "two labels": (
    f"{HEAD}bee/000.png,bee\n./ant/000.png,bee\n",
    "row 4: ./ant/000.png has the label 'bee', but 'ant' in row 2",
  ),
  "two splits": (
    "path,label,split\nant/000.png,a,train\nbee/000.png,b,train\nant/000.png,a,val\n",
    "row 4: ant/000.png has the split 'val', but 'train' in row 2",
  ),
  "a split": (
    "path,label,split\nant/000.png,a,fold1\n",
    "row 2: the split is 'fold1', expected train, val or test",
  ),
  "no train": ("path,label,split\nant/000.png,a,val\n", "no rows of the split train"),
  "a class of val": (
    "path,label,split\nant/000.png,ant,train\nbee/000.png,bee,train\nbee/001.png,bea,val\n",
    "row 4: val has the class 'bea', which train does not have.*'bee'",
  ),
  "one class": (f"{HEAD}bee/000.png,ant\n", "only one class, 'ant'"),
  "a class each": (
    f"{HEAD}ant/001.png,b\nant/002.png,c\n",
    "each of the 3 images has a label of its own",
  ),
  "no header": ("ant/000.png,ant,1\n", "row 1: no header, and 3 columns"),
  "labels unclear": (
    "path,u,v\nant/000.png,ant,1\n",
    "which column has the labels.*'v'",
  ),
  "images unclear": ("u,v,w\nq,ant,1\n", "which column has the paths"),
  "no such image": ("u,v\nq,ant\n", "row 2: no image q in"),
  "Latin-1": (HEAD.encode() + b"b\xe9e/000.png,bee\n", "row 3: no text in UTF-8"),
  "binary": (b"PK\x03\x04\0\0", "is no text; expected a CSV"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_meant_is_told_by_file_and_row(photos, case):
  text, message = BAD[case]
  path = photos / "labels.csv"
  with pytest.raises((ValueError, FileNotFoundError), match=f"labels.csv.*{message}"):
    layout(path, text)


def test_a_column_or_csv_that_is_not_there_is_named(photos, tmp_path):
  path = photos / "labels.csv"
  message = "data.label_column is 'lable', but the header is 'path', 'label'.*'label'"
  with pytest.raises(ValueError, match=message):
    layout(path, HEAD, label_column="lable")
  with pytest.raises(ValueError, match="'label' is 2 times there"):
    layout(path, "path,label,label\nant/000.png,a,b\n", label_column="label")
  with pytest.raises(ValueError, match="cannot be two of image, label and split"):
    layout(path, HEAD, label_column="path")
  with pytest.raises(FileNotFoundError, match="data.labels: cannot read .*none.csv"):
    layout(tmp_path / "none.csv")
  with pytest.raises(ValueError, match="task digits has labels of its own"):
    load_data("digits", data_config(labels=str(path)), 8)

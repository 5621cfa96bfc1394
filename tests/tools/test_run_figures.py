"""The figures of runs: they show the data that they write, whatever it is."""

import csv
import functools
import json
from pathlib import Path
import re
import shlex
import sys

import numpy as np
from PIL import Image
import pytest
from tiny_runs import CLASSES, SIZE, make_run

import insvp_jax
from insvp_jax import cli
from insvp_jax.data import preprocess
from insvp_jax.run import load_run
from insvp_jax.tools import (
  attribution,
  figure,
  plots,
  run_data,
  run_figures,
  run_files,
  tsne,
)


def write_metrics(run, losses, val=()):
  """Writes a run's metrics: a line each step, 10 steps an epoch, val after some."""
  lines = [
    {"step": i, "epoch": i / 10, "loss": loss, "lr": 0.1}
    for i, loss in enumerate(losses, 1)
  ]
  lines += [
    {"step": 10 * i, "val_loss": x, "val_accuracy": x / 4} for i, x in enumerate(val, 1)
  ]
  if val:
    lines.append({"step": 10 * len(val), "val_accuracy": val[-1] / 4})
  run.mkdir(parents=True, exist_ok=True)
  (run / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with a run of each of three methods, and photographs."""
  place = tmp_path_factory.mktemp("figures") / "runs"
  for method in ("insvp", "vpt_deep", "linear"):
    make_run(place / method, method)
    write_metrics(place / method, [2.0, 1.5], [1.0])
    result = {"test_accuracy": 0.5, "trainable_params": 100 * len(method)}
    (place / method / "result.json").write_text(json.dumps(result))
  (place / "photos").mkdir()
  rng = np.random.default_rng(0)
  for i in range(6):
    pixels = rng.integers(0, 256, (20, 14 + i, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(place / "photos" / f"{i}.png")
  return place


@pytest.fixture(scope="module", autouse=True)
def load():
  """Loads each run once, so that its programs are compiled once."""
  with pytest.MonkeyPatch.context() as patch:
    cached = functools.cache(load_run)
    patch.setattr(
      run_figures, "load_run", lambda path, backbone: cached(Path(path).resolve())
    )
    yield cached


def draw(place, capsys, kind, *flags, runs=("insvp",), suffix=".npz"):
  """Returns the content of the data file of a figure of the photographs."""
  output, data = place / f"{kind}.png", place / f"{kind}{suffix}"
  command = [f"--kind={kind}", f"--output={output}", f"--data={data}", *flags]
  assert figure.main([*command, *(f"--run={place / run}" for run in runs)]) == 0
  assert capsys.readouterr().out == f"wrote {output} and {data}\n"
  assert output.stat().st_size > 3000
  assert not list(place.glob(".*"))
  if suffix == ".npz":
    return dict(np.load(data, allow_pickle=False))
  with data.open() as file:
    return list(csv.reader(file))


def names_of(axis):
  return [text.get_text() for text in axis.get_texts()]


@pytest.mark.parametrize(
  ("kind", "compute"),
  [("gradcam", attribution.grad_cam), ("rollout", attribution.attention_rollout)],
)
def test_maps_of_runs_stand_side_by_side(place, load, capsys, kind, compute):
  runs = ("insvp", "vpt_deep")
  photos = sorted((place / "photos").iterdir())
  flags = ["--images", str(place / "photos"), "--num_images=3"]
  found = draw(place, capsys, kind, *flags, runs=runs)
  assert list(found["runs"]) == list(runs)
  for i, name in enumerate(runs):
    run = load(place / name)
    np.testing.assert_allclose(found[f"maps_{i}"], compute(run, photos[::2]), rtol=1e-5)
    pixels = run.to_pixels(run.preprocess(photos[::2]))
    np.testing.assert_allclose(found[f"images_{i}"], pixels, atol=1e-6)
    probabilities = run.predict(photos[::2])
    np.testing.assert_allclose(found[f"probabilities_{i}"], probabilities, rtol=1e-5)


def test_a_figure_shows_its_maps(place):
  paths = {"one": place / "insvp", "$two$": place / "vpt_deep"}
  photos = sorted((place / "photos").iterdir())[:2]
  request = run_figures.Request(paths, images=photos, class_name="$cat$")
  drawn = run_figures.draw_gradcam(request)
  *panels, bar = drawn.figure.axes
  assert [axis.get_title() for axis in panels] == ["image", "one", "$two$", "", "", ""]
  for row in range(2):
    for column in (1, 2):
      axis = panels[3 * row + column]
      values = drawn.data[f"maps_{column - 1}"][row]
      largest = max(values.max(), 1e-30)
      np.testing.assert_allclose(axis.images[1].get_array(), values / largest)
      share = drawn.data[f"probabilities_{column - 1}"][row, 2]
      assert axis.get_xlabel() == f"$cat$\n{100 * share:.0f}%"
  assert bar.get_xlabel() == "Grad-CAM, share of its maximum"
  assert drawn.figure.get_figwidth() == pytest.approx(plots.COLUMN_INCHES)


def test_images_of_the_task_go_to_runs_of_other_sizes(place, tmp_path, monkeypatch):
  # Of this preset, stored images are larger than what a model gets.
  make_run(tmp_path / "b", "linear", meta={"preset": "imagenet"})
  # This method puts a small image into a frame: the map is of both.
  make_run(tmp_path / "c", "autovp", backbone_kwargs={"depth": 2, "head_classes": 5})
  images = np.zeros((2, SIZE, SIZE, 3), np.uint8).view(preprocess.Resized)
  monkeypatch.setattr(
    run_data, "sample_images", lambda run, count, seed: (images[:count], ["a\nb", "c"])
  )
  request = run_figures.Request(
    {"a": place / "insvp", "b": tmp_path / "b", "c": tmp_path / "c"}, num_images=2
  )
  drawn = run_figures.draw_rollout(request)
  for i in range(3):
    assert drawn.data[f"maps_{i}"].shape == (2, 4, 4)
    assert drawn.data[f"images_{i}"].shape == (2, SIZE, SIZE, 3)
  assert load_run(tmp_path / "c").model.input_size < SIZE
  assert list(drawn.data["classes"]) == ["a\nb", "c"]


def test_prompts_are_those_of_visualize(place, load, capsys):
  found = draw(place, capsys, "prompts", "--images", str(place / "photos"))
  run = load(place / "insvp")
  photos = sorted((place / "photos").iterdir())
  for name in ("patch", "global", "image"):
    np.testing.assert_allclose(found[name], run.prompts(photos)[name], rtol=1e-5)
  np.testing.assert_allclose(found["prompted"], run.prompted(photos), rtol=1e-5)


@pytest.mark.parametrize("vectors", tsne.VECTORS)
def test_tsne_of_a_run(place, load, capsys, vectors):
  flags = ["--images", str(place / "photos"), f"--vectors={vectors}", "--seed=3"]
  titles, *rows = draw(place, capsys, "tsne", *flags, suffix=".csv")
  assert titles == ["image", "predicted_class", "x", "y"]
  run, photos = load(place / "insvp"), sorted((place / "photos").iterdir())
  points = tsne.tsne(tsne.vectors(run, photos, vectors), seed=3)
  assert [row[0] for row in rows] == [str(path) for path in photos]
  predicted = run.predict(photos).argmax(axis=1)
  assert [row[1] for row in rows] == [CLASSES[k] for k in predicted]
  # Bit by bit the same again.
  np.testing.assert_array_equal(np.array([row[2:] for row in rows], float), points)
  if vectors == "specific":
    prompts = run.prompts(photos)["specific"].reshape(6, -1)
    np.testing.assert_array_equal(tsne.vectors(run, photos, vectors), prompts)


def test_tsne_keeps_neighbours_together():
  rng = np.random.default_rng(0)
  labels = np.arange(40) % 2
  # However small the numbers are.
  vectors = 1e-6 * (rng.normal(size=(40, 8)) + 20 * labels[:, None]).astype(np.float32)
  points = tsne.tsne(vectors, seed=1)
  distances = np.linalg.norm(points[:, None] - points, axis=-1) + 1e9 * np.eye(40)
  assert np.all(labels[distances.argmin(axis=1)] == labels)
  for wrong, message in (
    (vectors[:4], "t-SNE of 4 images, expected at least 5"),
    (np.where(vectors == vectors[3, 3], np.inf, vectors), "not finite"),
    (np.ones((9, 3)), "all images are the same"),
  ):
    with pytest.raises(ValueError, match=message):
      tsne.tsne(wrong)
  with pytest.raises(ValueError, match="perplexity is 40, expected .* below 40"):
    tsne.tsne(vectors, perplexity=40)


@pytest.mark.parametrize("number", [1, 21, 200])
def test_classes_have_a_legend_as_far_as_it_tells_them_apart(number):
  labels = np.arange(2 * number) % number
  points = np.random.default_rng(0).normal(size=(2 * number, 2))
  names = [f"${i}$ {'long ' * 20}" for i in range(number)]
  drawn = plots.points_figure(points, labels, names, "x")
  (axis,) = drawn.axes
  shown = np.concatenate([line.get_xydata() for line in axis.lines])
  np.testing.assert_array_equal(shown, points[np.argsort(labels, kind="stable")])
  looks = {(str(line.get_color()), line.get_marker()) for line in axis.lines}
  assert len(looks) == number
  legends = [names_of(legend) for legend in drawn.legends]
  if number > plots.MAX_LABELS:
    assert not legends and f"{number} classes" in axis.get_title()
  else:
    assert [name.split()[0] for name in legends[0]] == [f"${i}$" for i in range(number)]
    assert all(plots.text_inches(name) < plots.COLUMN_INCHES for name in legends[0])
    assert not any(text.get_parse_math() for text in drawn.legends[0].get_texts())


def test_curves_of_runs_and_of_a_search(tmp_path, capsys):
  write_metrics(tmp_path / "run", [2 / i for i in range(1, 101)], [2.0, 1.5])
  write_metrics(tmp_path / "diverged", [1.0, None, None])
  row = {"method": "vpt_deep", "seeds": [3]}
  (tmp_path / "search").mkdir()
  (tmp_path / "search" / "summary.json").write_text(json.dumps({"$a$": row}))
  folder = run_files.first_final_run(tmp_path / "search", "$a$", row)
  write_metrics(folder, [3.0, 2.0])
  runs = [f"--run={tmp_path / name}" for name in ("run", "diverged", "search")]
  data = tmp_path / "x.csv"
  flags = ["--kind=curves", f"--output={tmp_path / 'x.pdf'}", f"--data={data}"]
  assert figure.main([*flags, *runs]) == 0
  note = f"note: {tmp_path / 'diverged'}: 2 numbers that are not finite are left out\n"
  assert capsys.readouterr().err == note
  assert (tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")
  with data.open() as file:
    titles, *rows = csv.reader(file)
  assert titles == ["run", "curve", "epoch", "value"]
  paths = {name: tmp_path / name for name in ("run", "diverged", "search")}
  axes = run_figures.draw_curves(run_figures.Request(paths)).figure.axes
  drawn = [np.asarray(line.get_xydata()) for axis in axes for line in axis.lines]
  # In the order of the figure: losses of all runs, then accuracies in percent.
  written = {}
  for label, kind, epoch, value in rows:
    scale = 100 if kind == "val_accuracy" else 1
    written.setdefault((kind == "val_accuracy", label, kind), []).append(
      (float(epoch), scale * float(value))
    )
  assert [key[1:] for key in written] == [
    *(("run", "loss"), ("run", "val_loss"), ("run", "val_accuracy")),
    *(("diverged", "loss"), ("search, $a$", "loss")),
  ]
  ordered = sorted(written, key=lambda key: key[0])
  for line, key in zip(drawn, ordered, strict=True):
    np.testing.assert_allclose(line, written[key])
  assert len(drawn[0]) == plots.NUM_POINTS
  # The line at the end repeats the last accuracy.
  np.testing.assert_allclose(written[True, "run", "val_accuracy"], [(1, 50), (2, 37.5)])


def test_parameters_against_accuracy(tmp_path, capsys):
  for name, accuracy, params in (("a", 0.5, 1000), ("$b$", 0.75, 90_000)):
    (tmp_path / name).mkdir()
    result = {"test_accuracy": accuracy, "trainable_params": params}
    (tmp_path / name / "result.json").write_text(json.dumps(result))
  rows = {
    "lora": {"mean": 0.7, "std": 0.02, "trainable_params": 3000},
    "diverged": {"mean": None, "std": None, "trainable_params": 3000},
    "nothing": {"mean": 0.1, "std": None, "trainable_params": 0},
  }
  (tmp_path / "search").mkdir()
  (tmp_path / "search" / "summary.json").write_text(json.dumps(rows))
  data = tmp_path / "x.csv"
  runs = [f"--run={tmp_path / name}" for name in ("a", "$b$", "search")]
  flags = ["--kind=parameters", f"--output={tmp_path / 'x.png'}", f"--data={data}"]
  assert figure.main([*flags, *runs, "--label", "A", "B", "C"]) == 0
  notes = capsys.readouterr().err.splitlines()
  assert [note.split(": ")[-1] for note in notes] == [
    "diverged has no test accuracy and is left out",
    "nothing has no trained parameters and is left out",
  ]
  assert data.read_text() == (
    "label,trainable_params,test_accuracy,std\n"
    "A,1000,0.5,\nB,90000,0.75,\nlora,3000,0.7,0.02\n"
  )


def test_labels_cover_neither_points_nor_each_other():
  rng = np.random.default_rng(0)
  trained = [
    plots.Trained(f"$method$ {i}", int(10 ** rng.uniform(3, 6)), rng.uniform(0.6, 0.8))
    for i in range(12)
  ]
  # Some of one size and accuracy.
  trained += [plots.Trained(f"same {i}", 10_000, 0.7, 0.01) for i in range(4)]
  drawn = plots.parameters_figure(trained)
  (axis,) = drawn.axes
  markers = [line for line in axis.lines if line.get_marker() in plots.MARKERS]
  points = np.array([line.get_xydata()[0] for line in markers])
  expected = [(point.params, 100 * point.accuracy) for point in trained]
  np.testing.assert_allclose(points, expected)
  notes = [text for text in axis.texts if text.get_text()]
  assert not any(text.get_parse_math() for text in notes)
  assert {text.get_text() for text in notes} == {point.label for point in trained}
  boxes = [text.get_window_extent().extents for text in notes]
  boxes += [np.tile(point, 2) for point in axis.transData.transform(points)]
  frame = axis.get_window_extent().extents
  for i, one in enumerate(boxes[: len(notes)]):
    assert np.all(one[:2] > frame[:2]) and np.all(one[2:] < frame[2:])
    for other in boxes[i + 1 :]:
      overlap = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
      assert np.any(overlap < 0)


def test_runs_are_called_by_what_tells_them_apart():
  assert run_figures.labels_of(["runs/a", "runs/b"]) == ["a", "b"]
  seeds = ["runs/$a$/seed0", "runs/b/seed0/"]
  assert run_figures.labels_of(seeds) == ["$a$/seed0", "b/seed0"]


def test_one_map_and_many_and_none_that_says_anything():
  def maps(number, value):
    return plots.Maps(
      np.zeros((number, 8, 8, 3)), np.full((number, 2, 2), value), ["100% x"] * number
    )

  drawn = plots.maps_figure({"a" * 99: maps(1, 0.0)}, [""])
  np.testing.assert_array_equal(drawn.axes[1].images[1].get_array(), np.zeros((2, 2)))
  assert len(drawn.axes[1].get_title()) < 20
  assert len(plots.maps_figure({"a": maps(50, 1.0)}, ["x"] * 50).axes) == 101
  with pytest.raises(ValueError, match="num_images is 101, expected 1 to 100"):
    plots.maps_figure({"a": maps(101, 1.0)}, ["x"] * 101)


def test_what_cannot_be_drawn_is_one_line(place, tmp_path, capsys):
  def error(kind, *flags, run="insvp"):
    given = [f"--kind={kind}", f"--run={place / run}", *flags]
    assert figure.main(given) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text

  photos = ["--images", str(place / "photos")]
  said = error("gradcam", "--vectors=specific")
  assert "--vectors is nothing to --kind=gradcam; it is of tsne." in said
  assert "--seed is nothing to --kind=curves; " in error("curves", "--seed=1")
  again = f"--run={place / 'vpt_deep'}"
  assert "--kind=tsne takes one --run, got 2; gradcam, " in error("tsne", again)
  assert "--kind=search takes one --run" in error("search", again)
  assert "is there twice" in error("curves", f"--run={place}/../{place.name}/insvp")
  assert "--label has 1 names for 2 runs" in error("curves", again, "--label", "x")
  assert "names two runs alike" in error("curves", again, "--label", "x", "x")
  assert "expected at least 1" in error("gradcam", "--num_images=0")
  assert "num_images is 101, expected 1 to 100" in error("gradcam", "--num_images=101")
  assert "--dpi is 9, expected 30 to 1200" in error("curves", "--dpi=9")
  assert "--seed is -1, expected 0 to" in error("tsne", "--seed=-1")
  assert "has to end with .npz" in error("rollout", "--data=x.csv")
  assert "has to end with .csv" in error("tsne", "--data=x.npz")
  assert "has to end with one of .png" in error("curves", "--output=x.txt")
  said = error("gradcam", "--class_name=cat", *photos)
  assert "no class 'cat'. Did you mean '$cat$'?" in said
  said = error("tsne", "--vectors=specific", *photos, run="vpt_deep")
  assert "'vpt_deep' makes no specific prompts" in said
  assert "makes no image prompts" in error("prompts", *photos, run="vpt_deep")
  assert "has no line of a training step" in error("curves", run="photos")
  assert "there is no" in error("parameters", run="photos")
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"st')
  assert "is damaged in line 2" in error("curves", run=tmp_path)
  (tmp_path / "metrics.jsonl").write_text("[1]\n")
  assert "is damaged in line 1: it has no step" in error("curves", run=tmp_path)
  with pytest.raises(ValueError, match="no run with trained parameters"):
    plots.parameters_figure([])
  many = {f"{i}": {} for i in range(plots.MAX_LABELS + 1)}
  with pytest.raises(ValueError, match="curves of 22 runs, expected at most 21"):
    plots.curves_figure(many)
  with pytest.raises(ValueError, match="no run has a finite loss"):
    plots.curves_figure({"a": {}})


def test_the_document_s_commands_and_its_snippet_run(
  root, place, load, capsys, monkeypatch
):
  def sample_images(run, count, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (8, SIZE, SIZE, 3), np.uint8)
    return images[:count], [CLASSES[i % 3] for i in range(min(count, 8))]

  monkeypatch.setattr(run_data, "sample_images", sample_images)
  monkeypatch.setattr(insvp_jax, "load_run", lambda path: load(place / Path(path).name))
  monkeypatch.chdir(place.parent)
  text = (root / "docs" / "figures.md").read_text()
  ran = set()
  for block in re.findall(r"```bash\n(.*?)```", text, re.S):
    for line in block.replace("\\\n", " ").splitlines():
      if (words := shlex.split(line))[1] == "figure":
        assert cli.main(words[1:]) == 0, line
        printed = capsys.readouterr().out.split()
        assert all(Path(word).is_file() for word in printed[1::2])
        ran.add(words[2])
  assert ran == {f"--kind={kind}" for kind in run_figures.KINDS} - {"--kind=prompts"}
  (snippet,) = re.findall(r"```python\n(.*?)```", text, re.S)
  scope = {}
  exec(snippet, scope)
  assert scope["maps"].shape == scope["shares"].shape == (3, 4, 4)


def test_without_matplotlib_no_run_is_read(capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  assert figure.main(["--kind=gradcam", "--run=nowhere"]) == 2
  assert "drawing needs matplotlib" in capsys.readouterr().err

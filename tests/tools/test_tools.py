import csv
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
import zipfile

import numpy as np
from PIL import Image
import pytest
from tiny_runs import CLASSES, SIZE, make_run

from insvp_jax import main, tools
from insvp_jax.config import defaults
from insvp_jax.logs import writers
from insvp_jax.run import load_run
from insvp_jax.tools import (
  evaluate,
  export,
  figure,
  meta_init,
  predict,
  prepare_data,
  run_data,
  visualize,
)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
  """Makes a run of a method, of a backbone that is traced in no time."""

  def make(method):
    # Of this preset, resized images would change if they were resized again.
    kwargs = {"meta": {"preset": "imagenet"}, "backbone_kwargs": {"depth": 1}}
    return make_run(tmp_path_factory.mktemp(method), method, **kwargs)[0]

  return make


@pytest.fixture(scope="module")
def workdir(make):
  """A run that has prompts to show."""
  return make("insvp")


@pytest.fixture(scope="module")
def linear(make):
  """A run for what is not about the method."""
  return make("linear")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  folder = tmp_path_factory.mktemp("photos")
  rng = np.random.default_rng(0)
  for i, size in enumerate([(20, 30), (12, 9), (SIZE, SIZE)]):
    pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{i}.png")
  return folder


def test_predict_prints_the_most_probable_classes(linear, photos, capsys):
  status = predict.main([f"--run={linear}", "--top=2", str(photos / "1.png")])
  out = capsys.readouterr().out.splitlines()
  assert status == 0
  row = load_run(linear).predict(photos / "1.png")[0]
  best = sorted(zip(row, CLASSES, strict=True), reverse=True)[:2]
  assert out == [str(photos / "1.png")] + [f"  {100 * p:5.1f}%  {c}" for p, c in best]


def test_predict_takes_folders_and_asks_for_no_more_classes_than_there_are(
  linear, photos, capsys
):
  assert predict.main([f"--run={linear}", str(photos)]) == 0
  out = capsys.readouterr().out.splitlines()
  assert len(out) == 3 * (1 + len(CLASSES))
  assert out[0] == str(photos / "0.png")


def _predicted(out):
  """Returns the paths that predictions were printed for."""
  return [line for line in out.splitlines() if not line.startswith("  ")]


def test_predict_finds_what_training_finds(linear, photos, tmp_path, capsys):
  data = (photos / "0.png").read_bytes()
  names = ["b/1.png", "a.jfif", "b/none", "b/\u732b.png"]
  others = {
    "._a.jfif": b"x",
    ".hidden/x.png": data,
    "__MACOSX/x.png": data,
    "n.txt": b"x",
  }
  for root in (tmp_path / "f", tmp_path / "g"):
    for name, content in {**dict.fromkeys(names, data), **others}.items():
      (root / name).parent.mkdir(parents=True, exist_ok=True)
      (root / name).write_bytes(content)
  (tmp_path / "f" / "linked").symlink_to(tmp_path / "g")
  (tmp_path / "f" / "loop").symlink_to(tmp_path)
  with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
    for name in sorted({*names, *others}):
      archive.write(tmp_path / "g" / name, name)
  expected = sorted(names, key=lambda name: name.split("/"))
  for root in (tmp_path / "g", tmp_path / "x.zip"):
    assert predict.main([f"--run={linear}", "--top=1", str(root)]) == 0
    captured = capsys.readouterr()
    assert _predicted(captured.out) == [f"{root}/{name}" for name in expected]
    line = "left out 1 hidden (.hidden/), 1 no image (n.txt)"
    assert captured.err == f"insvp_jax: {root}: {line}\n"
  assert predict.main([f"--run={linear}", "--top=1", str(tmp_path / "f")]) == 0
  captured = capsys.readouterr()
  # By way of the loop, g and the archive's neighbours once more.
  assert len(_predicted(captured.out)) == 3 * len(names)
  assert "1 behind a link to a folder around it (loop/f/)" in captured.err


def test_predict_expands_patterns_itself(linear, photos, tmp_path, monkeypatch, capsys):
  data = (photos / "0.png").read_bytes()
  names = ["a/1.png", "a/b/2.png", "a/b/c.txt", "d/3.png", "d[1]/4.png", "5.png"]
  for name in names:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(data)
  monkeypatch.chdir(tmp_path)

  def found(*patterns):
    return [str(image) for image in tools.find_images(patterns)]

  every = ["5.png", "a/1.png", "a/b/2.png", "d/3.png", "d[1]/4.png"]
  assert found("**/*.png") == every
  # A folder that matches comes with what is in it, once.
  assert found("a/**") == ["a/1.png", "a/b/2.png", "a/b/c.txt"]
  assert found("d*/*.png") == ["d/3.png", "d[1]/4.png"]
  # What is there under that name is no pattern.
  assert found("d[1]") == ["d[1]/4.png"]
  assert predict.main([f"--run={linear}", "--top=1", "**/*.png"]) == 0
  assert _predicted(capsys.readouterr().out) == every
  assert predict.main([f"--run={linear}", "x/**/*.jpg"]) == 2
  error = capsys.readouterr().err
  assert "no file or folder matches 'x/**/*.jpg'" in error and error.count("\n") == 1


def test_what_breaks_while_it_is_written_leaves_nothing(linear, photos, tmp_path):
  run, output = load_run(linear), tmp_path / "out.csv"
  output.write_text("before")

  def rows():
    yield from [("a.png", next(iter(predict.top_classes(run, [photos / "0.png"]))))]
    # The first piece is in the file already, not in memory.
    (partial,) = tmp_path.glob(".out.csv*")
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    writers.write_text(output, predict.FORMATS["csv"](rows()))
  assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]
  assert output.read_text() == "before"


def test_a_file_that_cannot_be_read_costs_no_others(
  linear, photos, tmp_path, monkeypatch, capsys
):
  for name in ("0.png", "1.png"):
    shutil.copy(photos / name, tmp_path / name)

  def decoded(image, options=None, decoded=tools.ImageFile.decoded):
    if image.name == "0.png":
      raise PermissionError(13, "Permission denied", str(image))
    return decoded(image, options)

  monkeypatch.setattr(tools.ImageFile, "decoded", decoded)
  assert predict.main([f"--run={linear}", "--top=1", str(tmp_path)]) == 2
  captured = capsys.readouterr()
  assert _predicted(captured.out) == [str(tmp_path / "1.png")]
  first, last = captured.err.splitlines()
  assert "Permission denied" in first and "0.png" in first
  assert last.startswith("insvp_jax: 1 of 2 images have no prediction")


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("archive", [False, True])
def test_broken_photos_cost_no_others(linear, photos, tmp_path, capsys, archive, skip):
  data = (photos / "0.png").read_bytes()
  content = {f"{i:02d}.png": data for i in range(40)}
  content |= {"07.png": data[:60], "33.png": b"", "39.png": b"no image"}
  root = tmp_path / ("x.zip" if archive else "x")
  if archive:
    with zipfile.ZipFile(root, "w") as file:
      for name, data in content.items():
        file.writestr(name, data)
  else:
    root.mkdir()
    for name, data in content.items():
      (root / name).write_bytes(data)
  arguments = [f"--run={linear}", "--top=1", *["--skip_corrupt"] * skip, str(root)]
  assert predict.main(arguments) == (0 if skip else 2)
  captured = capsys.readouterr()
  broken = ("07.png", "33.png", "39.png")
  predicted = [f"{root}/{name}" for name in content if name not in broken]
  assert _predicted(captured.out) == predicted
  lines = captured.err.splitlines()
  for name, line in zip(broken, lines, strict=False):
    assert line.startswith(f"insvp_jax: {root}/{name} ")
  assert len(lines) == 4 and lines[-1].startswith("insvp_jax: 3 of 40 images ")


@pytest.mark.parametrize("to_file", [False, True])
def test_predict_writes_tables_for_other_programs(
  linear, photos, tmp_path, capsys, to_file
):
  output = [f"--output={tmp_path / 'out'}"] if to_file else []

  def text(form):
    flags = [f"--run={linear}", "--top=2", "--batch=2", f"--format={form}", *output]
    assert predict.main([*flags, str(photos)]) == 0
    printed = capsys.readouterr().out
    assert not (printed and to_file)
    return (tmp_path / "out").read_text() if to_file else printed

  rows = load_run(linear).predict([photos / f"{i}.png" for i in range(3)])
  expected = []
  for i, row in enumerate(rows):
    best = row.argsort()[::-1][:2]
    classes = [(CLASSES[j], pytest.approx(row[j], rel=1e-5)) for j in best]
    expected.append((str(photos / f"{i}.png"), classes))
  found = json.loads(text("json"))
  pairs = [[(c["class"], c["probability"]) for c in each["classes"]] for each in found]
  assert [(each["image"], p) for each, p in zip(found, pairs, strict=True)] == expected
  titles, *lines = csv.reader(text("csv").splitlines())
  assert titles == ["image", "rank", "class", "probability"]
  flat = [
    (path, rank, name, probability)
    for path, classes in expected
    for rank, (name, probability) in enumerate(classes, 1)
  ]
  assert [(p, int(r), n, float(x)) for p, r, n, x in lines] == flat
  assert len(text("table").splitlines()) == 3 * 3


def test_predict_of_broken_images_alone_is_an_empty_list(linear, tmp_path, capsys):
  for name in ("a.png", "b.png"):
    (tmp_path / name).write_bytes(b"no image")
  paths = [str(tmp_path / name) for name in ("a.png", "b.png")]
  flags = [f"--run={linear}", "--format=json", "--skip_corrupt"]
  assert predict.main([*flags, *paths]) == 0
  assert json.loads(capsys.readouterr().out) == []


def test_predictions_are_those_of_the_whole_images(workdir, photos, capsys):
  assert predict.main([f"--run={workdir}", "--top=1", str(photos)]) == 0
  out = capsys.readouterr().out.splitlines()[1::2]
  run = load_run(workdir)
  rows = run.predict([photos / f"{i}.png" for i in range(3)])
  assert out == [f"  {100 * r.max():5.1f}%  {CLASSES[r.argmax()]}" for r in rows]
  # What the tools find can be given to a run as it is.
  found = tools.find_images([str(photos)])
  np.testing.assert_array_equal(run.predict(found), rows)


def test_predict_runs_as_a_module(linear, photos, root):
  command = [sys.executable, "-m", "insvp_jax.tools.predict"]
  done = subprocess.run(
    [*command, f"--run={linear}", str(photos / "2.png")],
    cwd=root,
    capture_output=True,
    text=True,
  )
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout.count("%") == len(CLASSES)


@pytest.mark.parametrize(
  "arguments, line",
  [
    (["--run={run}", "{photos}/no.png"], "there is no image file or folder"),
    (["--run={run}", "{photos}/bad.jpg"], "bad.jpg is not an image of a known"),
    (["--run={run}", "{photos}/empty"], "holds no image (.jpg"),
    (["--run={run}", "{photos}/bad.zip"], "bad.zip is no readable zip archive"),
    (["--run={run}", "{photos}/pipe.png"], "pipe.png is no regular file"),
    (["--run={photos}", "{photos}/0.png"], "is no run and holds none: expected"),
    (["--run={run}/no", "{photos}/0.png"], "there is no run at"),
    (["--run={run}", "--top=0", "{photos}/0.png"], "--top is 0, expected at least 1"),
    (["--run={run}", "--batch=0", "{photos}/0.png"], "--batch is 0, expected a number"),
    (["--run={run}", "--backbone=no.npz", "{photos}/0.png"], "no.npz"),
  ],
)
def test_bad_input_is_one_line_and_status_2(
  linear, photos, tmp_path, capsys, arguments, line
):
  for path in photos.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  (tmp_path / "bad.jpg").write_text("no image")
  (tmp_path / "bad.zip").write_text("no archive")
  os.mkfifo(tmp_path / "pipe.png")
  (tmp_path / "empty").mkdir()
  status = predict.main([a.format(run=linear, photos=tmp_path) for a in arguments])
  captured = capsys.readouterr()
  assert status == 2
  assert captured.out == ""
  assert captured.err.startswith("insvp_jax: ") and line in captured.err
  assert captured.err.count("\n") == 1


def test_of_a_folder_of_runs_the_runs_are_listed(workdir, photos, tmp_path, capsys):
  shutil.copytree(workdir, tmp_path / "insvp")
  assert predict.main([f"--run={tmp_path}", str(photos / "0.png")]) == 2
  first, *others = capsys.readouterr().err.splitlines()
  assert first.startswith(f"insvp_jax: {tmp_path} is no run, but holds ")
  assert f"  {tmp_path / 'insvp'}: insects, insvp, test accuracy 50.00%" in others


TOOLS = {
  "predict": predict,
  "evaluate": evaluate,
  "visualize": visualize,
  "figure": figure,
  "export": export,
  "meta_init": meta_init,
  "prepare": prepare_data,
}


@pytest.mark.parametrize("command", TOOLS)
def test_wrong_flags_are_status_2(command, capsys):
  tool = TOOLS[command]
  # The command that was typed, or else what works everywhere.
  for prog, said in (
    (f"insvp {command}", f"insvp {command}"),
    (None, f"python -m {tool.__name__}"),
  ):
    with pytest.raises(SystemExit) as stop:
      tool.main(["--rum=x"], prog=prog)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"usage: {said} ") and f"\n{said}: error: " in error


@pytest.mark.parametrize("command", TOOLS)
def test_the_examples_of_a_tool_are_commands_that_it_takes(command, capsys):
  examples = re.findall(rf"^insvp {command} (.*)", TOOLS[command].__doc__, re.M)
  assert examples
  with pytest.raises(SystemExit):
    TOOLS[command].main(["--help"])
  known = capsys.readouterr().out
  for example in examples:
    words = shlex.split(example, comments=True)
    for flag in (word.split("=")[0] for word in words if word.startswith("--")):
      assert f"{flag} " in known or f"{flag}\n" in known or f"{flag}]" in known


def test_a_bug_keeps_its_traceback():
  with pytest.raises(ValueError, match="invalid literal"):
    tools.run_tool(lambda: int("x"))
  assert tools.run_tool(lambda: None) == 0


def test_visualize_writes_a_picture_of_every_prompt(workdir, photos, tmp_path, capsys):
  output = tmp_path / "new" / "prompts.png"
  arguments = [f"--run={workdir}", "--images", str(photos), f"--output={output}"]
  assert visualize.main([*arguments, "--rows=2"]) == 0
  assert capsys.readouterr().out == f"wrote {output}\n"
  assert [path.name for path in output.parent.iterdir()] == ["prompts.png"]
  with Image.open(output) as image:
    pixels = np.asarray(image.convert("RGB"))
  # Two rows of five panels, none of them blank.
  height, width = pixels.shape[:2]
  for i in range(2):
    for j in range(5):
      y, x = int(height * (i + 0.55) / 2), int(width * (j + 0.5) / 5)
      panel = pixels[y - 30 : y + 30, x - 30 : x + 30]
      assert panel.std() > 5, (i, j)


def test_figure_shows_what_the_run_computes(workdir, photos):
  run = load_run(workdir)
  paths = [photos / "0.png", photos / "2.png"]
  figure = visualize.prompt_figure(run, paths, labels=["bee", "$cat$"])
  titles = [axis.get_title() for axis in figure.axes[:5]]
  prompts = ["patch prompt", "global prompt", "fused prompt"]
  assert titles == ["image", *prompts, "prompted image"]
  shown = [axis.images[0].get_array() for axis in figure.axes]
  prompt = run.prompts(paths)["global"][1] * np.asarray(run.preset.std)
  expected = 0.5 + prompt / (2 * np.abs(prompt).max())
  np.testing.assert_allclose(shown[7], expected, atol=1e-4)
  prompted = run.prompted(paths)[1] * run.preset.std + np.asarray(run.preset.mean)
  prompted = np.clip(prompted, 0, 1)
  np.testing.assert_allclose(shown[9], prompted, atol=1e-6)
  best = CLASSES[run.predict(paths)[1].argmax()]
  label = figure.axes[5].get_ylabel()
  assert label.startswith(best) and label.endswith("(is $cat$)")


def test_without_images_the_task_is_shown(workdir, tmp_path):
  # The run says that it is of the digits, whose preset and splits it names.
  run = dataclasses.replace(load_run(workdir), class_names=tuple("0123456789"))
  data = {"preset": "vtab", "split_seed": 0}
  run.meta["config"]["data"] = data
  images, labels = run_data.sample_images(run, 4)
  assert images.shape == (4, SIZE, SIZE, 3) and images.dtype == np.uint8
  assert set(labels) <= set("0123456789")
  again, _ = run_data.sample_images(run, 4)
  np.testing.assert_array_equal(images, again)
  output = tmp_path / "digits.pdf"
  visualize.save_figure(visualize.prompt_figure(run, images, labels=labels), output)
  assert output.read_bytes().startswith(b"%PDF")


def test_without_matplotlib_nothing_is_computed(
  workdir, photos, tmp_path, monkeypatch, capsys
):
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  line = "drawing needs matplotlib: pip install 'insvp_jax[plots]'"
  # The run is not even looked for.
  assert visualize.main(["--run=nowhere"]) == 2
  assert capsys.readouterr().err == f"insvp_jax: {line}\n"
  with pytest.raises(ValueError, match="^drawing needs matplotlib"):
    visualize.draw(load_run(workdir), tmp_path / "a.png", images=[photos / "0.png"])


def test_visualize_refuses_what_it_cannot_draw(
  workdir, linear, photos, tmp_path, capsys
):
  arguments = ["--images", str(photos)]
  assert visualize.main([f"--run={linear}", *arguments]) == 2
  assert "'linear' makes no image prompts" in capsys.readouterr().err
  arguments += [f"--run={workdir}"]
  assert visualize.main([*arguments, "--output=prompts.txt"]) == 2
  assert "has to end with one of .png" in capsys.readouterr().err
  assert visualize.main([*arguments, "--rows=0"]) == 2
  (tmp_path / "file").write_text("")
  assert visualize.main([*arguments, f"--output={tmp_path}/file/a.png"]) == 2
  assert capsys.readouterr().err.count("\n") == 2


def test_a_run_without_image_prompts_ends_without_a_picture(tmp_path, monkeypatch):
  off = {f"use_{name}": False for name in ("patch", "global", "specific")}
  without = make_run(tmp_path, method_kwargs={"prompt_length": 2, **off})[0]
  assert visualize.image_prompts(load_run(without)) == []
  config = defaults()
  config.prompt_images = 1
  config.insvp.update(off)
  (without / "config.json").write_text(json.dumps({"method": "insvp", "insvp": off}))
  monkeypatch.setattr(main, "_MODE", types.SimpleNamespace(value="train"))
  said = main._draw_prompts(config, without)
  assert said == "none: no run of InsVP has image prompts to draw"


def test_spread_takes_from_everywhere():
  assert visualize.evenly_spaced(list(range(10)), 3) == [0, 3, 6]
  assert visualize.evenly_spaced([1, 2], 5) == [1, 2]
  assert visualize.evenly_spaced([], 5) == []


def test_16_bit_images_are_read_as_in_training(linear, tmp_path, capsys):
  values = np.random.default_rng(0).integers(0, 4096, (SIZE, SIZE)).astype(np.uint16)
  for name, scale in (("raw", 1), ("full", 16)):
    Image.fromarray(values * np.uint16(scale)).save(tmp_path / f"{name}.png")
  run = load_run(linear)
  paths = [str(tmp_path / "raw.png"), str(tmp_path / "full.png")]
  raw, full = run.preprocess(paths)
  assert np.abs(raw - full).max() > 0.5
  data = {**run.meta["config"].get("data", {}), "max_16bit": 4095}
  meta = {**run.meta, "config": {**run.meta["config"], "data": data}}
  told = dataclasses.replace(run, meta=meta)
  np.testing.assert_allclose(told.preprocess(paths[:1])[0], full, atol=0.02)
  (image,) = tools.find_images(paths[:1])
  np.testing.assert_array_equal(told.preprocess([image]), told.preprocess(paths[:1]))
  assert predict.main([f"--run={linear}", paths[0]]) == 0
  assert "set config.data.max_16bit=4095" in capsys.readouterr().err


def test_a_reader_that_has_enough_is_no_error(root):
  code = (
    "import sys; from insvp_jax import tools; "
    "sys.exit(tools.run_tool(lambda: print('x\\n' * 100_000)))"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", code],
    cwd=root,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  process.stdout.close()
  assert process.stderr.read() == b""
  process.stderr.close()
  assert process.wait() == 141

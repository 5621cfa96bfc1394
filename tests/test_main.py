"""The command line: exit statuses, one clear line for bad input, signals."""

import hashlib
import json
import os
from pathlib import Path
import re
import shutil
import signal
import subprocess
import sys
import time

from main_driver import Driver
from markdown_table import cells
import pytest
from tiny_commands import base_flags, flags_of, make_place
from tiny_training import CLASSES, SPLITS

from insvp_jax import config as config_lib
from insvp_jax import main as main_lib
from insvp_jax.distributed import lock
from insvp_jax.run import load_run

LONG = 600  # steps: long enough to be stopped, short enough to be finished


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with images/ and two backbones."""
  return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def base(root, place):
  """The flags of a small run of configs/folder.py, without a workdir."""
  return base_flags(root, place)


@pytest.fixture(scope="module")
def main(root, tmp_path_factory):
  """Runs the command line with some arguments: (status, out, err)."""
  cwd = tmp_path_factory.mktemp("cwd")
  with Driver(cwd) as driver:
    yield driver.run
  assert not list(cwd.iterdir()), "a run wrote outside of its workdir"


@pytest.fixture(scope="module")
def finished(main, base, tmp_path_factory):
  """The workdir of a run that has finished."""
  workdir = tmp_path_factory.mktemp("finished")
  done = main(*base, f"--workdir={workdir}")
  assert done.status == 0, done.err
  return workdir


def contents(workdir):
  """Returns {file: digest} of a workdir."""
  return {
    str(path.relative_to(workdir)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in workdir.rglob("*")
    if path.is_file()
  }


def assert_one_line(done, *parts):
  assert done.status == 2, done.err
  assert done.out == ""
  assert done.err.startswith("insvp_jax: ") and done.err.count("\n") == 1, done.err
  for part in parts:
    assert part in done.err


def test_a_run_ends_with_its_result(main, base, finished):
  result = json.loads((finished / "result.json").read_text())
  assert (result["steps"], result["num_test_examples"]) == (3, SPLITS["test"])
  again = main(*base, f"--workdir={finished}")
  assert again.status == 0
  assert again.out.startswith(
    f"images vpt_deep: val {100 * result['val_accuracy']:.2f}%, "
    f"test {100 * result['test_accuracy']:.2f}%; "
  )
  assert again.out.splitlines()[1:] == [
    f"runs     {finished}",
    "logs     metrics.jsonl of each run",
    f"next     python -m insvp_jax.tools.predict --run={finished} IMAGES",
  ]
  assert "resumed at step 3 of 3" in again.err
  assert load_run(finished).class_names == CLASSES


UNKNOWN = "unknown config key "


@pytest.mark.parametrize(
  "flags, parts",
  [
    (["--config.optim.lrr=1"], [f"{UNKNOWN}'optim.lrr'", "Did you mean 'optim.lr'?"]),
    (["--config.insvp.patch=1"], [f"{UNKNOWN}'insvp.patch'"]),
    (["--config.sead=1"], [f"{UNKNOWN}'sead'", "Did you mean 'seed'?"]),
    (["--noconfig.tensorbord"], [f"{UNKNOWN}'tensorbord'"]),
    (["--config.method=insvpp"], ["unknown method 'insvpp'. Nearest: insvp, "]),
    (["--config.backbone.name=mo/4"], ["unknown ViT variant 'mo'"]),
    (["--config.backbone.name=boxd"], ["unknown backbone 'boxd'. Nearest: boxed, "]),
    (["--config.data.preset=vtap"], ["unknown preset 'vtap'. Did you mean 'vtab'?"]),
    (["--config.task=foldr"], ["unknown task 'foldr'. Nearest: folder, "]),
    (["--config.batch_size=abc"], ["--config.batch_size=abc", "'abc'"]),
    (["--config.batch_size=2.5"], ["--config.batch_size=2.5"]),
    (["--config.optim.lr=high"], ["--config.optim.lr=high"]),
    (["--config.keep_checkpoints=0"], ["config.keep_checkpoints is 0, expected at l"]),
    (["--profile=10"], ["config.profile is '10', expected", "e.g. '10:15'"]),
    (["--profile=2:9"], ["config.profile is '2:9', but the run has only 3 steps"]),
    (["--join_timeout=0"], ["--join_timeout is 0, expected at least 1 second"]),
    ([f"--lost_timeout={2**70}"], ["--lost_timeout is 11805", "at most 31,536,000"]),
    ([f"--config.seed={2**70}"], ["config.seed is 11805", "in [0, 4294967295]"]),
    (["--config.seed=-1"], ["config.seed is -1, expected in [0, 4294967295]"]),
    ([f"--config.tune.seeds=({2**32},)"], ["config.tune.seeds has 4294967296"]),
    ([f"--config.total_steps={2**31}"], ["config.total_steps is 2147483648, exp"]),
    (["--config.total_steps=0", "--config.total_epochs=1e30"], ["6e+30 steps"]),
    (["--config.optim.lr=1e-60"], ["config.optim.lr is 1e-60", "in float32"]),
    (["--lost_timeout=x"], ["--lost_timeout=x"]),
    (["--config.tune.lr=abc"], ["config.tune.lr has 'abc', expected numbers"]),
    (["--config.vpt_deep.prompt_length=0"], ["prompt_length is 0, expected"]),
    (["--config.backbone.pool=x"], ["pool is 'x', expected one of"]),
    (["--config.backbone.width=15"], ["15"]),
    (["--config.loss.label_smoothing=2"], ["label_smoothing is 2.0, expected in"]),
    (["--config.optim.no_decay=('[',)"], ["config.optim.no_decay has '['"]),
    (["--config.optim.no_decay=('hed/.*',)"], ["'hed/.*' matches no parameter"]),
    (["--config.optim.name=adam"], ["unknown optimizer 'adam'. Did you mean 'adamw'"]),
    (["--config.optim.warmup_steps=3"], ["the warm-up takes 3 of the run's 3 upd"]),
    (["--config.total_epochs=inf"], ["config.total_epochs is inf"]),
    (["--config.batch_size=400"], ["only 24 images; lower it to at most 24"]),
    (["--mode=tuned"], ["mode", "tuned", "auto|train|tune"]),
    (["--config.tune.select=test"], ["tune.select is 'test', expected 'val'", "never"]),
    (["--config.tune.population=-1"], ["config.tune.population is -1"]),
    (
      ["--config.tune.grid.dropuot=(0.1,)"],
      [f"{UNKNOWN}'tune.grid.dropuot'", "Did you mean 'tune.grid.dropout'?"],
    ),
    (
      ["--mode=tune", "--config.tune.grid.prompt_dropout=(0.1,)"],
      ["grid.prompt_dropout is no hparam of vpt_deep. Did you mean 'dropout'?"],
    ),
    (["--mode=tune", "--config.tune.grid.dropout=(2.0,)"], ["dropout is 2.0"]),
    (
      ["--mode=tune", "--config.method=bias", "--config.optim.name=sgd"],
      ["the grid is empty", "'bias'", "'sgd'", '--config.tune.lr="(0.001, 0.01)"'],
    ),
    (["--workdirr=x"], ["Unknown command line flag 'workdirr'", "workdir"]),
    (["out"], ["unexpected argument 'out'"]),
    (["--workdir=gs://bucket/run"], ["gs://bucket/run, a URL; expected a folder"]),
  ],
)
def test_a_wrong_flag_is_one_line(main, base, tmp_path, flags, parts):
  done = main(*base, f"--workdir={tmp_path / 'run'}", *flags)
  assert_one_line(done, *parts)
  assert not list(tmp_path.iterdir())


def test_no_config_or_a_wrong_one_is_one_line(main, root, tmp_path):
  vtab, folder = root / "configs" / "vtab.py", root / "configs" / "folder.py"
  typo = tmp_path / "typo.py"
  source = (
    "from insvp_jax.config import defaults\ndef get_config():\n  c = defaults()\n"
  )
  typo.write_text(f"{source}  c.optim.lrr = 1\n  return c\n")
  kind = tmp_path / "kind.py"
  kind.write_text(f"{source}  c.optim.lr = 'high'\n  return c\n")
  workdir = f"--workdir={tmp_path / 'run'}"
  for flags, parts in (
    ([], ["no config; give one, e.g. --config=quickstart"]),
    (["--config=no.py"], ["there is no config file no.py"]),
    (["--config=no.py", "--config.seed=1"], ["there is no config file no.py"]),
    ([f"--config={vtab}:tsk=x"], ["'tsk=x' after the colon", "Did you mean 'task'?"]),
    ([f"--config={folder}:a=x"], [f"{folder}:a=x", "'a=x' after the colon"]),
    (["--config=vtba"], ["there is no config file vtba", "Did you mean 'vtab'?"]),
    (["--config=folder:method=linaer"], ["unknown method 'linaer'. Nearest: linear, "]),
    (["--config", "folder:seed=x"], ["seed is 'x', expected a whole number"]),
    (["--mode=eval"], ["evaluated by a tool: insvp evaluate --run="]),
    (
      ["--config=folder", "--config.method=linear", "--config.tune.methods=('bias',)"],
      ["both --config.method and --config.tune.methods were given"],
    ),
    ([f"--config={typo}"], ['Key "lrr" does not exist', 'Did you mean "lr"']),
    ([f"--config={kind}"], ["'lr'", "high", "float"]),
    ([f"--config={tmp_path}"], [f"there is no config file {tmp_path}"]),
  ):
    assert_one_line(main(workdir, *flags), *parts)
  assert {path.name for path in tmp_path.iterdir()} == {"typo.py", "kind.py"}


GET = "def get_config(arg=''):\n"
MISTAKES = {
  "syntax": ("x = (\n" + GET, ["mistake.py, line 1: no Python: '(' was never closed"]),
  "indent": (f"{GET}return 1\n", ["mistake.py, line 2: no Python: expected an indent"]),
  "binary": (b"\x7fELF\x00\x01\x02", ["mistake.py", "null bytes"]),
  "png": (b"\x89PNG\r\n\x1a\n\x00", ["mistake.py"]),
  "latin-1": ("x = 'Gr\u00fc\u00dfe'\n".encode("latin-1"), ["mistake.py", "utf-8"]),
  "utf-16": (f"{GET}  return 1\n".encode("utf-16"), ["mistake.py"]),
  "empty": ("", ["mistake.py has no function get_config"]),
  "not a function": ("get_config = 3\n", ["mistake.py has no function get_config"]),
  "large": (b"#" * 2**21, ["mistake.py has 2,097,152 bytes"]),
  "argument": (
    f"{GET}  from insvp_jax.config import parse_arg\n  return parse_arg('tsk=x')\n",
    ["mistake.py, line 3: 'tsk=x' after the colon"],
  ),
  "name": (f"{GET}  return defaults()\n", ["mistake.py, line 2: NameError: name 'def"]),
  "import": ("\nimport no_such\n", ["mistake.py, line 2: ModuleNotFoundError: No mod"]),
  "assert": (f"{GET}\n  assert arg\n", ["mistake.py, line 3: AssertionError\n"]),
  "os": (f"{GET}  open('no such')\n", ["mistake.py, line 2: FileNotFoundError: "]),
  "exit": (f"import sys\n{GET}  sys.exit(3)\n", ["mistake.py, line 3: SystemExit: 3"]),
  "recursion": (f"{GET}  return get_config()\n", ["mistake.py, line 2: RecursionE"]),
  "two lines": (f"{GET}  raise ValueError('a\\nb')\n", ["line 2: ValueError: a b\n"]),
  "dict": (
    f"{GET}  return dict(seed=1)\n",
    ["mistake.py returns a dict, expected a C"],
  ),
  "none": (f"{GET}  pass\n", ["mistake.py returns None, expected a ConfigDict; start"]),
  "class": (f"{GET}  return object\n", ["mistake.py returns a type, expected a Conf"]),
  "no argument": (
    "def get_config():\n  pass\n",
    ["mistake.py: TypeError: get_config()"],
  ),
  "keys": (
    f"from ml_collections import ConfigDict\n{GET}  return ConfigDict(dict(seed=1))\n",
    [
      "mistake.py: the config lacks adapter.",
      " more; start it from insvp_jax",
    ],
  ),
}


@pytest.mark.parametrize("how", MISTAKES)
def test_a_mistake_in_a_config_file_is_one_line_with_its_place(main, tmp_path, how):
  source, parts = MISTAKES[how]
  path = tmp_path / "mistake.py"
  path.write_bytes(source if isinstance(source, bytes) else source.encode())
  arg = ":x" if how == "no argument" else ""
  flags = [f"--config={path}{arg}", f"--workdir={tmp_path / 'run'}"]
  assert_one_line(main(*flags), str(path), *parts)
  # Also where the flags go on to change the config.
  assert_one_line(main(*flags, "--config.seed=1"), str(path), *parts)
  done = main(*flags, "--traceback")
  assert done.status == 1 and done.err.startswith("Traceback")
  assert [p.name for p in tmp_path.iterdir()] == ["mistake.py"]


def test_a_config_that_is_none_is_one_line(main, tmp_path):
  (tmp_path / "folder").mkdir()
  for flags, part in (
    (
      ["--config="],
      "--config is empty; give a file, or one of the names ablation, cif",
    ),
    (["--config"], "--config is empty"),
    (["--config=:root=x"], "--config is empty"),
    ([f"--config={tmp_path / 'folder'}"], "folder, that is a folder; --config wants"),
    (["--config=/dev/zero"], "there is no config file /dev/zero; --config wants"),
  ):
    assert_one_line(main(*flags), part)


def test_print_config_prints_every_key_and_trains_nothing(main, base, tmp_path):
  workdir = tmp_path / "run"
  # Also where the config could not be trained with.
  done = main(*base, f"--workdir={workdir}", "--config.seed=-7", "--print_config")
  assert done.status == 0 and done.err == "" and not workdir.exists()
  lines = dict(line.split(" = ", 1) for line in done.out.splitlines())
  assert lines["config.seed"].split(None, 2)[:2] == ["-7", "#"]
  assert lines["config.vpt_deep.dropout"].endswith("each sample; None: 0.1")
  assert lines["config.tune.grid.dropout"].startswith("()")


def test_help_fits_a_screen_and_names_every_flag(main):
  done = main("--help")
  assert done.status == 0 and done.err == ""
  lines = done.out.splitlines()
  assert len(lines) <= 40 and max(map(len, lines)) <= 90
  for name in ("config", "workdir", "mode", "plan", "profile", "print_config"):
    assert f"  --{name} " in done.out


def test_a_key_holds_beside_the_list_of_a_search(main):
  done = main(
    "--config=configs/folder.py:root=x,seed=5",
    "--config.method=linear",
    "--config.optim.lr=0.5",
    "--print_config",
  )
  assert done.status == 0, done.err
  lines = dict(line.split(" = ", 1) for line in done.out.splitlines())
  values = {name: line.split("  ")[0] for name, line in lines.items()}
  assert values["config.tune.methods"] == "('linear',)"
  assert values["config.tune.lr"] == "(0.5,)"
  assert values["config.tune.seeds"] == "(5,)" and values["config.seed"] == "5"
  assert values["config.data.root"] == "'x'"


def test_traceback_shows_where_an_input_error_comes_from(main, base, tmp_path):
  flags = [f"--workdir={tmp_path / 'run'}", "--config.method=insvpp", "--traceback"]
  done = main(*base, *flags)
  assert done.status == 1
  assert done.err.startswith("Traceback") and "ValueError: unknown method" in done.err


def test_a_batch_that_the_devices_cannot_share_is_one_line(main, base, tmp_path):
  flags = os.environ.get("XLA_FLAGS", "")
  four = {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=4"}
  flags = [f"--workdir={tmp_path / 'run'}", "--config.batch_size=6"]
  done = main(*base, *flags, env=four)
  assert_one_line(done, "batch_size is 6", "over 4 devices. Use 4 or 8.")
  assert not list(tmp_path.iterdir())


def broken_images(images, tmp_path, how):
  """Returns (root, what the message has to name) of images that are of no use."""
  folder = tmp_path / "images"
  if how == "missing":
    return folder, ["no ", str(folder), "expected a folder or a .zip"]
  if how == "loop":
    folder.symlink_to(folder)
    return folder, [str(folder), "expected a folder or a .zip"]
  if how == "not a zip":
    folder = tmp_path / "images.zip"
    folder.write_text("no archive")
    return folder, [str(folder), "no readable zip archive"]
  if how == "truncated zip":
    archive = shutil.make_archive(str(folder), "zip", images)
    os.truncate(archive, os.path.getsize(archive) // 2)
    return archive, [archive, "no readable zip archive"]
  shutil.copytree(images, folder)
  bee = folder / "train" / "bee"
  if how == "empty folder":
    shutil.rmtree(folder)
    folder.mkdir()
    return folder, ["no class folders", str(folder)]
  if how == "class without images":
    (folder / "train" / "elk").mkdir()
    return folder, ["the class 'elk' of train has no images"]
  if how == "corrupt image":
    os.truncate(bee / "01.png", 60)
    return folder, [str(bee / "01.png"), "does not decode", "config.data.skip_corrupt"]
  if how == "empty image":
    (bee / "04.png").write_bytes(b"")
    return folder, [str(bee / "04.png"), "is empty", "config.data.skip_corrupt"]
  if how == "not an image":
    (folder / "test" / "ant" / "x.jpg").write_text("hello")
    return folder, [str(folder / "test" / "ant" / "x.jpg"), "is not an image"]
  (folder / "val" / "bee").rename(folder / "val" / "bees")
  return folder, ["val of", "'bees'. Did you mean 'bee'?", "alike in all splits"]


@pytest.mark.parametrize(
  "how",
  [
    "missing",
    "loop",
    "not a zip",
    "truncated zip",
    "empty folder",
    "class without images",
    "corrupt image",
    "empty image",
    "not an image",
    "other labels",
  ],
)
def test_images_of_no_use_are_one_line(main, base, place, tmp_path, how):
  images, parts = broken_images(place / "images", tmp_path, how)
  workdir = tmp_path / "run"
  done = main(*base, f"--workdir={workdir}", f"--config.data.root={images}")
  assert_one_line(done, *parts)
  assert not workdir.exists()


def test_no_root_is_one_line(main, base, tmp_path):
  done = main(*base, f"--workdir={tmp_path / 'run'}", "--config.data.root=")
  assert_one_line(done, "config.data.root is empty", "--config.data.root=path/to")


def test_corrupt_images_are_skipped_and_counted_where_asked(
  main, base, place, tmp_path
):
  images, _ = broken_images(place / "images", tmp_path, "corrupt image")
  workdir = tmp_path / "run"
  flags = flags_of(data__root=images, data__skip_corrupt=True, total_steps=1)
  done = main(*base, f"--workdir={workdir}", *flags)
  assert done.status == 0, done.err
  assert "train 23, val 10, test 13" in done.err
  assert "1 unreadable images skipped" in done.err
  assert (workdir / "result.json").exists()


@pytest.mark.parametrize(
  "weights, parts",
  [
    ("missing.npz", ["missing.npz"]),
    ("text.npz", ["text.npz"]),
    ("truncated.npz", ["truncated.npz"]),
    ("pickle.npz", ["pickle.npz"]),
  ],
)
def test_a_backbone_of_no_use_is_one_line(main, base, place, tmp_path, weights, parts):
  import numpy as np

  path = tmp_path / weights
  if weights == "text.npz":
    path.write_text("no weights")
  elif weights == "truncated.npz":
    whole = (place / "backbone0.npz").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
  elif weights == "pickle.npz":
    np.savez(path, **{"embedding/kernel": np.array([{"a": 1}], object)})
  workdir = tmp_path / "run"
  done = main(*base, f"--workdir={workdir}", f"--config.backbone.weights={path}")
  assert_one_line(done, *parts)
  assert not workdir.exists()


@pytest.mark.parametrize("where", ["file", "file/run", "/proc/run"])
def test_a_workdir_that_cannot_be_written_is_one_line(main, base, tmp_path, where):
  (tmp_path / "file").write_text("kept")
  workdir = where if where.startswith("/") else tmp_path / where
  done = main(*base, f"--workdir={workdir}")
  assert_one_line(done, str(workdir), "Choose another workdir")
  assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
  "flags, parts",
  [
    (
      ["--config.method=linear", "--config.vpt_deep.prompt_length=3"],
      [
        "other settings: config.method is 'linear', was 'vpt_deep'; ",
        "config.vpt_deep.prompt_length is 3, was 2. Use",
      ],
    ),
    (["--config.backbone.weights={place}/backbone1.npz"], ["the backbone is sha256 "]),
    (
      ["--config.data.root={place}/other"],
      ["class_names is bee, cat, elk, was ant, bee, cat", "have changed"],
    ),
    (["--config.data.root={place}/darker"], ["the images or their labels have chan"]),
    (["--config.optim.lr=0.5"], ["other settings: config.optim.lr is 0.5, was"]),
    (["--config.seed=1"], ["other settings: config.seed is 1, was 0"]),
    (
      ["--config.total_steps=6"],
      [
        "config.total_steps is 6, was 3; the lr's schedule 'cosine' ends with the run",
        "optim.schedule=constant",
      ],
    ),
  ],
)
def test_a_workdir_of_another_run_is_one_line_and_left_alone(
  main, base, finished, place, flags, parts
):
  other = place / "other"
  if not other.exists():
    shutil.copytree(place / "images", other)
    for split in SPLITS:
      (other / split / "ant").rename(other / split / "elk")
    # The same names, one other image.
    darker = shutil.copytree(place / "images", place / "darker")
    first, second = sorted((darker / "train" / "ant").iterdir())[:2]
    shutil.copy(second, first)
  before = contents(finished)
  flags = [flag.format(place=place) for flag in flags]
  done = main(*base, f"--workdir={finished}", *flags)
  assert_one_line(done, str(finished), *parts)
  assert re.search("another workdir|start over, delete", done.err)
  assert contents(finished) == before


@pytest.mark.parametrize("how", ["truncated", "altered", "missing", "foreign", "file"])
def test_a_damaged_checkpoint_is_one_line(main, base, finished, tmp_path, how):
  workdir = tmp_path / "run"
  shutil.copytree(finished, workdir)
  step = workdir / "checkpoints" / "3"
  files = [path for path in (step / "adapter").rglob("*") if path.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  if how == "truncated":
    os.truncate(largest, largest.stat().st_size // 2)
  elif how == "altered":
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
  elif how == "missing":
    shutil.rmtree(step / "progress")
  else:
    shutil.rmtree(step)
    step.mkdir()
    (step / "notes.txt").write_text("no checkpoint")
  if how == "file":
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "checkpoints").write_text("no checkpoint")
  (workdir / "result.json").unlink()
  before = contents(workdir)
  done = main(*base, f"--workdir={workdir}")
  assert_one_line(done, str(workdir / "checkpoints"))
  assert re.search("start over, delete|another workdir", done.err)
  assert contents(workdir) == before


def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_used(
  main, base, tmp_path
):
  workdir = tmp_path / "run"
  command = [*base, f"--workdir={workdir}", "--config.checkpoint_every_epochs=0.34"]
  assert main(*command).status == 0
  whole = json.loads((workdir / "result.json").read_text())
  newest = workdir / "checkpoints" / "3"
  (newest / "progress" / "metadata").write_text("{}")
  with pytest.warns(UserWarning, match="progress/metadata has 2 bytes.*step 2 is used"):
    assert load_run(workdir).meta["class_names"] == list(CLASSES)
  done = main(*command)
  assert done.status == 0, done.err
  lines = done.err.splitlines()
  assert "progress/metadata has 2 bytes" in lines[0]
  assert "step 2 is used instead" in lines[0] and "resumed at step 2 of 3" in lines
  again = json.loads((workdir / "result.json").read_text())
  assert again["test_accuracy"] == whole["test_accuracy"]
  names = sorted(path.name for path in (workdir / "checkpoints").iterdir())
  assert names == ["2", "3", "3.damaged"]


def test_a_workdir_of_a_run_that_is_under_way_is_one_line(
  main, base, finished, tmp_path
):
  for workdir in (tmp_path, finished):
    before = contents(workdir)
    with lock.hold(workdir):
      done = main(*base, f"--workdir={workdir}")
    named = f"{workdir} belongs to another run"
    assert_one_line(done, named, f"process {os.getpid()} ")
    assert contents(workdir) == before
  assert main(*base, f"--workdir={finished}").status == 0


@pytest.fixture
def small_disk(tmp_path):
  """Makes file systems of some KiB, where that is allowed."""
  mounted = []

  def make(size):
    place = tmp_path / f"disk{size}"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", str(place)]
    if (
      not shutil.which("mount")
      or subprocess.run(command, capture_output=True).returncode
    ):
      pytest.skip("mounting a small file system is not allowed here")
    mounted.append(place)
    return place

  yield make
  for place in mounted:
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("size", [4, 28, 500])
def test_a_full_disk_is_one_last_line_before_the_first_step(
  main, base, small_disk, size
):
  workdir = small_disk(size) / "run"
  more = flags_of(total_steps=60, log_every_steps=1)
  done = main(*base, f"--workdir={workdir}", *more)
  assert done.status == 2, done.err
  last = last_line(done.err)
  assert last.startswith("insvp_jax: ") and f"{workdir}/checkpoints" in last
  assert re.search("No space left on device|MiB free", last)
  assert "Traceback" not in done.err and done.out == ""
  for name in ("result.json", "metrics.jsonl"):
    assert not (workdir / name).exists()
  assert not list((workdir / "checkpoints").glob("*"))


def test_a_profile_of_some_steps_is_kept(main, base, tmp_path):
  done = main(*base, f"--workdir={tmp_path}", "--profile=2:3")
  assert done.status == 0, done.err
  (trace,) = tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")
  assert trace.stat().st_size > 1000
  # The setting shapes no result.
  assert main(*base, f"--workdir={tmp_path}").status == 0


def test_nan_is_one_last_line_and_keeps_no_result(main, base, tmp_path):
  workdir = tmp_path / "run"
  done = main(*base, f"--workdir={workdir}", "--config.optim.lr=1e30")
  assert done.status == 2
  last = done.err.splitlines()[-1]
  assert last.startswith("insvp_jax: the ") and "Lower config.optim.lr" in last
  assert "Traceback" not in done.err and done.out == ""
  assert not (workdir / "result.json").exists()


def last_line(text):
  return text.rstrip("\n").splitlines()[-1]


def test_ctrl_c_writes_a_checkpoint_and_the_same_command_goes_on(main, base, tmp_path):
  workdir = tmp_path / "run"
  command = [*base, f"--workdir={workdir}", f"--config.total_steps={LONG}"]
  stop = {"signal": signal.SIGINT, "when": str(workdir / "metrics.jsonl")}
  done = main(*command, **stop)
  assert done.status == 130, done.err
  assert last_line(done.err).startswith("insvp_jax: stopped by SIGINT at step ")
  assert "Traceback" not in done.err
  (step,) = (int(path.name) for path in (workdir / "checkpoints").iterdir())
  assert 0 < step < LONG and f"at step {step};" in last_line(done.err)
  assert not (workdir / "result.json").exists()
  done = main(*command)
  assert done.status == 0, done.err
  assert f"resumed at step {step} of {LONG}" in done.err
  assert json.loads((workdir / "result.json").read_text())["steps"] == LONG


def test_mode_tune_is_the_protocol_and_mode_train_one_run(main, base, tmp_path):
  flags = [*base, f"--workdir={tmp_path}", "--config.tune.lr=(0.01,0.1)"]
  done = main(*flags, "--mode=train")
  assert done.status == 0, done.err
  assert json.loads((tmp_path / "result.json").read_text())["lr"] == 0.001
  flags[-1] = "--config.tune.seeds=(0,1)"
  done = main(*flags, "--mode=tune")
  assert done.status == 0, done.err
  # The method's own grid: 2 lr, 2 wd.
  summary = json.loads((tmp_path / "summary.json").read_text())["vpt_deep"]
  assert {(t["lr"], t["wd"]) for t in summary["trials"]} == {
    (lr, wd) for lr in (1e-3, 1e-2) for wd in (1e-4, 1e-3)
  }
  assert len(summary["test_accuracies"]) == 2
  assert cells(done.out)[1][0] == "vpt_deep"
  assert last_line(done.out).endswith(f"--run={tmp_path}/vpt_deep/seed0 IMAGES")


def test_a_stopped_search_goes_on_with_the_missing_trials(main, base, tmp_path):
  path = tmp_path / "vpt_deep" / "trials.jsonl"
  command = [*base, f"--workdir={tmp_path}", "--mode=tune"]
  command += ["--config.total_steps=100", "--config.tune.lr=(0.01,0.02,0.03,0.04)"]
  command.append("--config.tune.population=1")
  done = main(*command, signal=signal.SIGTERM, when=str(path))
  assert done.status == 42, done.err
  assert last_line(done.err) == (
    "insvp_jax: stopped by SIGTERM. Start the same command again to go on."
  )
  before = path.read_bytes()
  assert before.endswith(b"\n") and 1 <= before.count(b"\n") < 4
  done = main(*command)
  assert done.status == 0, done.err
  assert path.read_bytes().startswith(before) and path.read_bytes().count(b"\n") == 4
  assert json.loads((tmp_path / "vpt_deep/seed0/result.json").read_text())["steps"]


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 42)])
def test_a_signal_before_training_is_one_line(main, tmp_path, signum, status):
  flag, config = tmp_path / "flag", tmp_path / "slow.py"
  config.write_text(
    f"import time\ndef get_config():\n  open({str(flag)!r}, 'w').write('x')\n"
    "  time.sleep(60)\n"
  )
  done = main(f"--config={config}", signal=signum, when=str(flag))
  assert done.status == status
  name = signal.Signals(signum).name
  assert done.err == (
    f"insvp_jax: stopped by {name}. Start the same command again to go on.\n"
  )


def test_sigterm_of_a_real_process_and_the_same_command_again(
  main, root, base, tmp_path
):
  workdir = tmp_path / "run"
  flags = [*base, f"--workdir={workdir}"]
  flags += flags_of(total_steps=LONG, optim__lr=0.01)
  process = subprocess.Popen(
    [sys.executable, "-m", "insvp_jax.main", *flags],
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    cwd=root,
    text=True,
  )
  metrics = workdir / "metrics.jsonl"
  while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 42, err
  assert out == ""
  assert last_line(err).startswith("insvp_jax: stopped by SIGTERM at step ")
  assert "Start the same command again to resume." in err
  done = main(*flags)
  assert done.status == 0, done.err
  assert done.out.startswith("images vpt_deep: val ")
  assert "resumed at step" in done.err
  result = json.loads((workdir / "result.json").read_text())
  assert result["steps"] == LONG and result["test_accuracy"] > 0.5
  names = {"config.json", "metrics.jsonl", "parameters.txt", "checkpoints"}
  names |= {"result.json", "splits.json"}
  assert {path.name for path in workdir.iterdir()} == names
  run = load_run(workdir)
  image = next(Path(base[1].split("=")[1]).glob("test/ant/*.png"))
  assert run.predict(image).shape == (1, len(CLASSES))


@pytest.mark.parametrize(
  ("method", "off", "has_prompts"),
  [
    ("insvp", (), True),
    ("insvp", ("use_global",), True),
    ("insvp", ("use_global", "use_patch"), False),
    ("linear", (), None),
  ],
)
def test_prompts_are_drawn_of_a_run_that_has_some(tmp_path, method, off, has_prompts):
  config = config_lib.defaults()
  config.method = method
  for name in off:
    config.insvp[name] = False
  (tmp_path / "config.json").write_text(json.dumps(config_lib.to_dict(config)))
  found = main_lib._image_prompts(tmp_path)
  assert found == (None if has_prompts is None else (tmp_path, has_prompts))


def test_a_plan_needs_neither_images_nor_weights_and_trains_nothing(
  main, base, tmp_path
):
  gone = flags_of(
    data__root=tmp_path / "none",
    backbone__weights=tmp_path / "none.npz",
    plan__num_classes=3,
    plan__num_train=24,
    batch_size=8,
    backbone__fsdp=2,
    tune__variants="(('short', 'vpt_deep', (('vpt_deep.prompt_length', 1),)),)",
  )
  workdir = tmp_path / "planned"
  flags = [*base, *gone, "--plan=8", f"--workdir={workdir}"]
  assert_one_line(main(*flags), "--config.method was given, but each row")
  own = ("--config.method", "--config.vpt_deep.prompt_length")
  done = main(*(flag for flag in flags if not flag.startswith(own)))
  assert done.status == 0, done.err
  assert "8 x cpu, fsdp 2" in done.out and "checkpoint: adapter" in done.out
  assert [path.name for path in workdir.iterdir()] == ["plan.json"]
  found = json.loads((workdir / "plan.json").read_text())
  assert list(found) == ["short"] and found["short"]["devices"] == 8
  # One block, one prompt of width 16, and the head of three classes.
  assert found["short"]["arrays"]["trainable"] == 4 * (16 + 17 * 3)
  assert done.out.startswith("short: vpt_deep on ")
  gone = [flag for flag in gone if "variants" not in flag]
  done = main(*base, *gone, "--plan=8", "--noplan", "--plan=x")
  assert_one_line(done, "--plan=x", "number of devices")
  assert_one_line(main(*base, *gone, "--plan=5"), "backbone.fsdp is 2", "5 devices")


@pytest.mark.parametrize("value", ["1000000", "0", "-1", "x", "1e3", "9" * 99])
def test_a_plan_is_for_a_number_of_devices(value):
  with pytest.raises(ValueError, match="expected a number of devices, 1 to 4096, or"):
    main_lib._PlanParser().parse(value)

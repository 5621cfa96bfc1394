"""The wheel, in an environment without the extras and in an empty folder."""

from importlib import metadata
import json
import os
from pathlib import Path
import subprocess
import sys
import sysconfig

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
import pytest

RUN = "--run=runs/quickstart/linear/seed0"
# What follows the quickstart, in one process: to start costs more than what they do.
COMMANDS = (
  ("predict", RUN, "photo.png"),
  ("export", RUN, "--output=b.npz"),
  ("export", RUN, "--format=stablehlo", "--output=program.stablehlo"),
  ("visualize", RUN),
  ("train", "--config=vtab:svhn,backbone=boxed"),
)
NEEDED = {"visualize": "plots", "train": "tfds"}
DRIVER = """
import contextlib, io, json
from insvp_jax import cli
said = []
for words in json.load(open("commands.json")):
  with contextlib.redirect_stdout(io.StringIO()) as out:
    with contextlib.redirect_stderr(out):
      try:
        status = cli.main(words)
      except SystemExit as stop:
        status = stop.code
  said.append((status or 0, out.getvalue()))
json.dump(said, open("said.json", "w"))
"""
EXTRAS = ("tensorflow", "matplotlib", "pytest", "beartype", "tensorboard", "IPython")


def required(name: str, found: dict[str, metadata.Distribution]) -> None:
  """Adds the distributions that one needs, extras of requirements included."""
  requirement = Requirement(name)
  key = canonicalize_name(requirement.name)
  distribution = metadata.distribution(key)
  pending = [] if key in found else [""]
  found[key] = distribution
  for line in distribution.requires or ():
    needed = Requirement(line)
    for extra in [*pending, *requirement.extras]:
      if needed.marker is None or needed.marker.evaluate({"extra": extra}):
        if canonicalize_name(needed.name) not in found or needed.extras:
          required(f"{needed.name}[{','.join(needed.extras)}]", found)
        break


@pytest.fixture(scope="module")
def python(root, tmp_path_factory):
  """The interpreter of an environment with the wheel and what it requires.

  Nothing is downloaded: the environment links to what is installed beside these tests,
  as far as the wheel's metadata ask for it.
  """
  folder = tmp_path_factory.mktemp("wheel")
  build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder]
  subprocess.run([*build, root], check=True, capture_output=True)
  (wheel,) = folder.glob("insvp_jax-*-py3-none-any.whl")
  venv = [sys.executable, "-m", "venv", "--without-pip", folder / "venv"]
  subprocess.run(venv, check=True)
  (site,) = (folder / "venv").glob("lib/python*/site-packages")
  pip = [sys.executable, "-m", "pip", "--python", folder / "venv"]
  pip += ["install", "--quiet", "--no-deps", "--no-index", wheel]
  subprocess.run(pip, check=True)
  (installed,) = metadata.distributions(name="insvp_jax", path=[str(site)])
  found: dict[str, metadata.Distribution] = {}
  for line in installed.requires:
    needed = Requirement(line)
    if needed.marker is None or needed.marker.evaluate({"extra": ""}):
      required(line.partition(";")[0], found)
  here = Path(sysconfig.get_paths()["purelib"])
  for distribution in found.values():
    for file in distribution.files:
      top = file.parts[0]
      if top != ".." and not (site / top).exists() and (here / top).exists():
        (site / top).symlink_to(here / top)
  return folder / "venv" / "bin" / "python"


@pytest.fixture
def run(python, tmp_path):
  """Runs a command of the environment in an empty folder: its output."""

  def run(*words, status=0):
    words = (str(python.parent / words[0]), *map(str, words[1:]))
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
      words, cwd=tmp_path, env=environ, capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    return done.stderr + done.stdout

  return run


def test_from_the_wheel_to_a_table_a_prediction_and_a_backbone(run, tmp_path):
  import insvp_jax

  code = f"import importlib.util as u; print([m for m in {EXTRAS} if u.find_spec(m)])"
  assert run("python", "-c", code) == "[]\n"
  assert run("insvp", "--version") == f"insvp_jax {insvp_jax.__version__}\n"
  # The steps of the quickstart, with the quickest of its methods and fewer of them.
  config = "--config=quickstart:method=linear"
  shown = run("insvp", "train", config, "--config.total_epochs=2")
  assert "| linear " in shown and len(shown.splitlines()) <= 40
  assert shown.splitlines()[-1] == (
    "next     insvp predict --run=runs/quickstart/linear/seed0 IMAGES"
  )
  from PIL import Image

  Image.new("L", (32, 32)).save(tmp_path / "photo.png")
  (tmp_path / "commands.json").write_text(json.dumps(COMMANDS))
  run("python", "-c", DRIVER)
  said = json.loads((tmp_path / "said.json").read_text())
  for words, (status, shown) in zip(COMMANDS, said, strict=True):
    extra = NEEDED.get(words[0])
    assert status == (2 if extra else 0), (words, shown)
    if extra:
      # What the extras are for says so in one line.
      assert f"pip install 'insvp_jax[{extra}]'" in shown and shown.count("\n") == 1
  assert said[0][1].startswith("photo.png\n") and said[0][1].count("%") == 5
  assert (tmp_path / "b.npz").stat().st_size > 10**6
  assert (tmp_path / "program.stablehlo").stat().st_size > 10**4

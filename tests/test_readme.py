"""Commands and snippets of the README and the first pages run; docs name what is."""

import importlib.util
import json
from pathlib import Path
import re
import shlex
import shutil

from main_driver import Driver
import numpy as np
from PIL import Image
import pytest
from test_suite import write_noah
from tfds_fixtures import prepare_cifar
from tiny_commands import BACKBONE, flags_of, make_place
from tiny_training import SIZE

from insvp_jax import cli, paths
from insvp_jax.data import GROUPS
from insvp_jax.models.weights.releases import ASSETS

# None of this is about devices, and for one all compiles sooner.
pytestmark = pytest.mark.usefixtures("one_device")

TOOLS = [name for name, (_, tool) in cli.COMMANDS.items() if tool]
# The tests of launch/ and of the wheel run these.
ELSEWHERE = ("pip install .", "bash launch/local.sh", "bash launch/test.sh")
# Whose commands are run, one after the other, in one folder.
PAGES = ("README.md", "docs/start.md", "docs/images.md")


def blocks(text, language):
  return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def commands(text):
  """Yields each command as a list of words, continued lines joined."""
  for block in blocks(text, "bash"):
    for line in block.replace("\\\n", " ").splitlines():
      words = shlex.split(line, comments=True)
      if words:
        yield words


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
  """A folder with all that the README's commands name, but small."""
  place = make_place(tmp_path_factory.mktemp("readme"))
  shutil.make_archive(str(place / "photos"), "zip", place / "images")
  shutil.copytree(place / "images" / "test", place / "new_photos")
  for task in GROUPS["specialized"]:
    write_noah(place / "vtab-1k", task, number_of_classes=2)
  return place


def small(words, place):
  """Returns the flags that make a run of a command a matter of seconds."""
  flags = flags_of(
    backbone__name="mu/4",
    backbone__weights=place / "backbone0.npz",
    **{f"backbone__{name}": size for name, size in BACKBONE.items()},
    data__cache_dir="off",
    image_size=SIZE,
    batch_size=4,
    total_steps=2,
    optim__warmup_epochs=0.0,
    tensorboard=False,
    insvp__global_kernels="(3,3)",
    insvp__global_dilations="(1,1)",
    insvp__prompt_length=2,
  )
  # The method that compiles quickest, but where a later command wants InsVP's run.
  is_used = re.fullmatch("--config=(quickstart|folder:root=photos.zip)", words[2])
  flags += flags_of(method="insvp" if is_used else "linear")
  if words[2].startswith("--config=folder"):
    # The quickstart has all of InsVP's parts; one makes prompts to look at, too.
    flags += flags_of(insvp__use_global=False)
  if "--mode=train" in words:
    return flags
  # Nothing to choose, one final run: searches have tests of their own.
  return flags + flags_of(tune__lr="()", tune__wd="()", tune__seeds="(0,)")


def test_every_command_runs(root, sandbox, capsys, monkeypatch):
  pytest.importorskip("tensorflow_datasets")
  prepare_cifar(sandbox / "tfds")
  monkeypatch.chdir(sandbox)
  monkeypatch.setenv("INSVP_CACHE", str(sandbox / "cache"))
  lines, seen = set(), []
  with Driver(sandbox) as driver:
    for words in (w for page in PAGES for w in commands((root / page).read_text())):
      line = " ".join(words)
      if line.startswith(ELSEWHERE) or line in lines:
        continue
      lines.add(line)
      assert words[0] == "insvp", line
      seen.append(words[1])
      if words[1] in TOOLS:
        status = cli.main(words[1:])
        printed = capsys.readouterr()
        assert status == 0 and printed.out, (line, printed)
      else:
        done = driver.run(*words[2:], *small(words, sandbox))
        assert done.status == 0, (line, done.err)
        last = done.out.splitlines()[-1]
        assert last.startswith("next     ") or "--print_config" in words, line
  assert set(seen) == {"train", "predict", "visualize", "evaluate", "prepare"}


def test_the_snippets_run(root, sandbox, tmp_path, monkeypatch):
  from insvp_jax import config as config_lib

  first, second = blocks((root / "docs" / "start.md").read_text(), "python")
  (third,) = blocks((root / "docs" / "checkpoints.md").read_text(), "python")
  scope = {}
  exec(first, scope)
  assert scope["logits"].shape == (2, 10)
  assert set(scope["params"]) == {"backbone", "prompter", "head"}

  def defaults(defaults=config_lib.defaults):
    config = defaults()
    config.method, config.total_steps, config.tensorboard = "linear", 2, False
    config.backbone.name = "mu/4"
    config.backbone.weights = str(sandbox / "backbone0.npz")
    config.backbone.update(BACKBONE)
    config.image_size = SIZE
    return config

  monkeypatch.setattr(config_lib, "defaults", defaults)
  monkeypatch.chdir(tmp_path)
  Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save("photo.png")
  exec(second, scope)
  assert scope["run"].params["head"] and scope["result"]["test_accuracy"] > 0
  exec(third, scope)


def test_the_blocks_of_adapt_run(root, sandbox, tmp_path, monkeypatch, capsys):
  from insvp_jax.search import adapt

  original = adapt._config

  def tiny(backbone, method, changes, **kind):
    # What compiles quickest, for two steps.
    changes = {**changes, "total_steps": 2, "tensorboard": False, "image_size": SIZE}
    changes |= {"optim.warmup_epochs": 0.0}
    changes |= {"backbone.weights": str(sandbox / "backbone0.npz")}
    changes |= {f"backbone.{name}": size for name, size in BACKBONE.items()}
    return original("mu/4", "linear", changes, **kind)

  monkeypatch.setattr(adapt, "_config", tiny)
  monkeypatch.chdir(tmp_path)
  first, second = blocks((root / "docs" / "adapt.md").read_text(), "python")
  scope = {}
  exec(first, scope)
  assert scope["run"].workdir == tmp_path / "runs/digits/linear/seed0"
  assert "[[" in capsys.readouterr().out
  exec(second, scope)
  assert scope["run"].result["lr"] == 0.01
  assert scope["run"].meta["config"]["loss"]["class_weights"] is True


def config_of(words):
  """Returns the config of a command with its overrides' keys looked up."""
  flags = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)
  name, _, arg = flags.pop("config").partition(":")
  path = paths.configs_dir() / f"{name.removeprefix('configs/').removesuffix('.py')}.py"
  spec = importlib.util.spec_from_file_location("documented_config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(arg)
  for key in flags:
    if key.startswith("config."):
      section, _, field = key.removeprefix("config.").rpartition(".")
      node = config[section] if section else config
      assert field in node, f"config.{section}.{field} is set, which is not"
  return config


DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.parametrize("name", sorted(path.stem for path in DOCS.glob("*.md")))
def test_the_docs_name_commands_flags_and_files_that_are_there(root, name, capsys):
  text = (root / "docs" / f"{name}.md").read_text()
  for words in commands(text):
    if words[0] != "insvp":
      continue
    if words[1] not in TOOLS:
      config_of(words[2:])
      continue
    with pytest.raises(SystemExit):
      cli.main([words[1], "--help"])
    usage = capsys.readouterr().out
    for word in words[2:]:
      if word.startswith("--"):
        assert word.split("=")[0] in usage, word
  for module in re.findall(r"python -m ([\w.]+)", text):
    assert importlib.util.find_spec(module), module


def test_the_readme_is_read_in_two_minutes(root):
  text = (root / "README.md").read_text()
  prose = re.sub(r"```.*?```|^\|.*?$", "", text, flags=re.S | re.M)
  assert len(prose.split()) < 400


def test_the_accuracy_of_the_backbone_is_the_recorded_one(root):
  described = json.loads((ASSETS / "boxed.json").read_text())
  measured = (root / "docs" / "measured.md").read_text()
  assert f"reached {100 * described['test_accuracy']:.2f}% on CIFAR-10" in " ".join(
    measured.split()
  )

"""The README's commands are ones that work, and its first snippet runs."""

import importlib.util
import json
import re
import shlex

import pytest

from insvp_jax.models.weights.releases import ASSETS


@pytest.fixture(scope="module")
def readme(root):
  return (root / "README.md").read_text()


def blocks(readme, language):
  return re.findall(rf"```{language}\n(.*?)```", readme, re.S)


def commands(readme):
  """Yields each command as a list of words, continued lines joined."""
  for block in blocks(readme, "bash"):
    for line in block.replace("\\\n", " ").splitlines():
      words = shlex.split(line, comments=True)
      if words:
        yield words


def config_of(root, words):
  """Returns the config of a command with its overrides applied, strictly."""
  flags = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)
  path, _, arg = flags.pop("config").partition(":")
  spec = importlib.util.spec_from_file_location("readme_config", root / path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(arg) if arg else module.get_config()
  for key, value in flags.items():
    if key.startswith("config."):
      section, _, field = key.removeprefix("config.").rpartition(".")
      node = config[section] if section else config
      assert field in node, f"the README sets config.{section}.{field}, which is not"
      if isinstance(node[field], tuple):
        assert value.startswith("("), f"{key}={value} is no tuple"
  return config


def test_every_training_command_names_a_config_and_its_keys(root, readme):
  found = [w for w in commands(readme) if any("--config=" in x for x in w)]
  assert len(found) >= 5
  for words in found:
    launcher = " ".join(words[:3])
    assert launcher.startswith(
      ("python -m insvp_jax.main", "bash launch/local.sh --config=")
    ), launcher
    config_of(root, words)


def test_every_tool_and_script_exists(root, readme):
  for words in commands(readme):
    if words[:2] == ["python", "-m"]:
      assert importlib.util.find_spec(words[2]), words
    elif words[0] in ("bash", "python"):
      assert (root / words[1]).is_file(), words
  for path in re.findall(r"\]\(([\w/.]+)\)", readme):
    assert (root / path).exists(), path


def test_the_tools_take_the_flags_that_the_readme_gives(readme, capsys):
  for words in commands(readme):
    if words[:2] != ["python", "-m"] or ".tools." not in words[2]:
      continue
    module = importlib.import_module(words[2])
    with pytest.raises(SystemExit):
      module.main(["--help"])
    usage = capsys.readouterr().out
    for word in words[3:]:
      if word.startswith("--"):
        assert word.split("=")[0] in usage, word


def test_the_first_snippet_runs(readme):
  scope = {}
  exec(blocks(readme, "python")[0], scope)
  assert scope["logits"].shape == (2, 10)
  assert set(scope["params"]) == {"backbone", "prompter", "head"}


def test_the_run_snippet_uses_what_a_run_has(readme):
  from insvp_jax.run import Run

  used = re.findall(r"^run\.(\w+)", blocks(readme, "python")[1], re.M)
  known = {*dir(Run), *Run.__dataclass_fields__}
  assert len(used) == 4 and set(used) <= known


def test_the_accuracy_of_the_backbone_is_the_recorded_one(readme):
  described = json.loads((ASSETS / "boxed.json").read_text())
  assert f"{100 * described['test_accuracy']:.2f}% test accuracy" in " ".join(
    readme.split()
  )

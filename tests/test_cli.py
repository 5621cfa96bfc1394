"""The command `insvp`: each word leads to its tool, and a wrong one is named."""

import re
import tomllib

import pytest

import insvp_jax
from insvp_jax import cli, main, tools


def test_help_and_version(capsys, root):
  assert cli.main(["--help"]) == cli.main([]) == 0
  shown = capsys.readouterr().out
  assert shown == 2 * f"{cli.usage()}\n"
  assert all(re.search(rf"^  {name} ", shown, re.M) for name in cli.COMMANDS)
  assert cli.main(["--version"]) == 0
  assert capsys.readouterr().out == f"insvp_jax {insvp_jax.__version__}\n"
  project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
  assert project["scripts"] == {"insvp": "insvp_jax.cli:main"}


def test_an_unknown_command_is_one_line(capsys):
  assert cli.main(["pedict", "--run=x"]) == 2
  error = capsys.readouterr().err
  assert error.startswith(
    "insvp_jax: unknown command 'pedict'. Did you mean 'predict'?"
  )
  assert error.count("\n") == 1


@pytest.mark.parametrize(
  "name, flags", [("train", []), ("tune", ["--mode=tune"]), ("plan", ["--plan"])]
)
def test_training_is_main(monkeypatch, name, flags):
  seen = []
  monkeypatch.setattr(main, "run", seen.append)
  assert cli.main([name, "--config=vtab"]) == 0
  assert seen == [[f"insvp {name}", *flags, "--config=vtab"]]
  if name == "plan":
    cli.main(["plan", "--devices=8"])
    assert seen[-1] == ["insvp plan", "--plan", "--plan=8"]


@pytest.mark.parametrize("name", [n for n, (_, tool) in cli.COMMANDS.items() if tool])
def test_each_tool_says_how_it_was_called(capsys, name):
  with pytest.raises(SystemExit) as exit:
    cli.main([name, "--help"])
  assert exit.value.code == 0
  assert capsys.readouterr().out.startswith(f"usage: insvp {name} ")
  assert tools.__doc__

"""The code is as ruff, configured in pyproject.toml, wants it: also its S rules."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_ruff(command, root):
  done = subprocess.run(
    [sys.executable, "-m", "ruff", *command.split(), "--quiet", "."],
    cwd=root,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr

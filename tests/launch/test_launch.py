"""The scripts in launch/, run with a make-believe Python: no network, no minutes.

The fake interpreter makes environments that hold a copy of itself, writes what it was
asked to do into a log, and can be told to fail. PATH holds it and a few standard tools
only, so that no real Python is found behind it.
"""

from collections.abc import Mapping
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time

import pytest

SCRIPTS = ("launch/setup.sh", "launch/local.sh", "launch/test.sh", ".ci/run")
# Of the interpreter's environment, which need not be active, or the system's.
SHELLCHECK = shutil.which("shellcheck", path=Path(sys.executable).parent)
SHELLCHECK = SHELLCHECK or shutil.which("shellcheck")
TOOLS = "bash cat cksum cut dirname flock grep mkdir mv rm rmdir sleep uname"

# Passes code to the real Python, under a pretended version.
FAKE = """#!{bash}
case "$1 ${{2:-}}" in
  "-c "*)
    [ -z "${{FAKE_BROKEN:-}}" ] || exit 127
    code="import sys
sys.version_info = tuple(map(int, '${{FAKE_VERSION:-3.12.9}}'.split('.')))
if '${{FAKE_NO_VENV:-}}': sys.modules['venv'] = None
$2"
    shift 2
    exec {python} -c "$code" "$@" ;;
  "-m venv")
    mkdir -p "$3/bin" && cat "$0" >"$3/bin/python" && {chmod} +x "$3/bin/python" ;;
  "-m pip")
    echo "pip $*" >>"$FAKE_LOG"
    sleep "${{FAKE_SLEEP:-0}}"
    [ -z "${{FAKE_PIP_FAILS:-}}" ] || {{ echo "ERROR: no such wheel" >&2; exit 1; }} ;;
  *) echo "run $* in $PWD " ;;
esac
"""


class Sandbox:
  """A copy of the scripts, a PATH of its own and the fake's log."""

  def __init__(self, root: Path, folder: Path):
    self.repo = folder / "a repo"
    self.bin = folder / "bin"
    self.log = folder / "log"
    self.venv = self.repo / ".venv"
    for name in (*SCRIPTS, "requirements.txt", "pyproject.toml"):
      (self.repo / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(root / name, self.repo / name)
    self.bin.mkdir()
    for tool in TOOLS.split():
      if path := shutil.which(tool):
        (self.bin / tool).symlink_to(path)
    self.log.touch()

  def add_python(self, name: str = "python3.12") -> None:
    path = self.bin / name
    path.write_text(
      FAKE.format(
        bash=shutil.which("bash"), python=sys.executable, chmod=shutil.which("chmod")
      )
    )
    path.chmod(0o755)

  def start(self, script: str, *args: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
      [shutil.which("bash"), str(self.repo / script), *args],
      cwd=self.repo.parent,
      env={"PATH": str(self.bin), "FAKE_LOG": str(self.log), **env},
      start_new_session=True,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def run(self, script: str, *args: str, **env: str) -> subprocess.CompletedProcess:
    process = self.start(script, *args, **env)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)

  def installs(self) -> int:
    """How often something was installed so far."""
    return self.log.read_text().count("pip -m pip install")


@pytest.fixture
def sandbox(root: Path, tmp_path: Path) -> Sandbox:
  return Sandbox(root, tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse(script, root):
  subprocess.run(["bash", "-n", root / script], check=True)


@pytest.mark.skipif(not SHELLCHECK, reason="shellcheck is not installed")
def test_shellcheck(root):
  done = subprocess.run(
    [SHELLCHECK, "-x", "-P", "SCRIPTDIR", *SCRIPTS],
    cwd=root,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout


def test_set_up_once_then_reused(sandbox):
  sandbox.add_python()
  first = sandbox.run("launch/local.sh", "--config=configs/x y.py")
  assert first.returncode == 0, first.stderr
  assert "Setting up" in first.stderr
  # The caller's folder stays, and arguments arrive whole.
  assert f"run -m insvp_jax.main --config=configs/x y.py in {sandbox.repo.parent} " in (
    first.stdout
  )
  assert "-r requirements.txt" in sandbox.log.read_text()
  second = sandbox.run("launch/test.sh", "tests/test_a.py", "-x")
  assert (second.returncode, second.stderr) == (0, "")
  assert (
    "run -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/test_a.py -x "
    f"in {sandbox.repo} " in second.stdout
  )
  assert sandbox.installs() == 1


def test_ready_environment_needs_no_other_python(sandbox):
  sandbox.add_python()
  sandbox.run("launch/local.sh")
  (sandbox.bin / "python3.12").unlink()
  assert sandbox.run("launch/local.sh").returncode == 0
  assert sandbox.installs() == 1


@pytest.mark.parametrize("name", ["requirements.txt", "pyproject.toml"])
def test_changed_requirements_are_installed_afresh(name, sandbox):
  sandbox.add_python()
  sandbox.run("launch/local.sh")
  (sandbox.venv / "leftover").touch()
  with open(sandbox.repo / name, "a") as file:
    file.write("# changed\n")
  assert sandbox.run("launch/local.sh").returncode == 0
  assert sandbox.installs() == 2
  assert not (sandbox.venv / "leftover").exists()


def test_another_python_version_is_installed_afresh(sandbox):
  sandbox.add_python()
  sandbox.run("launch/local.sh")
  assert sandbox.run("launch/local.sh", FAKE_VERSION="3.12.10").returncode == 0
  assert sandbox.installs() == 2


def test_moved_checkout_is_installed_afresh(sandbox):
  sandbox.add_python()
  sandbox.run("launch/local.sh")
  sandbox.repo = sandbox.repo.rename(sandbox.repo.parent / "moved")
  assert sandbox.run("launch/local.sh").returncode == 0
  assert sandbox.installs() == 2


def test_failed_install_is_shown_and_never_reused(sandbox):
  sandbox.add_python()
  failed = sandbox.run("launch/test.sh", FAKE_PIP_FAILS="1")
  assert failed.returncode == 1
  assert "ERROR: no such wheel" in failed.stderr
  assert failed.stderr.splitlines()[-1].startswith("Installing failed")
  assert "run " not in failed.stdout
  (sandbox.venv / "leftover").touch()
  assert sandbox.run("launch/test.sh").returncode == 0
  assert not (sandbox.venv / "leftover").exists()
  assert sandbox.installs() == 2


def test_failed_redo_leaves_no_old_stamp(sandbox):
  sandbox.add_python()
  sandbox.run("launch/test.sh")
  requirements = sandbox.repo / "requirements.txt"
  before = requirements.read_text()
  requirements.write_text(before + "# changed\n")
  assert sandbox.run("launch/test.sh", FAKE_PIP_FAILS="1").returncode == 1
  requirements.write_text(before)
  assert sandbox.run("launch/test.sh").returncode == 0
  assert sandbox.installs() == 3


def test_killed_set_up_is_never_reused(sandbox):
  sandbox.add_python()
  process = sandbox.start("launch/local.sh", FAKE_SLEEP="60")
  while not sandbox.installs():
    assert process.poll() is None
    time.sleep(0.01)
  os.killpg(process.pid, signal.SIGKILL)
  process.communicate(timeout=60)
  assert sandbox.venv.exists()
  (sandbox.venv / "leftover").touch()
  assert sandbox.run("launch/local.sh").returncode == 0
  assert not (sandbox.venv / "leftover").exists()
  assert sandbox.installs() == 2


@pytest.mark.skipif(not shutil.which("flock"), reason="flock is not installed")
def test_two_at_once_install_once(sandbox):
  sandbox.add_python()
  both = [sandbox.start("launch/local.sh", FAKE_SLEEP="0.5") for _ in range(2)]
  results = [process.communicate(timeout=60) for process in both]
  assert [process.returncode for process in both] == [0, 0], results
  assert all("run -m insvp_jax.main" in out for out, _ in results)
  assert sandbox.installs() == 1


def test_environment_elsewhere(sandbox):
  sandbox.add_python()
  done = sandbox.run("launch/local.sh", INSVP_VENV="else where")
  assert done.returncode == 0, done.stderr
  assert (sandbox.repo.parent / "else where" / "bin" / "python").exists()
  assert not sandbox.venv.exists()


def test_foreign_folder_is_not_deleted(sandbox):
  sandbox.add_python()
  precious = sandbox.repo.parent / "precious"
  precious.mkdir()
  (precious / "file").touch()
  done = sandbox.run("launch/local.sh", INSVP_VENV=str(precious))
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) == 1
  assert "was not made by this script" in done.stderr
  assert (precious / "file").exists()


def test_unwritable_place(sandbox):
  sandbox.add_python()
  done = sandbox.run("launch/local.sh", INSVP_VENV="/dev/null/venv")
  assert done.returncode == 2
  assert done.stderr.startswith("Cannot write beside /dev/null/venv")
  assert len(done.stderr.splitlines()) == 1


def _check_refused(done: subprocess.CompletedProcess, reason: str) -> None:
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) == 1
  assert "needs Python 3.11 or 3.12 with venv" in done.stderr
  assert reason in done.stderr
  assert done.stdout == ""


def test_no_python(sandbox):
  _check_refused(sandbox.run("launch/local.sh"), "python3.12 is not there")
  assert not sandbox.venv.exists()


@pytest.mark.parametrize(
  ("env", "reason"),
  [
    ({"FAKE_VERSION": "3.10.2"}, "python3 is Python 3.10.2"),
    ({"FAKE_VERSION": "3.13.0"}, "python3 is Python 3.13.0"),
    ({"FAKE_NO_VENV": "1"}, "python3 is Python 3.12.9 without venv"),
    ({"FAKE_BROKEN": "1"}, "python3 does not run"),
  ],
)
def test_unsuitable_python(env: Mapping[str, str], reason, sandbox):
  sandbox.add_python("python3")
  _check_refused(sandbox.run("launch/test.sh", **env), reason)
  assert not sandbox.venv.exists()


def test_broken_shim_is_passed_over(sandbox):
  # A version manager's shim for a version that is not switched on.
  (sandbox.bin / "python3.12").write_text("#!/bin/sh\nexit 127\n")
  (sandbox.bin / "python3.12").chmod(0o755)
  sandbox.add_python("python3.11")
  assert sandbox.run("launch/local.sh").returncode == 0
  assert sandbox.installs() == 1


def test_named_python_is_the_only_one_tried(sandbox):
  sandbox.add_python("python3.12")
  _check_refused(
    sandbox.run("launch/local.sh", INSVP_PYTHON="python9"), "but python9 is not there"
  )


def test_ci_runs_the_test_script(sandbox):
  sandbox.add_python()
  done = sandbox.run(".ci/run")
  assert done.returncode == 0, done.stderr
  assert (
    "run -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15 "
    f"in {sandbox.repo} " in done.stdout
  )


def test_ci_fails_when_set_up_fails(sandbox):
  sandbox.add_python()
  assert sandbox.run(".ci/run", FAKE_PIP_FAILS="1").returncode != 0

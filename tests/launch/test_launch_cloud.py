"""The scripts for clusters in launch/, run with make-believe clouds: no network.

PATH holds a few standard tools and fakes that write their calls into a log. What the
fakes answer stands in files of one answer per line; the last line is used for ever.
"""

from collections.abc import Iterator
import contextlib
import os
from pathlib import Path
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
import tomllib

import pytest
import yaml

from insvp_jax import config, trees
from insvp_jax.data import tasks

SCRIPTS = sorted(
  path.name
  for pattern in ("*.sh", "*.sbatch")
  for path in (Path(__file__).parents[2] / "launch").glob(pattern)
)
VTAB = [
  name
  for name, task in tasks.TASKS.items()
  if task.group in ("natural", "specialized", "structured")
]
TOOLS = """
  bash cat chown cksum cp cut dirname env flock grep gzip head id ls mkdir mktemp mv
  printf rm rmdir sed sleep sort tail tar tee tr uname uniq xargs
"""

# Each fake starts with this: `log` writes a line, `answer` takes one from a file.
PRELUDE = """#!{bash}
log() {{ printf '%s\\n' "$*" >>"$FAKE/log"; }}
answer() {{ # file, default
  [ -s "$FAKE/$1" ] || {{ printf '%s\\n' "$2"; return; }}
  {{ read -r first; rest="$(cat)"; }} <"$FAKE/$1"
  printf '%s\\n' "$first"
  if [ -n "$rest" ]; then printf '%s\\n' "$rest" >"$FAKE/$1"; fi
}}
"""

GCLOUD = """
case "$*" in
  *" --command=bash "*" --stop "*)
    log "gcloud stop ${5#--worker=}"
    : >"$FAKE/stopped" ;;
  *" ssh "*)
    worker="${6#--worker=}"
    log "gcloud $*"
    action="$(answer "ssh_$worker" 0)"
    echo "hello from $worker"
    case "$action" in
      lost) exit 255 ;;
      hang) : >"$FAKE/hanging"; while [ ! -e "$FAKE/stopped" ]; do sleep 1; done
        action=42 ;;
    esac
    # Without a newline before it.
    printf 'and on'
    printf '\\ninsvp_jax: worker ended with status %s\\n' "$action"
    echo "ERROR: gcloud says so" >&2
    [ "$action" = 0 ] || exit 1 ;;
  *networkEndpoints*) answer workers "10.0.0.1" ;;
  *" describe "*)
    state="$(answer states READY)"
    case "$state" in
      MISSING) echo "ERROR: NOT_FOUND: Resource was not found" >&2; exit 1 ;;
      ERROR:*) echo "$state" >&2; exit 1 ;;
    esac
    echo "$state" ;;
  *" create "*)
    log "gcloud $*"
    error="$(answer create_errors none)"
    [ "$error" = none ] || { echo "$error" >&2; exit 1; } ;;
  *" scp "*)
    log "gcloud $*"
    cp "$5" "$FAKE/code.tgz"
    exit "$(answer scp 0)" ;;
  *) log "gcloud $*" ;;
esac
"""

FAKES = {
  "gcloud": GCLOUD,
  # Time passes quickly, and is written down.
  "sleep": 'log "sleep $1"; exec {sleep} 0.02',
  "srun": """
log "srun $*"
if [ "$(answer srun 0)" = wait ]; then
  trap 'log "srun got TERM"; exit 42' TERM
  : >"$FAKE/waiting"
  while :; do sleep 1; done
fi
exit "$(answer srun 0)"
""",
  "squeue": 'log "squeue $*"; answer squeue RUNNING',
  "scontrol": 'log "scontrol $*"; exit "$(answer scontrol 0)"',
  "kubectl": """
log "kubectl $*"
case "$1" in
  get) answer kubectl_get "" ;;
  create) cat >"$FAKE/created.yaml"; exit "$(answer kubectl_create 0)" ;;
esac
""",
  # Makes environments that hold a copy of itself; "trains" until it is told to stop.
  "python3.12": """
case "$1 ${{2:-}}" in
  "-c "*)
    code="import sys; sys.version_info = (3, 12, 9)
$2"
    shift 2; exec {python} -c "$code" "$@" ;;
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip")
    log "pip $*"
    if [ "$(answer pip 0)" = wait ]; then
      : >"$FAKE/installing"
      while [ ! -e "$FAKE/installed" ]; do sleep 1; done
    fi ;;
  "-m insvp_jax.main")
    shift 2
    log "main $*"
    log "multihost ${{TPU_WORKER_HOSTNAMES:-}} ${{MEGASCALE_NUM_SLICES:-}}"
    log "cache ${{JAX_COMPILATION_CACHE_DIR:-}}"
    echo "step 1"
    status="$(answer train 0)"
    if [ "$status" = wait ]; then
      trap 'echo "checkpoint written"; exit 42' TERM
      : >"$FAKE/training"
      while :; do sleep 1; done
    fi
    exit "$status" ;;
esac
""",
  "sudo": """
log "sudo $*"
case "$1" in
  mkdir | chown) exec "$@" ;;
  tee) cat >/dev/null ;;
esac
""",
  "gcsfuse": 'log "gcsfuse $*"; exit "$(answer gcsfuse 0)"',
  "fusermount": "exit 1",
  "mountpoint": "exit 1",
}


class Sandbox:
  """A copy of the repository's scripts, a PATH of its own and the fakes' log."""

  def __init__(self, root: Path, folder: Path):
    self.repo = folder / "repo"
    self.bin = folder / "bin"
    self.fake = folder / "fake"
    self.home = folder / "home"
    self._started: list[subprocess.Popen] = []
    for path in (self.repo, self.bin, self.fake, self.home):
      path.mkdir()
    shutil.copytree(root / "launch", self.repo / "launch")
    for name in ("requirements.txt", "pyproject.toml", "LICENSE", "README.md"):
      shutil.copy(root / name, self.repo / name)
    for name in ("insvp_jax", "configs"):
      (self.repo / name).mkdir()
    for tool in TOOLS.split():
      if path := shutil.which(tool):
        (self.bin / tool).symlink_to(path)
    (self.fake / "log").touch()

  def add(self, *names: str) -> None:
    for name in names:
      text = FAKES[name]
      if "{sleep}" in text or "{{" in text:
        text = text.format(sleep=shutil.which("sleep"), python=sys.executable)
      path = self.bin / name
      path.unlink(missing_ok=True)
      path.write_text(PRELUDE.format(bash=shutil.which("bash")) + text)
      path.chmod(0o755)

  def answers(self, name: str, *answers: object) -> None:
    (self.fake / name).write_text("".join(f"{answer}\n" for answer in answers))

  def start(self, script: str, *args: str, **env: str) -> subprocess.Popen:
    process = subprocess.Popen(
      [shutil.which("bash"), str(self.repo / "launch" / script), *args],
      cwd=self.repo,
      env={
        "PATH": str(self.bin),
        "HOME": str(self.home),
        "FAKE": str(self.fake),
        "INSVP_PYTHON": "python3.12",
        **env,
      },
      start_new_session=True,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    self._started.append(process)
    return process

  def kill(self) -> None:
    """Ends what a failed test left."""
    for process in self._started:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)

  def run(self, script: str, *args: str, **env: str) -> subprocess.CompletedProcess:
    return finish(self.start(script, *args, **env))

  def log(self, pattern: str = "") -> list[str]:
    """The calls that were logged, of those that match."""
    lines = (self.fake / "log").read_text().splitlines()
    return [line for line in lines if re.search(pattern, line)]

  def wait_for(self, name: str, process: subprocess.Popen) -> None:
    """Waits until a fake has made a file."""
    deadline = time.monotonic() + 30
    while not (self.fake / name).exists():
      assert process.poll() is None, process.communicate()
      assert time.monotonic() < deadline, self.log()
      time.sleep(0.01)


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
  try:
    out, err = process.communicate(timeout=60)
  except subprocess.TimeoutExpired:
    os.killpg(process.pid, signal.SIGKILL)
    raise
  return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def sandbox(root: Path, tmp_path: Path) -> Iterator[Sandbox]:
  sandbox = Sandbox(root, tmp_path)
  try:
    yield sandbox
  finally:
    sandbox.kill()


def check_refused(done: subprocess.CompletedProcess, reason: str) -> None:
  assert (done.returncode, done.stdout) == (2, ""), done
  assert len(done.stderr.splitlines()) == 1, done.stderr
  assert reason in done.stderr


# All scripts.


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse_and_stop_at_errors(script, root):
  subprocess.run(["bash", "-n", root / "launch" / script], check=True)
  lines = (root / "launch" / script).read_text().splitlines()
  assert lines[0] == "#!/usr/bin/env bash"
  assert "set -euo pipefail" in lines


def test_shellcheck(root):
  shellcheck = Path(sysconfig.get_path("scripts")) / "shellcheck"
  done = subprocess.run(
    [shellcheck, "-x", "-P", "SCRIPTDIR", *(f"launch/{name}" for name in SCRIPTS)],
    cwd=root,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr


def test_the_list_of_vtab_is_the_table_of_tasks(root):
  lines = (root / "launch" / "vtab.txt").read_text().splitlines()
  runs = [line.split() for line in lines if not line.startswith("#")]
  assert [name for name, _ in runs] == VTAB
  assert len(runs) == 19
  for name, argument in runs:
    assert argument == f"--config=configs/vtab.py:task={name}"


def test_the_readme_of_launch_names_what_is_there(root):
  text = (root / "launch" / "README.md").read_text()
  blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
  assert len(blocks) >= 4
  named = set(re.findall(r"launch/[\w.]+\w", text))
  scripts = ("tpu_pod.sh", "slurm.sbatch", "gke.sh")
  assert {f"launch/{name}" for name in scripts} <= named
  for path in named:
    assert (root / path).is_file(), path
  names = trees.flatten(config.defaults().to_dict())
  keys = {f"config.{name.replace('/', '.')}" for name in names}
  used = set(re.findall(r"--(config\.[\w.]+)", text))
  assert len(used) >= 5 and used <= keys, used - keys
  for script in scripts:
    source = (root / "launch" / script).read_text()
    block = "\n".join(block for block in blocks if script in block)
    for name in set(re.findall(r"\b([A-Z]{2,}[A-Z_]*)=", block)):
      assert re.search(rf"^#.*\b{name}\b", source, re.M), (script, name)


@pytest.mark.parametrize(
  "words",
  [
    ["plain", "--a=b", "x,y:z@1%+"],
    ["", "two words", "it's", "--c=('a', \"b\")", "$HOME `x` \\ * & ;"],
  ],
)
def test_quoted_words_come_back(words, root):
  code = '. "$0"; quoted "$@"'
  command = ["bash", "-c", code, root / "launch" / "common.sh", *words]
  line = subprocess.run(command, capture_output=True, text=True, check=True).stdout
  assert shlex.split(line) == words
  code = '. "$0"; split_run "name $1"; printf "<%s>" "${run_args[@]}"'
  command = ["bash", "-c", code, root / "launch" / "common.sh", line.rstrip("\n")]
  found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
  assert found == "".join(f"<{word}>" for word in words)


# TPU VMs.

TPU = {
  "TPU_NAME": "insvp",
  "ZONE": "us-west4-a",
  "ACCELERATOR": "v5litepod-16",
  "RUNTIME": "v2-alpha-tpuv5-lite",
  "BUCKET": "my-bucket",
}
CONFIG = "--config=configs/vtab.py:task=cifar100"
DRY_TPU = """\
# Unless there is one; one that was preempted or has failed is deleted first:
gcloud compute tpus queued-resources create insvp --node-id=insvp \
--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite \
--zone=us-west4-a --quiet --project=mine --spot --internal-ips --network=n
# When it is ready:
gcloud compute tpus tpu-vm scp insvp_jax.tgz insvp:insvp_jax.tgz --worker=all \
--zone=us-west4-a --quiet --project=mine
# On each worker, here the first of several; again after statuses 42, 137, 143:
gcloud compute tpus tpu-vm ssh insvp --worker=0 --ssh-flag=-oServerAliveInterval=15 \
--ssh-flag=-oServerAliveCountMax=4 '--command=rm -rf .insvp_jax/code.new && \
mkdir -p .insvp_jax/code.new && tar -xzf insvp_jax.tgz -C .insvp_jax/code.new && \
rm -rf .insvp_jax/code && mv .insvp_jax/code.new .insvp_jax/code && env WORKER=0 \
BUCKET=my-bucket MOUNT=/mnt/insvp WORKDIR=/mnt/insvp/runs/insvp \
ACCELERATOR=v5litepod-16 bash .insvp_jax/code/launch/tpu_worker.sh \
--config=configs/vtab.py:task=cifar100 --config.multihost=True' \
--zone=us-west4-a --quiet --project=mine
# At the end, by this script:
gcloud compute tpus queued-resources delete insvp --force --zone=us-west4-a --quiet \
--project=mine
"""


def run_tpu(sandbox: Sandbox, *flags: str, **env: str) -> subprocess.CompletedProcess:
  sandbox.add("gcloud", "sleep")
  return sandbox.run("tpu_pod.sh", *flags, "--", CONFIG, **TPU, **env)


def test_tpu_dry_run(sandbox):
  flags = ("--queued", "--spot", "--delete_at_end", "--dry_run", "--")
  more = {"PROJECT": "mine", "CREATE_FLAGS": "--internal-ips --network=n"}
  done = sandbox.run("tpu_pod.sh", *flags, CONFIG, **TPU, **more)
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout == DRY_TPU
  done = sandbox.run("tpu_pod.sh", "--dry_run", "--", CONFIG, **TPU)
  lines = done.stdout.splitlines()
  assert lines[1] == (
    "gcloud compute tpus tpu-vm create insvp --accelerator-type=v5litepod-16 "
    "--version=v2-alpha-tpuv5-lite --zone=us-west4-a --quiet"
  )
  assert lines[-1] == (
    "gcloud compute tpus tpu-vm delete insvp --zone=us-west4-a --quiet"
  )


@pytest.mark.parametrize("name", ["TPU_NAME", "ZONE", "ACCELERATOR", "RUNTIME"])
def test_tpu_missing_variable(name, sandbox):
  sandbox.add("gcloud")
  env = {key: value for key, value in TPU.items() if key != name}
  check_refused(sandbox.run("tpu_pod.sh", "--", CONFIG, **env), f"Set {name}: the ")
  assert sandbox.log() == []


@pytest.mark.parametrize(
  ("args", "env", "reason"),
  [
    (("--spott", "--", CONFIG), {}, "Unknown flag --spott; there are --queued, "),
    ((CONFIG,), {}, "goes after --"),
    (("--spot",), {}, "Nothing to train"),
    (("--", CONFIG, "--workdir=x"), {}, "Set WORKDIR instead of --workdir=x"),
    (("--", CONFIG), {"WORKDIR": "gs://b/x"}, "WORKDIR is gs://b/x, a URL"),
    (("--", CONFIG), {"BUCKET": ""}, "Set BUCKET, or WORKDIR"),
    (("--", CONFIG), {"MAX_RESTARTS": "many"}, "MAX_RESTARTS is 'many'"),
    (("--", CONFIG), {}, "There is no gcloud on PATH"),
  ],
)
def test_tpu_bad_input(args, env, reason, sandbox):
  check_refused(sandbox.run("tpu_pod.sh", *args, **{**TPU, **env}), reason)


def test_tpu_is_created_trains_and_stays(sandbox):
  sandbox.answers("states", "MISSING", "CREATING", "READY")
  done = run_tpu(sandbox, "--spot")
  assert done.returncode == 0, done.stderr
  create, copy, train = sandbox.log("^gcloud")
  assert " tpu-vm create insvp " in create and create.endswith(" --spot")
  assert " tpu-vm scp " in copy and " --worker=all " in copy
  assert "--config.multihost=False" in train
  assert done.stdout.splitlines() == [
    "[worker 0] hello from 0",
    "[worker 0] and on",
    "[worker 0] insvp_jax: worker ended with status 0",
    "[worker 0] ERROR: gcloud says so",
    "[worker 0] insvp_jax: ssh ended with status 0",
  ]
  log = (sandbox.repo / "runs/logs/insvp/worker_0.log").read_text()
  assert log == done.stdout.replace("[worker 0] ", "")
  assert "Done: /mnt/insvp/runs/insvp" in done.stderr
  assert done.stderr.splitlines()[-2:] == [
    "[tpu_pod] insvp is still there, and is billed. To delete it:",
    "gcloud compute tpus tpu-vm delete insvp --zone=us-west4-a --quiet",
  ]
  with tarfile.open(sandbox.fake / "code.tgz") as archive:
    names = set(archive.getnames())
  assert names >= {"insvp_jax", "configs", "launch/tpu_worker.sh", "README.md"}


def test_tpu_existing_one_is_used_and_deleted_when_asked(sandbox):
  done = run_tpu(sandbox, "--delete_at_end")
  assert done.returncode == 0, done.stderr
  calls = [line.split()[4] for line in sandbox.log("^gcloud")]
  assert calls == ["scp", "ssh", "delete"]


def test_tpu_restarts_on_42_with_the_same_workdir(sandbox):
  sandbox.answers("ssh_0", 42, 42, 0)
  done = run_tpu(sandbox, BACKOFF_SECONDS="8", MAX_BACKOFF_SECONDS="15")
  assert done.returncode == 0, done.stderr
  trainings = sandbox.log("^gcloud .* ssh ")
  assert len(trainings) == 3 and len(set(trainings)) == 1
  assert [line for line in sandbox.log("^sleep") if line != "sleep 1"] == [
    "sleep 8",
    "sleep 15",
  ]


def test_tpu_restarts_are_bounded(sandbox):
  sandbox.answers("ssh_0", 42)
  done = run_tpu(sandbox, MAX_RESTARTS="2", BACKOFF_SECONDS="3")
  assert done.returncode == 1
  assert len(sandbox.log("^gcloud .* ssh ")) == 3
  assert "Restarted 2 times; the same command goes on." in done.stderr


@pytest.mark.parametrize("status", [2, 1, 130])
def test_tpu_does_not_restart_what_would_fail_again(status, sandbox):
  sandbox.answers("ssh_0", status)
  done = run_tpu(sandbox)
  assert done.returncode == status
  assert len(sandbox.log("^gcloud .* ssh ")) == 1
  assert f"Ended with status {status}, see runs/logs/insvp." in done.stderr


def test_tpu_error_on_a_preempted_machine_restarts(sandbox):
  # gcloud fails with 1 too when the TPU is gone.
  sandbox.answers("ssh_0", 1, 0)
  sandbox.answers("states", "READY", "PREEMPTED", "PREEMPTED", "MISSING", "READY")
  done = run_tpu(sandbox)
  assert done.returncode == 0, done.stderr
  calls = [line.split()[4] for line in sandbox.log("^gcloud")]
  assert calls == ["scp", "ssh", "delete", "create", "scp", "ssh"]


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_queued_resource_is_deleted_and_asked_for_again(state, sandbox):
  sandbox.answers(
    "states",
    "MISSING",
    "WAITING_FOR_RESOURCES",
    "PROVISIONING",
    "ACTIVE",
    # The machine is taken away.
    "SUSPENDING",
    state,
    "MISSING",
    "WAITING_FOR_RESOURCES",
    "ACTIVE",
  )
  sandbox.answers("ssh_0", "lost", 0)
  done = run_tpu(sandbox, "--queued", "--spot", POLL_SECONDS="7")
  assert done.returncode == 0, done.stderr
  calls = [" ".join(line.split()[3:5]) for line in sandbox.log("^gcloud")]
  assert calls == [
    "queued-resources create",
    "tpu-vm scp",
    "tpu-vm ssh",
    "queued-resources delete",
    "queued-resources create",
    "tpu-vm scp",
    "tpu-vm ssh",
  ]
  assert all(" --force " in line for line in sandbox.log(" delete "))
  assert len(sandbox.log("^sleep 7$")) == 4
  # Of three workdirs there is one.
  assert len({re.findall(r"WORKDIR=\S+", x)[0] for x in sandbox.log(" ssh ")}) == 1


def test_tpu_no_capacity_is_tried_again_but_a_refusal_is_final(sandbox):
  sandbox.answers("states", "MISSING")
  sandbox.answers("create_errors", "ERROR: RESOURCE_EXHAUSTED", "PERMISSION_DENIED")
  done = run_tpu(sandbox)
  assert done.returncode == 2
  assert len(sandbox.log(" create ")) == 2
  assert "PERMISSION_DENIED\ngcloud refuses to create insvp, see above." in done.stderr
  assert "billed" not in done.stderr


def test_tpu_unknown_state_ends_it(sandbox):
  sandbox.answers("states", "ERROR: no active account")
  done = run_tpu(sandbox)
  assert done.returncode == 1
  assert "ERROR: no active account\ngcloud cannot tell the state" in done.stderr


def test_tpu_failed_copy_restarts(sandbox):
  sandbox.answers("scp", 1, 0)
  assert run_tpu(sandbox).returncode == 0
  assert len(sandbox.log(" scp ")) == 2


def test_tpu_every_worker_has_its_log_and_its_number(sandbox):
  sandbox.answers("workers", "10.0.0.1;10.0.0.2;10.0.0.3")
  done = run_tpu(sandbox)
  assert done.returncode == 0, done.stderr
  for worker in range(3):
    assert f"[worker {worker}] hello from {worker}" in done.stdout
    log = (sandbox.repo / f"runs/logs/insvp/worker_{worker}.log").read_text()
    assert re.findall(r"hello from \d", log) == [f"hello from {worker}"]
    (call,) = sandbox.log(f" --worker={worker} ")
    assert f"WORKER={worker} " in call and "--config.multihost=True" in call


@pytest.mark.parametrize(
  ("first", "second", "status", "trainings"),
  [
    # JAX ends the others with 1 when one is lost.
    ((42, 0), (1, 0), 0, 4),
    (("lost", 0), (1, 0), 0, 4),
    ((42,), (2,), 2, 2),
    ((2,), (42,), 2, 2),
    ((0,), (1,), 1, 2),
  ],
)
def test_tpu_what_the_workers_say_together(first, second, status, trainings, sandbox):
  sandbox.answers("workers", "10.0.0.1;10.0.0.2")
  sandbox.answers("ssh_0", *first)
  sandbox.answers("ssh_1", *second)
  assert run_tpu(sandbox).returncode == status
  assert len(sandbox.log("^gcloud .* ssh ")) == trainings


def test_tpu_one_failed_worker_stops_the_others(sandbox):
  sandbox.answers("workers", "10.0.0.1;10.0.0.2")
  sandbox.answers("ssh_0", "hang")
  sandbox.answers("ssh_1", 1)
  done = run_tpu(sandbox, GRACE_SECONDS="0")
  # The 42 that the first one ends with is only its answer to being stopped.
  assert done.returncode == 1, done.stderr
  assert "A worker has ended with status 1: stopping the others." in done.stderr


@pytest.mark.parametrize(
  ("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 42)]
)
def test_tpu_signal_stops_the_workers_after_a_checkpoint(signum, status, sandbox):
  sandbox.add("gcloud", "sleep")
  sandbox.answers("ssh_0", "hang")
  process = sandbox.start("tpu_pod.sh", "--delete_at_end", "--", CONFIG, **TPU)
  sandbox.wait_for("hanging", process)
  os.kill(process.pid, signum)
  done = finish(process)
  assert done.returncode == status, done.stderr
  assert "insvp_jax: worker ended with status 42" in done.stdout
  assert len(sandbox.log("^gcloud .* ssh ")) == 1
  assert len(sandbox.log(" delete ")) == 1


# One worker of a TPU VM.


class Worker:
  """The folder that tpu_pod.sh makes on a worker, and the variables it passes."""

  def __init__(self, sandbox: Sandbox):
    self.sandbox = sandbox
    sandbox.add("python3.12", "sudo", "gcsfuse", "fusermount", "mountpoint", "sleep")
    self.base = sandbox.home / ".insvp_jax"
    self.base.mkdir()
    self.mount = sandbox.home / "mount"
    self.workdir = self.mount / "runs" / "insvp"
    sandbox.repo = sandbox.repo.rename(self.base / "code")

  def start(self, *args: str, **env: str) -> subprocess.Popen:
    settings = {
      "WORKER": "3",
      "BUCKET": "my-bucket",
      "MOUNT": str(self.mount),
      "WORKDIR": str(self.workdir),
      "ACCELERATOR": "v5litepod-16",
    }
    return self.sandbox.start("tpu_worker.sh", *args, **{**settings, **env})


@pytest.fixture
def worker(sandbox: Sandbox) -> Worker:
  return Worker(sandbox)


def test_worker_mounts_sets_up_once_and_trains(worker):
  done = finish(worker.start(CONFIG, "--config.x=two words"))
  assert done.returncode == 0, done.stderr
  log = worker.sandbox.log
  (mount,) = log("^gcsfuse")
  assert mount.startswith("gcsfuse --implicit-dirs --rename-dir-limit=100000 ")
  assert mount.endswith(f" my-bucket {worker.mount}")
  assert log("^main") == [
    f"main {CONFIG} --config.x=two words --workdir={worker.workdir}"
  ]
  (install,) = log("^pip -m pip install")
  assert install.endswith(" -r requirements.txt -e .[tpu]")
  assert log("^cache") == [f"cache {worker.mount}/.cache/jax/v5litepod-16"]
  assert done.stdout.splitlines() == ["step 1", "insvp_jax: worker ended with status 0"]
  assert (worker.workdir / "logs/worker_3.log").read_text() == "step 1\n"
  # The code is copied afresh for each attempt; the environment stays.
  assert finish(worker.start(CONFIG)).returncode == 0
  assert len(log("^pip -m pip install")) == 1
  assert (worker.workdir / "logs/worker_3.log").read_text() == "step 1\nstep 1\n"


def test_the_extra_for_tpus_is_there(root):
  extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]
  assert extras["optional-dependencies"]["tpu"][0].startswith("jax[tpu]>=")
  for script in ("tpu_worker.sh", "Dockerfile"):
    assert "INSVP_EXTRAS=tpu" in (root / "launch" / script).read_text()


@pytest.mark.parametrize("status", [42, 2])
def test_worker_passes_the_status_on(status, worker):
  worker.sandbox.answers("train", status)
  done = finish(worker.start(CONFIG))
  assert done.returncode == status
  last = done.stdout.splitlines()[-1]
  assert last == f"insvp_jax: worker ended with status {status}"


def test_worker_without_data_does_not_train(worker):
  done = finish(worker.start(CONFIG, "--config.data.root=/no/such.zip"))
  assert done.returncode == 2
  assert "has no /no/such.zip, named by --config.data.root." in done.stderr
  assert done.stdout == "insvp_jax: worker ended with status 2\n"
  assert worker.sandbox.log("^(pip|main)") == []


def test_worker_whose_bucket_is_refused(worker):
  worker.sandbox.answers("gcsfuse", 1)
  done = finish(worker.start(CONFIG))
  assert done.returncode == 2
  assert "Cannot mount the bucket my-bucket" in done.stderr


def test_worker_stop_makes_a_checkpoint(worker):
  worker.sandbox.answers("train", "wait")
  process = worker.start(CONFIG)
  worker.sandbox.wait_for("training", process)
  assert finish(worker.sandbox.start("tpu_worker.sh", "--stop")).returncode == 0
  done = finish(process)
  assert done.returncode == 42
  assert "checkpoint written" in done.stdout


def test_worker_that_is_stopped_while_it_installs_does_not_train(worker):
  worker.sandbox.answers("pip", "wait")
  process = worker.start(CONFIG)
  worker.sandbox.wait_for("installing", process)
  assert finish(worker.sandbox.start("tpu_worker.sh", "--stop")).returncode == 0
  (worker.sandbox.fake / "installed").touch()
  done = finish(process)
  assert done.returncode == 42
  assert "Stopped before the training began." in done.stderr
  assert worker.sandbox.log("^main") == []


def test_worker_ends_what_was_left_running_and_nothing_else(worker):
  worker.sandbox.answers("train", "wait", 0)
  first = worker.start(CONFIG)
  worker.sandbox.wait_for("training", first)
  second = finish(worker.start(CONFIG))
  assert second.returncode == 0, second.stderr
  assert "insvp_jax: stopping process" in second.stdout
  assert finish(first).returncode == 42
  # The number may belong to another program by now.
  other = subprocess.Popen(["sleep", "60"])
  try:
    (worker.base / "trainer.pid").write_text(f"{other.pid}\n")
    third = finish(worker.start(CONFIG))
    assert third.returncode == 0 and "stopping" not in third.stdout
    assert other.poll() is None
  finally:
    other.kill()
    other.wait()


def test_worker_that_is_to_be_shut_down_lets_the_trainer_finish(worker):
  worker.sandbox.answers("train", "wait")
  process = worker.start(CONFIG)
  worker.sandbox.wait_for("training", process)
  # All processes of a machine that is taken away are told at once.
  os.killpg(process.pid, signal.SIGTERM)
  done = finish(process)
  assert done.returncode == 42
  lines = (worker.workdir / "logs/worker_3.log").read_text().splitlines()
  assert (lines[0], lines[-1]) == ("step 1", "checkpoint written")


def test_worker_needs_its_variables(worker):
  done = finish(worker.start(CONFIG, WORKDIR=""))
  check_refused(done, "Set WORKDIR: where the run goes.")


# Slurm.

SLURM = {
  "SLURM_JOB_ID": "71",
  "SLURM_JOB_NAME": "insvp_jax",
  "SLURM_NTASKS_PER_NODE": "4",
  "SLURM_GPUS_ON_NODE": "4",
  "SLURM_CPUS_PER_TASK": "8",
}
ARRAY = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "1"}
SRUN = (
  "srun --ntasks-per-node=4 --kill-on-bad-exit=0 --wait=300 --cpus-per-task=8 "
  "--open-mode=append --output={workdir}/logs/task_%t.log bash launch/local.sh "
  "{args} --workdir={workdir}"
)


def run_slurm(sandbox: Sandbox, *args: str, **env: str) -> subprocess.CompletedProcess:
  sandbox.add("srun", "squeue", "scontrol", "sleep", "python3.12")
  return sandbox.run("slurm.sbatch", *args, **{**SLURM, **env})


def test_slurm_asks_to_be_requeued_and_warned(root):
  lines = (root / "launch/slurm.sbatch").read_text().splitlines()
  directives = [line for line in lines if line.startswith("#SBATCH")]
  # Slurm reads them up to the first command.
  assert lines[1 : 1 + len(directives)] == directives
  assert {"#SBATCH --requeue", "#SBATCH --signal=B:TERM@120"} <= {*directives}
  assert "#SBATCH --open-mode=append" in directives


def test_slurm_dry_run(sandbox):
  done = sandbox.run("slurm.sbatch", "--dry_run", "--", CONFIG, **SLURM)
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout == SRUN.format(args=CONFIG, workdir="runs/insvp_jax") + "\n"
  assert not (sandbox.repo / "runs").exists()


def test_slurm_trains(sandbox):
  done = run_slurm(sandbox, "--", CONFIG, WORKDIR="/tmp/../tmp")
  assert done.returncode == 0, done.stderr
  assert sandbox.log("^srun") == [SRUN.format(args=CONFIG, workdir="/tmp/../tmp")]
  assert sandbox.log("^(squeue|scontrol)") == []
  assert len(sandbox.log("^pip -m pip install")) == 1


def test_slurm_array_maps_to_the_list_of_runs(sandbox):
  (sandbox.repo / "runs.txt").write_text(
    "# two methods\n\na/first --config=a.py\nb/second --config.x='two words'"
  )
  done = run_slurm(sandbox, "--", "--config.seed=3", RUNS="runs.txt", **ARRAY)
  assert done.returncode == 0, done.stderr
  args = "--config.x=two words --config.seed=3"
  expected = SRUN.format(args=args, workdir="runs/insvp_jax/b/second")
  assert sandbox.log("^srun") == [expected]
  assert (sandbox.repo / "runs/insvp_jax/b/second/logs").is_dir()


def test_slurm_array_covers_vtab(sandbox):
  for index, name in ((0, "caltech101"), (18, "smallnorb_elevation")):
    env = {**ARRAY, "SLURM_ARRAY_TASK_ID": str(index), "RUNS": "launch/vtab.txt"}
    done = sandbox.run("slurm.sbatch", "--dry_run", "--", **SLURM, **env)
    args = f"--config=configs/vtab.py:task={name}"
    expected = SRUN.format(args=args, workdir=f"runs/insvp_jax/{name}")
    assert done.stdout == expected + "\n"


@pytest.mark.parametrize("array", [False, True])
def test_slurm_requeues_after_42(array, sandbox):
  sandbox.answers("srun", 42)
  env = {**ARRAY, "RUNS": "launch/vtab.txt"} if array else {}
  done = run_slurm(sandbox, "--", CONFIG, SLURM_RESTART_COUNT="3", **env)
  assert done.returncode == 42
  job = "70_1" if array else "71"
  assert sandbox.log("^scontrol") == [f"scontrol requeue {job}"]
  assert sandbox.log("^squeue") == [f"squeue --noheader --jobs={job} --format=%T"]


@pytest.mark.parametrize("status", [1, 2, 130, 137])
def test_slurm_does_not_requeue_other_ends(status, sandbox):
  sandbox.answers("srun", status)
  done = run_slurm(sandbox, "--", CONFIG)
  assert done.returncode == status
  assert sandbox.log("^scontrol") == []


def test_slurm_does_not_bring_back_what_was_cancelled(sandbox):
  sandbox.answers("srun", 42)
  sandbox.answers("squeue", "COMPLETING")
  assert run_slurm(sandbox, "--", CONFIG).returncode == 42
  assert sandbox.log("^scontrol") == []


def test_slurm_requeues_are_bounded(sandbox):
  sandbox.answers("srun", 42)
  done = run_slurm(sandbox, "--", CONFIG, SLURM_RESTART_COUNT="5", MAX_RESTARTS="5")
  assert done.returncode == 1
  assert "Queued again 5 times already" in done.stderr
  assert sandbox.log("^scontrol") == []


def test_slurm_says_so_when_the_job_cannot_be_queued_again(sandbox):
  sandbox.answers("srun", 42)
  sandbox.answers("scontrol", 1)
  done = run_slurm(sandbox, "--", CONFIG)
  assert done.returncode == 42
  assert "Slurm does not queue job 71 again" in done.stderr


def test_slurm_forwards_term_and_requeues(sandbox):
  sandbox.add("srun", "squeue", "scontrol", "sleep", "python3.12")
  sandbox.answers("srun", "wait")
  process = sandbox.start("slurm.sbatch", "--", CONFIG, **SLURM)
  sandbox.wait_for("waiting", process)
  # As --signal=B:TERM@120 does: to the batch script alone.
  os.kill(process.pid, signal.SIGTERM)
  done = finish(process)
  assert done.returncode == 42, done.stderr
  assert sandbox.log("^srun got TERM") == ["srun got TERM"]
  assert sandbox.log("^scontrol") == ["scontrol requeue 71"]


@pytest.mark.parametrize(
  ("args", "env", "reason"),
  [
    (("--", CONFIG), {"INSVP_ROOT": "/tmp"}, "/tmp is not the repository"),
    (("--dry", "--", CONFIG), {}, "Unknown flag --dry; there are --dry_run."),
    (("--",), {}, "Nothing to train"),
    (("--", CONFIG), ARRAY, "An array of jobs needs RUNS"),
    (("--",), {"RUNS": "launch/vtab.txt"}, "use sbatch --array=0-18."),
    (
      ("--",),
      {**ARRAY, "RUNS": "launch/vtab.txt", "SLURM_ARRAY_TASK_ID": "19"},
      "lists 19 runs, and this is number 19",
    ),
    (("--",), {**ARRAY, "RUNS": "no.txt"}, "There is no list of runs no.txt"),
    (("--",), {**ARRAY, "RUNS": "LICENSE"}, " twice; each run needs its own name."),
    (("--", CONFIG), {"WORKDIR": "s3://x"}, "WORKDIR is s3://x, a URL"),
    (("--", CONFIG, "--config.data.root=/no.zip"), {}, "has no /no.zip, named by"),
    (("--", CONFIG), {"SLURM_GPUS_PER_TASK": "1"}, "not --gpus-per-task"),
    (
      ("--", CONFIG),
      {"SLURM_GPUS_ON_NODE": "8"},
      "4 processes for 8 GPUs on a node: use sbatch --gpus-per-node=8",
    ),
  ],
)
def test_slurm_bad_input(args, env, reason, sandbox):
  check_refused(run_slurm(sandbox, *args, **env), reason)
  assert sandbox.log("^srun") == []


def test_slurm_needs_srun(sandbox):
  done = sandbox.run("slurm.sbatch", "--", CONFIG)
  check_refused(done, "There is no srun on PATH")


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    ("", "runs.txt lists no runs."),
    ("# nothing\n \n", "runs.txt lists no runs."),
    ("a --x='1\n", "The quotes do not match in this run: a --x='1"),
    ("../a --x=1\n", "'../a' cannot be the name of a run"),
    ("--x=1 a\n", "'--x=1' cannot be the name of a run"),
  ],
)
def test_bad_list_of_runs(text, reason, sandbox):
  (sandbox.repo / "runs.txt").write_text(text)
  env = {**ARRAY, "SLURM_ARRAY_TASK_ID": "0", "RUNS": "runs.txt"}
  check_refused(sandbox.run("slurm.sbatch", "--dry_run", "--", **env), reason)


# GKE.

GKE = {
  "NAME": "insvp",
  "IMAGE": "us-docker.pkg.dev/p/r/insvp_jax:1",
  "BUCKET": "my-bucket",
  "ACCELERATOR": "tpu-v5-lite-podslice",
  "TOPOLOGY": "4x4",
  "CHIPS": "4",
}
ONE_HOST = {**GKE, "TOPOLOGY": "2x4", "CHIPS": "8"}


def rendered(sandbox: Sandbox, *args: str, **env: str) -> dict:
  done = sandbox.run("gke.sh", "--dry_run", *args, **env)
  assert (done.returncode, done.stderr) == (0, ""), done
  assert "${" not in done.stdout
  return yaml.safe_load(done.stdout)


def parts(jobset: dict) -> tuple[dict, dict, dict, dict[str, str]]:
  """The Job, the pod, its container and the container's environment."""
  (replicated,) = jobset["spec"]["replicatedJobs"]
  assert replicated["replicas"] == 1
  job = replicated["template"]["spec"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  return job, pod, container, {v["name"]: v["value"] for v in container["env"]}


def test_gke_one_run_on_several_hosts(sandbox):
  jobset = rendered(sandbox, "--", CONFIG, "--config.x=it's", **GKE)
  assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  assert jobset["kind"] == "JobSet"
  assert jobset["metadata"] == {
    "name": "insvp",
    "namespace": "default",
    "labels": {"app.kubernetes.io/name": "insvp-jax"},
    "annotations": {
      "insvp-jax/workdir": "runs/insvp",
      "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool",
    },
  }
  assert jobset["spec"]["failurePolicy"] == {
    "maxRestarts": 50,
    "rules": [
      {
        "name": "final",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy", "FailedIndexes"],
      }
    ],
  }
  job, pod, container, env = parts(jobset)
  assert {key: job[key] for key in job if key != "template"} == {
    "completionMode": "Indexed",
    "completions": 4,
    "parallelism": 4,
    "backoffLimit": 0,
    "podFailurePolicy": {
      "rules": [
        {
          "action": "Count",
          "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
        },
        {
          "action": "FailJob",
          "onExitCodes": {
            "containerName": "train",
            "operator": "NotIn",
            "values": [1, 42, 134, 137, 143],
          },
        },
      ]
    },
  }
  # Kubernetes wants it for a podFailurePolicy.
  assert pod["restartPolicy"] == "Never"
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
    "cloud.google.com/gke-tpu-topology": "4x4",
    "cloud.google.com/gke-provisioning": "standard",
  }
  assert container["name"] == "train"
  assert container["image"] == GKE["IMAGE"]
  assert container["command"] == ["bash", "launch/gke_worker.sh"]
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  assert env["WORKDIR"] == "/mnt/insvp/runs/insvp"
  assert env["HOSTS"] == "4"
  assert env["RUN_LIST"] == f". {CONFIG} '--config.x=it'\\''s'\n"
  (volume,) = pod["volumes"]
  assert volume["csi"] == {
    "driver": "gcsfuse.csi.storage.gke.io",
    "volumeAttributes": {
      "bucketName": "my-bucket",
      "mountOptions": "implicit-dirs,file-system:rename-dir-limit:100000,"
      "metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0",
    },
  }


def test_gke_list_of_runs_is_one_indexed_job(sandbox):
  more = {"QUEUE": "team", "PARALLELISM": "5", "MAX_RESTARTS": "9", "NAMESPACE": "ml"}
  args = ("--spot", "--runs=launch/vtab.txt", "--", "--config.method=vpt_deep")
  jobset = rendered(sandbox, *args, **ONE_HOST, **more)
  assert jobset["metadata"]["namespace"] == "ml"
  assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
  assert jobset["metadata"]["annotations"] == {"insvp-jax/workdir": "runs/insvp"}
  job, pod, _, env = parts(jobset)
  assert (job["completions"], job["parallelism"]) == (19, 5)
  # One run that fails leaves the others alone, and starts again alone.
  assert job["backoffLimitPerIndex"] == 9 and "backoffLimit" not in job
  disruption, error = job["podFailurePolicy"]["rules"]
  assert disruption["action"] == "Ignore"
  assert error["action"] == "FailIndex"
  assert error["onExitCodes"]["operator"] == "NotIn"
  assert error["onExitCodes"]["values"] == [42, 137, 143]
  assert pod["nodeSelector"]["cloud.google.com/gke-provisioning"] == "spot"
  assert env["HOSTS"] == "1"
  assert env["RUN_LIST"].splitlines() == [
    f"{name} --config=configs/vtab.py:task={name} --config.method=vpt_deep"
    for name in VTAB
  ]


@pytest.mark.parametrize("name", [*GKE])
def test_gke_missing_variable(name, sandbox):
  env = {key: value for key, value in GKE.items() if key != name}
  check_refused(sandbox.run("gke.sh", "--dry_run", "--", CONFIG, **env), f"Set {name}:")


@pytest.mark.parametrize(
  ("args", "env", "reason"),
  [
    (("--dryrun", "--", CONFIG), {}, "Unknown flag --dryrun; there are --runs=FILE"),
    (("--runs=", "--", CONFIG), {}, "Unknown flag --runs="),
    (("--",), {}, "Nothing to train"),
    (("--", CONFIG), {"NAME": "Upper_case"}, "NAME is Upper_case, expected"),
    (("--", CONFIG), {"NAME": "n" * 41}, "expected at most 40"),
    (("--", CONFIG), {"TOPOLOGY": "4xfour"}, "TOPOLOGY is '4xfour', expected whole"),
    (("--", CONFIG), {"TOPOLOGY": "*"}, "TOPOLOGY is '*', expected whole"),
    (("--", CONFIG), {"CHIPS": "08"}, "CHIPS is '08', expected a whole number"),
    (("--", CONFIG), {"NAMESPACE": "a: b"}, "NAMESPACE is 'a: b', expected a name"),
    (("--", CONFIG), {"CHIPS": "3"}, "has 16 chips, no multiple of CHIPS, 3"),
    (("--", CONFIG), {"CHIPS": "0"}, "has 16 chips, no multiple of CHIPS, 0"),
    (("--", CONFIG), {"WORKDIR": "/abs"}, "WORKDIR is /abs, expected a path in"),
    (("--", CONFIG), {"WORKDIR": "gs://b/x"}, "WORKDIR is gs://b/x, a URL"),
    (("--", CONFIG), {"IMAGE": "a\nb: c"}, "IMAGE is"),
    (("--runs=launch/vtab.txt", "--"), {}, "Each run of a list gets one host"),
    (("--", CONFIG), {}, "There is no kubectl on PATH"),
  ],
)
def test_gke_bad_input(args, env, reason, sandbox):
  done = sandbox.run("gke.sh", *args, **{**GKE, **env})
  if "\n" in env.get("IMAGE", ""):
    assert done.returncode == 2 and "a character that it cannot have" in done.stderr
  else:
    check_refused(done, reason)


def test_gke_creates_what_it_prints(sandbox):
  sandbox.add("kubectl")
  printed = sandbox.run("gke.sh", "--dry_run", "--", CONFIG, **GKE).stdout
  done = sandbox.run("gke.sh", "--", CONFIG, **GKE)
  assert done.returncode == 0, done.stderr
  assert (sandbox.fake / "created.yaml").read_text() == printed
  assert sandbox.log("^kubectl create") == ["kubectl create -f -"]
  assert "It trains into gs://my-bucket/runs/insvp." in done.stdout
  assert "kubectl delete jobset insvp --namespace=default" in done.stdout


def test_gke_existing_jobset_is_left_alone(sandbox):
  sandbox.add("kubectl")
  sandbox.answers("kubectl_get", "jobset.jobset.x-k8s.io/insvp")
  done = sandbox.run("gke.sh", "--", CONFIG, **GKE)
  check_refused(done, "kubectl delete jobset insvp --namespace=default; then the same")
  assert sandbox.log("^kubectl create") == []


def test_gke_failing_kubectl(sandbox):
  sandbox.add("kubectl")
  sandbox.answers("kubectl_create", 1)
  done = sandbox.run("gke.sh", "--", CONFIG, **GKE)
  assert (done.returncode, done.stdout) == (1, "")
  assert done.stderr == "kubectl failed, see above.\n"


def run_pod(sandbox: Sandbox, jobset: dict, index: int, **env: str):
  """Runs what a pod of the JobSet would run, with its environment."""
  sandbox.add("python3.12", "sleep")
  settings = parts(jobset)[-1]
  settings["WORKDIR"] = settings["WORKDIR"].replace("/mnt/insvp", str(sandbox.home))
  settings["JOB_COMPLETION_INDEX"] = str(index)
  settings["MEGASCALE_NUM_SLICES"] = "19"
  settings["TPU_WORKER_HOSTNAMES"] = "a,b,c,d"
  return sandbox.run("gke_worker.sh", **{**settings, **env})


def test_gke_pod_of_a_list_trains_its_run_alone(sandbox):
  (sandbox.repo / "runs.txt").write_text("a --x=1\nb/seed0 --config.y='it is'\n")
  args = ("--runs=runs.txt", "--", "--config.z=it's")
  jobset = rendered(sandbox, *args, **ONE_HOST)
  done = run_pod(sandbox, jobset, 1)
  assert done.returncode == 0, done.stderr
  workdir = sandbox.home / "runs/insvp/b/seed0"
  assert sandbox.log("^main") == [
    f"main --config.y=it is --config.z=it's --workdir={workdir} "
    "--config.multihost=False"
  ]
  # Otherwise JAX would wait for the pods of the other runs.
  assert sandbox.log("^multihost") == ["multihost localhost "]
  assert workdir.is_dir()
  check_refused(run_pod(sandbox, jobset, 2), "RUN_LIST has no line for pod 2.")


def test_gke_pods_of_one_run_train_together(sandbox):
  jobset = rendered(sandbox, "--", CONFIG, **GKE)
  sandbox.answers("train", 42)
  done = run_pod(sandbox, jobset, 3)
  assert done.returncode == 42, done.stderr
  assert sandbox.log("^main") == [
    f"main {CONFIG} --workdir={sandbox.home}/runs/insvp --config.multihost=True"
  ]
  assert sandbox.log("^multihost") == ["multihost a,b,c,d 19"]


def test_gke_pod_without_data_fails_for_good(sandbox):
  jobset = rendered(sandbox, "--", CONFIG, "--config.data.data_dir=/no/tfds", **GKE)
  check_refused(run_pod(sandbox, jobset, 0), "has no /no/tfds, named by --config.data")


def test_the_image_holds_what_the_scripts_use(root):
  lines = (root / "launch/Dockerfile").read_text().splitlines()
  copied = {word for x in lines if x.startswith("COPY") for word in x.split()[1:-1]}
  script = (root / "launch/tpu_pod.sh").read_text()
  packed = re.search(r'-C "\$root" \\\n +(.*) \|\|', script)[1].split()
  assert copied == {*packed}
  for name in copied:
    assert (root / name).exists(), name

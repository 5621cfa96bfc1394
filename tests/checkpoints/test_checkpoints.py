import errno
import functools
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys

import flax
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from insvp_jax import trees
from insvp_jax.checkpoints import checkpointer as checkpointer_lib
from insvp_jax.checkpoints import files
from insvp_jax.checkpoints.checkpointer import Checkpointer
from insvp_jax.checkpoints.files import find_steps, read_arrays, read_json
from insvp_jax.distributed import mesh as mesh_lib

META = {
  "format": 1,
  "backbone": {"id": "boxed", "sha256": "aa"},
  "method": "insvp",
  "class_names": ["cat", "dog"],
}
TRAINABLE = ["prompter/.*", "head/.*", "backbone/.*/bias"]


@flax.struct.dataclass
class State:
  step: jax.Array
  params: dict
  opt_state: object
  rng: jax.Array
  peak_lr: jax.Array


def make_params(seed=0, width=4):
  rng = np.random.default_rng(seed)

  def draw(*shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)

  return {
    "backbone": {
      "embedding": {"kernel": draw(3, width, dtype=jnp.bfloat16), "bias": draw(width)}
    },
    "prompter": {"common_prompt": draw(2, 3, width)},
    "head": {"kernel": draw(width, 2), "bias": draw(2)},
  }


def make_optimizer(params, every=2):
  mask = trees.mask(params, TRAINABLE)
  labels = jax.tree.map(lambda chosen: "trainable" if chosen else "frozen", mask)
  trainable = optax.MultiSteps(optax.adamw(1e-3), every)
  return mask, optax.partition(
    {"trainable": trainable, "frozen": optax.set_to_zero()}, labels
  )


@functools.cache
def make_update():
  """Returns (init, update) of the optimizer, one program each for all states."""
  _, optimizer = make_optimizer(make_params())

  def update(params, opt_state, factor):
    grads = jax.tree.map(lambda p: p * factor, params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  return jax.jit(optimizer.init), jax.jit(update)


def make_state(seed=0, steps=3, width=4):
  """A state after some updates, so that moments and counters are not zero."""
  params = make_params(seed, width)
  mask, _ = make_optimizer(params)
  init, update = make_update()
  opt_state = init(params)
  for i in range(steps):
    params, opt_state = update(params, opt_state, i + 1)
  return mask, State(
    step=jnp.int32(steps),
    params=params,
    opt_state=opt_state,
    rng=jax.random.fold_in(jax.random.key(seed), 7),
    peak_lr=jnp.float32(0.3),
  )


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save(workdir, mask, state, **kwargs):
  kwargs = {"meta": META, "progress": {}} | kwargs
  progress = kwargs.pop("progress")
  with Checkpointer(workdir, mask=mask, **kwargs) as checkpointer:
    assert checkpointer.save(state, progress=progress, force=True)
  return workdir / "checkpoints" / str(int(state.step))


def restore(workdir, mask, state, meta=META):
  with Checkpointer(workdir, mask=mask, meta=meta) as checkpointer:
    return checkpointer.restore(state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  mask, state = make_state()
  return save(tmp_path_factory.mktemp("run"), mask, state), mask, state


def test_restored_state_is_bit_identical_and_frozen_leaves_stay(tmp_path):
  mask, state = make_state(seed=0)
  save(tmp_path, mask, state, progress={"train_seconds": 1.25})
  _, other = make_state(seed=1, steps=5)
  with Checkpointer(tmp_path, mask=mask, meta=META) as checkpointer:
    restored = checkpointer.restore(other)
    assert checkpointer.progress()["train_seconds"] == 1.25
    assert checkpointer.latest_step() == 3
  frozen = other.params["backbone"]["embedding"]["kernel"]
  state.params["backbone"]["embedding"]["kernel"] = frozen
  assert_equal(restored, state)


def test_abstract_state_is_filled(tmp_path):
  mask, state = make_state()
  save(tmp_path, mask, state)
  abstract = jax.eval_shape(lambda s: s, state)
  restored = restore(tmp_path, mask, abstract)
  assert_equal(restored.opt_state, state.opt_state)
  assert_equal(restored.rng, state.rng)
  kernel = restored.params["backbone"]["embedding"]["kernel"]
  assert isinstance(kernel, jax.ShapeDtypeStruct)


def test_nothing_there_restores_none(tmp_path):
  mask, state = make_state()
  with Checkpointer(tmp_path, mask=mask, meta=META) as checkpointer:
    assert checkpointer.restore(state) is None
    assert checkpointer.latest_step() is None
    assert checkpointer.progress() == {}


def test_adapter_holds_prompter_head_and_trainable_backbone_leaves_only(tmp_path):
  mask, state = make_state()
  where = save(tmp_path, mask, state)
  stored = read_arrays(where, "adapter")
  flat = trees.flatten(state.params)
  flat.pop("backbone/embedding/kernel")
  assert sorted(stored) == sorted(flat)
  assert_equal(stored, {name: flat[name] for name in stored})
  # A frozen prompter is not trainable, but no backbone file holds it either.
  frozen = trees.mask(state.params, ["head/.*"])
  stored = read_arrays(save(tmp_path / "b", frozen, state), "adapter")
  assert sorted(stored) == ["head/bias", "head/kernel", "prompter/common_prompt"]
  assert read_json(where, "meta") == META
  assert read_json(where, "progress")["step"] == 3


def test_saved_on_four_devices_restored_on_one(tmp_path):
  if len(jax.devices()) < 4:
    pytest.skip("needs 4 devices; tests/conftest.py simulates them on CPU")
  mask, state = make_state()
  mesh = mesh_lib.create_mesh(jax.devices()[:4])
  save(tmp_path, mask, jax.device_put(state, mesh_lib.replicated(mesh)))
  last = jax.devices()[3]
  restored = restore(tmp_path, mask, jax.device_put(state, last))
  assert_equal(restored, state)
  for leaf in jax.tree.leaves(restored):
    assert leaf.devices() == {last}


def test_an_optimizer_without_state_is_no_error(tmp_path):
  mask, state = make_state()

  @flax.struct.dataclass
  class Bare:
    step: jax.Array
    params: dict
    rng: jax.Array
    opt_state: object

  bare = Bare(state.step, state.params, state.rng, optax.sgd(0.1).init(state.params))
  save(tmp_path, mask, bare)
  assert_equal(restore(tmp_path, mask, bare), bare)


def test_saving_while_training_goes_on_keeps_the_values_of_the_step(tmp_path):
  mask, state = make_state()
  params = {**state.params, "head": {"kernel": jnp.ones((300, 300))}}
  state = state.replace(params=params, opt_state=())
  mask = {**mask, "head": {"kernel": True}}
  step = jax.jit(lambda k: k + 1, donate_argnums=0)
  kernel = step(state.params["head"]["kernel"])
  state.params["head"]["kernel"] = kernel
  with Checkpointer(tmp_path, mask=mask, meta=META) as checkpointer:
    checkpointer.save(state, progress={})
    for _ in range(20):
      kernel = step(kernel)
  stored = read_arrays(find_steps(tmp_path)[0], "adapter")
  assert (np.asarray(stored["head/kernel"]) == 2).all()


def test_keep_and_a_step_that_is_there(tmp_path):
  mask, state = make_state()
  with Checkpointer(tmp_path, mask=mask, meta=META, keep=2) as checkpointer:
    for step in (1, 2, 3):
      assert checkpointer.save(state.replace(step=jnp.int32(step)), progress={})
    assert not checkpointer.save(state, progress={}, force=True)
  steps = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
  assert steps == ["2", "3"]
  assert find_steps(tmp_path)[0].name == "3"
  assert find_steps(tmp_path / "checkpoints")[0].name == "3"
  assert find_steps(tmp_path / "checkpoints" / "2")[0].name == "2"


SHARE = st.floats(0, 1, exclude_max=True)


@settings(max_examples=15, deadline=None)
@given(which=SHARE, at=SHARE, kind=st.sampled_from(["flip", "cut", "remove"]))
def test_any_damaged_file_is_noticed(saved, tmp_path_factory, which, at, kind):
  source, mask, state = saved
  workdir = tmp_path_factory.mktemp("damaged")
  where = workdir / "checkpoints" / "3"
  shutil.copytree(source, where)
  files = sorted(json.loads((where / "checksums.json").read_text()))
  file = where / files[int(which * len(files))]
  content = file.read_bytes()
  i = int(at * len(content))
  if kind == "remove" or not content:
    file.unlink()
  elif kind == "cut":
    file.write_bytes(content[:i])
  else:
    file.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
  with pytest.raises(ValueError, match="damaged: .*|no checkpoint") as error:
    restore(workdir, mask, state)
  assert str(where) in str(error.value)
  assert "\n" not in str(error.value)


@pytest.fixture
def two(tmp_path):
  """(mask, state, directory) of a run with checkpoints of steps 1 and 2."""
  mask, state = make_state()
  with Checkpointer(tmp_path, mask=mask, meta=META) as checkpointer:
    for step in (1, 2):
      checkpointer.save(state.replace(step=jnp.int32(step)), progress={})
  return mask, state, tmp_path / "checkpoints"


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(two):
  mask, state, folder = two
  shutil.rmtree(folder / "2" / "adapter")
  said = []
  with Checkpointer(
    folder.parent, mask=mask, meta=META, report=said.append
  ) as checkpointer:
    restored = checkpointer.restore(state)
    assert_equal(restored, state.replace(step=jnp.int32(1)))
    assert (checkpointer.latest_step(), checkpointer.progress()["step"]) == (1, 1)
    # The damaged one stays to be looked at, and is not in the way.
    again = state.replace(step=jnp.int32(2))
    assert checkpointer.save(again, progress={}, force=True)
  (line,) = said
  assert "2 is no checkpoint of this package: it has no 'adapter'" in line
  assert line.endswith("The checkpoint of step 1 is used instead.")
  assert sorted(os.listdir(folder)) == ["1", "2", "2.damaged"]
  assert_equal(restore(folder.parent, mask, state), again)


def test_if_all_checkpoints_are_damaged_nothing_is_touched(two):
  mask, state, folder = two
  for step in "12":
    (folder / step / "meta" / "metadata").write_text("{")
  with pytest.raises(ValueError, match="2 is dam.*So are the 1 older.*over, delete"):
    restore(folder.parent, mask, state)
  assert sorted(os.listdir(folder)) == ["1", "2"]


def test_another_run_is_no_damage(two):
  mask, state, folder = two
  shutil.rmtree(folder / "2")
  with pytest.raises(ValueError, match="other settings"):
    restore(folder.parent, mask, state, {**META, "method": "linear"})
  assert os.listdir(folder) == ["1"]


def test_without_checksums_an_unreadable_file_is_still_one_line(tmp_path):
  mask, state = make_state()
  where = save(tmp_path, mask, state)
  (where / "checksums.json").unlink()
  said = "has no checksums.json: nothing tells whether"
  with pytest.warns(UserWarning, match=said):
    assert_equal(restore(tmp_path, mask, state), state)
  (where / "optimizer" / "_METADATA").write_text("{")
  with (
    pytest.warns(UserWarning, match=said),
    pytest.raises(ValueError, match="'optimizer' of the checkpoint .* cannot"),
  ):
    restore(tmp_path, mask, state)


def test_checkpoints_of_other_runs_are_refused(tmp_path):
  mask, state = make_state()
  save(tmp_path, mask, state)
  other = {**META, "backbone": {"id": "B/16", "sha256": "bb"}}
  with pytest.raises(
    ValueError, match=r"the backbone is sha256 bb \(B/16\), was sha256 aa \(boxed\)"
  ):
    restore(tmp_path, mask, state, other)
  with pytest.raises(ValueError, match="method is 'vpt_deep', was 'insvp'. Use ano"):
    restore(tmp_path, mask, state, {**META, "method": "vpt_deep"})
  with pytest.raises(ValueError, match="class_names is a, b, was cat, dog"):
    restore(tmp_path, mask, state, {**META, "class_names": ["a", "b"]})
  with pytest.raises(ValueError, match="the images or their labels have changed"):
    restore(tmp_path, mask, state, {**META, "data_sha256": "cc"})
  both = {**META, "method": "linear", "class_names": ["a", "b"]}
  with pytest.raises(ValueError, match="class_names is.*; method is"):
    restore(tmp_path, mask, state, both)
  _, wider = make_state(width=6)
  with pytest.raises(ValueError, match=r"got float32\[4\], expected float32\[6\]"):
    restore(tmp_path, mask, wider)


def test_another_optimizer_is_refused(tmp_path):
  mask, state = make_state()
  save(tmp_path, mask, state)
  other = optax.sgd(0.1, momentum=0.9).init(state.params)
  with pytest.raises(ValueError, match="'optimizer'.*lacks opt_state/0/trace"):
    restore(tmp_path, mask, state.replace(opt_state=other))


def test_another_key_implementation_is_refused(tmp_path):
  mask, state = make_state()
  save(tmp_path, mask, state)
  other = state.replace(rng=jax.random.key(0, impl="rbg"))
  with pytest.raises(ValueError, match="random key .*key<fry>.*expected key<rbg>"):
    restore(tmp_path, mask, other)


def test_what_is_no_run_is_said_so(tmp_path):
  with pytest.raises(FileNotFoundError, match="no run at .*nowhere"):
    find_steps(tmp_path / "nowhere")
  with pytest.raises(FileNotFoundError, match="is no run and holds none: expected"):
    find_steps(tmp_path)
  mask, state = make_state()
  stray = tmp_path / "stray" / "checkpoints" / "4"
  stray.mkdir(parents=True)
  with pytest.raises(ValueError, match="no checkpoint of this package"):
    restore(tmp_path / "stray", mask, state)


def test_of_a_folder_of_runs_the_runs_are_listed(tmp_path, monkeypatch):
  mask, state = make_state()
  save(tmp_path / "runs" / "b" / "insvp" / "seed0", mask, state)
  monkeypatch.chdir(tmp_path)

  def refused(path):
    with pytest.raises(FileNotFoundError) as found:
      find_steps(path)
    return str(found.value), getattr(found.value, "__notes__", [])

  # A single one is named, and never taken for the one that was meant.
  for path in ("runs", "runs/b/insvp"):
    message, notes = refused(path)
    assert message == f"{path} is no run, but holds 1 run: give runs/b/insvp/seed0"
  made = Path("runs/b/insvp/seed0")
  meta = json.loads((made / "checkpoints" / "3" / "meta" / "metadata").read_text())
  facts = [meta[key] for key in ("task", "method") if key in meta]
  assert notes == [f"  {made}: {', '.join(facts)}"]
  for i in range(21):
    where = Path(f"runs/a/{i:02d}/checkpoints/7")
    (where / "meta").mkdir(parents=True)
    described = {"task": "svhn", "method": "vpt_deep"}
    (where / "meta" / "metadata").write_text(json.dumps(described))
  for i, text in enumerate(('{"test_accuracy": 0.98765}', '{"test_accuracy": null}')):
    Path(f"runs/a/{i:02d}/result.json").write_text(text)
  Path("runs/a/02/checkpoints/7/meta/metadata").write_text("{")
  Path("runs/empty/checkpoints").mkdir(parents=True)
  message, notes = refused("runs")
  assert (
    message == "runs is no run, but holds 22 runs: give one of them, e.g. runs/a/00"
  )
  assert notes[:4] == [
    "  runs/a/00: svhn, vpt_deep, test accuracy 98.77%",
    "  runs/a/01: svhn, vpt_deep",
    "  runs/a/02: damaged",
    "  runs/a/03: svhn, vpt_deep",
  ]
  assert len(notes) == 21 and notes[-1] == "  and 2 more"


def test_a_place_that_cannot_be_written_fails_before_training(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match="cannot write checkpoints to .*another workdir"):
    Checkpointer(tmp_path / "file", mask=make_state()[0], meta=META)


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
  mask, state = make_state()
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  with Checkpointer(tmp_path, mask=mask, meta=META) as checkpointer:
    checkpointer.save(state, progress={}, force=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="step 4 .*MiB free. The last good .*step 3"):
      checkpointer.save(state.replace(step=jnp.int32(4)), progress={})
  assert os.listdir(tmp_path / "checkpoints") == ["3"]


FULL = """
import resource, signal, sys
from pathlib import Path
import jax.numpy as jnp, numpy as np
import test_checkpoints as t
from insvp_jax.checkpoints.checkpointer import Checkpointer
mask, state = t.make_state(width=8)
t.save(Path(sys.argv[1]), mask, state)
large = np.random.default_rng(0).normal(size=(300, 300)).astype(np.float32)
params = {**state.params, "head": {"kernel": jnp.asarray(large)}}
mask = {**mask, "head": {"kernel": True}}
# No file may grow beyond 50 kB: TensorStore then fails as on a full disk.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000))
try:
  with Checkpointer(sys.argv[1], mask=mask, meta=t.META) as checkpointer:
    checkpointer.save(
      state.replace(step=jnp.int32(4), params=params, opt_state=()), progress={}
    )
except OSError as error:
  print(error)
"""


def test_a_write_that_fails_midway_leaves_nothing_behind(tmp_path, root):
  path = os.pathsep.join([str(root), str(root / "tests" / "checkpoints")])
  done = subprocess.run(
    [sys.executable, "-c", FULL, str(tmp_path)],
    env={**os.environ, "PYTHONPATH": path},
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stderr.count("orbax") == 0
  expected = os.strerror(errno.EFBIG)
  assert f"{tmp_path}/checkpoints: {expected}. The last good" in done.stdout
  assert "step 3" in done.stdout
  assert os.listdir(tmp_path / "checkpoints") == ["3"]
  files.verify(tmp_path / "checkpoints" / "3")


@pytest.mark.parametrize(
  "entry", [3, [], [1, 2, 3], {"a": 1}, "xy", None, ["x", 7], [[], []], [1e400, 0]]
)
def test_a_list_of_checksums_that_is_none_is_damage(saved, tmp_path, entry):
  source, mask, state = saved
  where = tmp_path / "checkpoints" / "3"
  shutil.copytree(source, where)
  sums = json.loads((where / "checksums.json").read_text())
  sums[next(iter(sums))] = entry
  (where / "checksums.json").write_text(json.dumps(sums))
  with pytest.raises(files.Damaged) as found:
    restore(tmp_path, mask, state)
  assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "/dev/zero"])
def test_checksums_name_files_of_the_checkpoint(saved, tmp_path, name):
  source, _, _ = saved
  where = tmp_path / "checkpoints" / "3"
  shutil.copytree(source, where)
  (tmp_path / "secret").write_text("x")
  (where / "checksums.json").write_text(json.dumps({name: [1, "a"]}))
  with pytest.raises(files.Damaged, match=f"{name} is missing"):
    files.verify(where)


@pytest.mark.parametrize(
  "progress", [{}, {"step": "3"}, {"step": 2**40}, {"step": 3}, {"step": 3, "rng": {}}]
)
def test_progress_that_is_none_is_damage(saved, tmp_path, progress):
  source, mask, state = saved
  where = tmp_path / "checkpoints" / "3"
  shutil.copytree(source, where)
  (where / "progress" / "metadata").write_text(json.dumps(progress))
  files.write_checksums(where)
  with pytest.raises(files.Damaged, match="progress"):
    restore(tmp_path, mask, state)


def test_arrays_that_claim_far_more_than_their_files_are_damage(saved, monkeypatch):
  source, _, _ = saved
  claimed = {"head/kernel": jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32)}
  monkeypatch.setattr(files, "_read_item", lambda *_: claimed)
  with pytest.raises(files.Damaged, match="its arrays claim 4398046511104 bytes"):
    files.read_arrays(Path(source), "adapter")


def test_only_plain_numbers_are_steps(tmp_path):
  for name in ("3", "²", "x", "١", "-1", "4.damaged"):
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
  assert [path.name for path in find_steps(tmp_path)] == ["3"]


def test_json_files_of_a_run_are_read_whole_or_are_damage(tmp_path):
  path = tmp_path / "result.json"
  path.write_text('{"a": 1}')
  assert files.load_json(path) == {"a": 1}
  for text in ("[" * 10**5, "[]", "nul", "\xff", ""):
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(files.Damaged, match="result.json (cannot be read|holds a)"):
      files.load_json(path)
  path.unlink()
  os.mkfifo(path)
  with pytest.raises(files.Damaged, match="result.json is a pipe"):
    files.load_json(path)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "file"])
def test_a_checkpoint_is_made_of_files(saved, tmp_path, kind):
  where = tmp_path / "checkpoints" / "3"
  shutil.copytree(saved[0], where)
  os.mkfifo(tmp_path / "pipe")
  # As in the cache of a hub.
  (tmp_path / "file").write_text("x")
  target = {"device": "/dev/zero", "folder": "/"}.get(kind, tmp_path / kind)
  (where / "adapter" / "x").symlink_to(target)
  if kind == "file":
    files.verify(where)
    return
  with pytest.raises(files.Damaged, match="adapter/x is a link to a folder, or no reg"):
    files.verify(where)


def test_what_is_said_of_damage_moves_no_cursor():
  assert str(files.Damaged("a\x1b[2J\n")) == r"a\x1b[2J\n"


def test_a_trial_save_leaves_nothing(tmp_path):
  mask, state = make_state()
  with Checkpointer(tmp_path, mask=mask, meta=META) as checkpointer:
    checkpointer.try_out(state)
    assert checkpointer.latest_step() is None
    assert os.listdir(tmp_path / "checkpoints") == []
    # The same step is saved later as any other.
    assert checkpointer.save(state, progress={}, force=True)


def test_only_the_main_process_reads_a_trial_save(tmp_path, monkeypatch):
  # It removes it then, perhaps before another one would have looked.
  def gone(*args):
    raise files.Damaged("no readable item 'adapter'")

  monkeypatch.setattr(checkpointer_lib, "stored_arrays", gone)
  mask, state = make_state()
  with Checkpointer(tmp_path, mask=mask, meta=META) as checkpointer:
    with pytest.raises(OSError, match="cannot be read again"):
      checkpointer.try_out(state)
    monkeypatch.setattr(checkpointer_lib.processes, "is_main_process", lambda: False)
    checkpointer.try_out(state)


# Where reading fails, reads of Orbax that are still under way end after their loop.
@pytest.mark.filterwarnings("ignore:Exception ignored in. None")
@pytest.mark.parametrize(
  "name, message",
  [
    ("a**b", r"could not be written .* `\*\*` .*Choose another workdir"),
    ("a[b]", "cannot be read again: .* whose path has letters, digits"),
    ("a\\b", "cannot be read again: .* whose path has letters, digits"),
  ],
)
def test_a_path_that_cannot_be_saved_to_shows_before_training(tmp_path, name, message):
  mask, state = make_state()
  # Around both: on the way out a thread of the failed save may find its files gone.
  with (
    pytest.raises(OSError, match=message),
    Checkpointer(tmp_path / name, mask=mask, meta=META) as checkpointer,
  ):
    checkpointer.try_out(state)
  assert os.listdir(tmp_path / name / "checkpoints") == []


@pytest.mark.parametrize("content", ["[1]", '{"item_handlers": 3}', ""])
def test_damaged_times_of_a_checkpoint_cost_nothing(tmp_path, content):
  mask, state = make_state()
  with Checkpointer(tmp_path, mask=mask, meta=META) as checkpointer:
    checkpointer.save(state, progress={}, force=True)
  (times,) = tmp_path.glob("checkpoints/*/_CHECKPOINT_METADATA")
  sound = times.read_bytes()
  with Checkpointer(tmp_path, mask=mask, meta=META) as checkpointer:
    assert checkpointer.restore(state) is not None
  assert times.read_bytes() == sound
  times.write_text(content)
  with Checkpointer(tmp_path, mask=mask, meta=META) as checkpointer:
    assert checkpointer.restore(state) is not None

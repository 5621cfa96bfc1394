import io
import json
import os
import re
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from tiny_training import stored_events

from insvp_jax.logs import progress, writers
from insvp_jax.logs.writers import Writers, write_json


def lines(workdir):
  text = (workdir / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def write_steps(workdir, steps, start_step=0, **kwargs):
  kwargs = {"total_steps": 10, "tensorboard": False, "stream": io.StringIO()} | kwargs
  with Writers(workdir, start_step=start_step, **kwargs) as found:
    for step in steps:
      found.train(step, {"loss": jnp.float32(1 / step), "lr": 0.1})
  return kwargs["stream"]


def test_one_json_object_per_line(tmp_path):
  with Writers(tmp_path / "new", total_steps=3, tensorboard=False) as found:
    found.scalars(1, {"loss": jnp.float32(0.5), "count": np.int32(7)})
    # What has been written is there even if the process dies now.
    assert lines(tmp_path / "new") == [{"step": 1, "loss": 0.5, "count": 7}]
    found.scalars(2, {"loss": float("nan")})
    found.train(3, {"loss": 0.25}, images_per_second=10.0)
  assert lines(tmp_path / "new")[1:] == [
    {"step": 2, "loss": None},
    {"step": 3, "loss": 0.25, "images_per_second": 10.0},
  ]


@given(
  first=st.integers(1, 10),
  resumed=st.integers(0, 10),
  cut=st.integers(0, 30),
)
def test_a_resumed_run_has_every_step_once(tmp_path_factory, first, resumed, cut):
  workdir = tmp_path_factory.mktemp("run")
  resumed = min(first, resumed)
  write_steps(workdir, range(1, first + 1))
  file = workdir / "metrics.jsonl"
  if resumed < first:  # a kill may have cut the last line anywhere
    content = file.read_text()
    file.write_text(content[: len(content) - min(cut, len(content.splitlines()[-1]))])
  write_steps(workdir, range(resumed + 1, 11), start_step=resumed)
  assert [line["step"] for line in lines(workdir)] == list(range(1, 11))
  assert sorted(path.name for path in workdir.iterdir()) == ["metrics.jsonl"]


def test_progress_is_plain_lines_in_a_file(tmp_path):
  stream = io.StringIO()
  with Writers(
    tmp_path, total_steps=200, tensorboard=False, name="digits insvp", stream=stream
  ) as found:
    found.train(50, {"loss": 2.0, "lr": 1e-3, "accuracy": 0.25, "grad_norm": 3.0})
    found.log("val accuracy 0.5")
    found.train(100, {"loss": 1.0}, images_per_second=1234.4)
  first, second, third = stream.getvalue().splitlines()
  assert first == "digits insvp  step 50/200 (25%)  loss 2  lr 0.001  accuracy 0.25"
  assert second == "val accuracy 0.5"
  assert third.startswith("digits insvp  step 100/200 (50%)  loss 1  1234 images/s  ")
  assert third.endswith(" left")


def test_time_left_follows_from_the_pace_after_the_first_call(tmp_path, monkeypatch):
  clock = iter([100.0, 110.0, 130.0])
  monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
  stream = write_steps(tmp_path, [1, 3, 7], total_steps=10)
  left = [line.split("  ")[-1] for line in stream.getvalue().splitlines()]
  assert left == ["lr 0.1", "0:35 left", "0:15 left"]


class Terminal(io.StringIO):
  def isatty(self):
    return True

  def drawn(self):
    """Returns the lines in the order in which they were drawn, without colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", self.getvalue())
    return re.split(r"\r\x1b\[2K|\n", text)


@pytest.fixture
def terminal(monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "110")
  return Terminal()


def test_progress_is_one_live_bar_on_a_terminal(tmp_path, terminal):
  scalars = {"loss": 2.0, "lr": 1e-3, "accuracy": 0.25, "grad_norm": 3.0}
  with Writers(
    tmp_path, total_steps=400, tensorboard=False, name="digits [x]", stream=terminal
  ) as found:
    found.log("before :smile:")
    found.train(100, scalars)
    found.train(200, scalars, images_per_second=1234.4)
    found.log("saved [b]" + 120 * "x")
  drawn = terminal.drawn()
  assert drawn[0] == "before :smile:"
  shown = "loss 2  lr 0.001  accuracy 0.25"
  assert re.fullmatch(rf"digits \[x\] .+ 100/400 +25% {shown} +--:-- *", drawn[1])
  last = rf"digits \[x\] .+ 200/400 +50% {shown}  1234 images/s 00:0[01] *"
  bars = [line for line in drawn if "200/400" in line]
  assert all(re.fullmatch(last, bar) for bar in bars)
  # Logged text is whole and above the bar, which stays and ends with a new line.
  assert drawn[-4:] == ["saved [b]" + 120 * "x", bars[-1], bars[-1], ""]
  # A killed run would leave a hidden cursor hidden.
  assert "\x1b[?25l" not in terminal.getvalue()


def test_the_bar_ends_with_the_run_however_that_ends(tmp_path, terminal):
  streams = sys.stdout, sys.stderr
  for number, error in enumerate((KeyboardInterrupt, ValueError)):
    with (
      pytest.raises(error),
      Writers(
        tmp_path, total_steps=9, tensorboard=False, name=f"run{number}", stream=terminal
      ) as found,
    ):
      found.train(3, {"loss": 1.0})
      raise error
    assert terminal.drawn()[-1] == ""
    assert (sys.stdout, sys.stderr) == streams
    print("between", file=terminal)
  order = [line.split(" ")[0] for line in terminal.drawn() if line]
  assert list(dict.fromkeys(order)) == ["run0", "between", "run1"]
  assert order.index("run1") > order.index("between")


def test_a_narrow_terminal_keeps_steps_and_time(tmp_path, terminal, monkeypatch):
  monkeypatch.setenv("COLUMNS", "60")
  name = "caltech101 vpt_deep"
  with Writers(
    tmp_path, total_steps=9, tensorboard=False, name=name, stream=terminal
  ) as found:
    found.train(3, {"loss": 1.0, "lr": 0.0001, "accuracy": 0.5}, images_per_second=1e4)
  bar = terminal.drawn()[-2]
  assert len(bar) == 60
  assert re.fullmatch(r"caltech101.* 3/9 +33% loss 1.*… --:--", bar)


def test_a_search_has_one_bar_below_that_of_its_run(tmp_path, terminal):
  whole = progress.Whole(4, 400.0)
  whole.keep(100.0)
  for number in range(2):
    with (
      whole.run(100.0),
      Writers(
        tmp_path / str(number),
        total_steps=10,
        tensorboard=False,
        name=f"run{number}",
        whole=whole,
        stream=terminal,
      ) as found,
    ):
      for step in (0, 5, 10):
        found.train(step, {"loss": 1.0})
  drawn = [line.rstrip() for line in terminal.drawn()]
  shown = [line for line in drawn if line.startswith("all 4 runs")]
  done = [re.search(r" ([0-9]+%) +[0-9:-]+$", line)[1] for line in shown]
  assert list(dict.fromkeys(done)) == ["25%", "38%", "50%", "62%", "75%"]
  # It goes with each run: what stays are the runs' own.
  assert "run1 " in drawn[-2] and " 10/10 " in drawn[-2]


def test_lines_say_how_far_the_search_is(tmp_path):
  whole, stream = progress.Whole(2, 8.0), io.StringIO()
  with whole.run(4.0):
    write_steps(tmp_path, [1, 5], total_steps=10, stream=stream, whole=whole)
  first, second = stream.getvalue().splitlines()
  assert first.endswith("  search 5%")
  assert re.search(r" left  search 25%, [0-9:]+ left$", second)


def test_what_only_looks_like_a_terminal_gets_plain_lines(tmp_path, monkeypatch):
  monkeypatch.setenv("TERM", "dumb")
  stream = write_steps(tmp_path, [5], stream=Terminal())
  assert stream.getvalue() == "step 5/10 (50%)  loss 0.2  lr 0.1\n"


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  stream = write_steps(tmp_path / "run", [1, 2], tensorboard=True)
  write_json(tmp_path / "result.json", {})
  assert stream.getvalue() == ""
  assert list(tmp_path.iterdir()) == []


def read_events(workdir):
  """Returns (step, name, value) of all scalars that TensorBoard would show."""
  found, voided = [], []
  for event in stored_events(workdir):
    if event.HasField("session_log"):
      assert event.session_log.status == event.session_log.START
      voided.append(event.step)
      found = [item for item in found if item[0] < event.step]
    found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
  return found, voided


def test_tensorboard_reads_the_events_and_a_resumed_run_replaces_its_own(tmp_path):
  write_steps(tmp_path, [1, 2, 3], tensorboard=True)
  write_steps(tmp_path, [3, 4], start_step=2, tensorboard=True)
  found, voided = read_events(tmp_path)
  losses = {step: value for step, name, value in found if name == "loss"}
  assert losses == pytest.approx({1: 1, 2: 1 / 2, 3: 1 / 3, 4: 1 / 4})
  assert len(found) == 8
  assert voided == [1, 3]


def test_libraries_come_in_only_where_they_are_used(tmp_path, root):
  code = (
    "import sys\n"
    "from insvp_jax.logs.writers import Writers\n"
    "assert 'tensorboardX' not in sys.modules\n"
    f"with Writers({str(tmp_path)!r}, total_steps=1) as found:\n"
    "  found.train(1, {'loss': 1.0})\n"
    "heavy = 'tensorflow', 'tensorboard', 'torch', 'rich.progress'\n"
    "print(any(name in sys.modules for name in heavy))"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=root, capture_output=True, text=True
  )
  assert done.stdout.strip() == "False", done.stderr


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / "new" / "result.json"
  value = {"accuracy": np.float32(0.5), "steps": jnp.int32(3), "loss": float("inf")}
  write_json(path, {**value, "per_class": np.array([1.0, np.nan])})
  expected = {"accuracy": 0.5, "steps": 3, "loss": None, "per_class": [1.0, None]}
  assert json.loads(path.read_text()) == expected

  def full(descriptor):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(writers.os, "fsync", full)
  with pytest.raises(OSError, match="result.json could not be written: No space left"):
    write_json(path, {"accuracy": 1.0})
  assert json.loads(path.read_text()) == expected
  assert [file.name for file in path.parent.iterdir()] == ["result.json"]
  with pytest.raises(TypeError, match="no JSON value"):
    write_json(path, {"what": object()})


def test_a_place_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match="Not a directory|File exists"):
    Writers(tmp_path / "file", total_steps=1)
  with pytest.raises(OSError, match="could not be written"):
    write_json(tmp_path / "file" / "result.json", {})


def test_files_are_utf_8_and_take_names_that_are_no_text(tmp_path):
  writers.write_text(tmp_path / "table.md", "\u00b1 \udcff")
  assert (tmp_path / "table.md").read_bytes() == b"\xc2\xb1 \\udcff"
  with Writers(tmp_path, total_steps=1) as files:
    files.text("config", "caf\u00e9 \udcff")


def test_durations():
  given_seconds = [0, 59.6, 61, 3600, 36_061]
  assert [progress.duration(s) for s in given_seconds] == [
    "0:00",
    "1:00",
    "1:01",
    "1:00:00",
    "10:01:01",
  ]


def test_lines_written_after_the_save_at_the_same_step_are_dropped(tmp_path):
  with Writers(tmp_path, total_steps=2, tensorboard=False) as found:
    found.scalars(1, {"loss": 0.5})
    found.scalars(1, {"val_accuracy": 0.25})
    saved = found.lines
    found.scalars(1, {"test_accuracy": 0.75})
    assert (saved, found.lines) == (2, 3)
  resumed = {"total_steps": 2, "start_step": 1, "start_lines": saved}
  with Writers(tmp_path, **resumed, tensorboard=False) as found:
    assert found.lines == 2
    found.scalars(2, {"loss": 0.25})
  assert [list(line)[1] for line in lines(tmp_path)] == ["loss", "val_accuracy", "loss"]


FULL = """
import resource, sys
from insvp_jax.logs.writers import Writers
workdir, is_events = sys.argv[1], sys.argv[2] == "events"
with Writers(workdir, total_steps=9, tensorboard=is_events) as found:
  # No file may grow beyond this: writing then fails as on a full disk.
  resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
  for step in range(1, 9):
    found.train(step, {} if is_events else {"loss": 1 / 3})
"""


@pytest.mark.parametrize("kind", ["metrics.jsonl", "events"])
def test_a_full_disk_leaves_whole_records_and_names_the_file(tmp_path, root, kind):
  command = [sys.executable, "-c", FULL, str(tmp_path), kind]
  done = subprocess.run(command, cwd=root, capture_output=True, text=True)
  last = done.stderr.splitlines()[-1]
  assert f"{kind}" in last and "could not be written: File too large. Free" in last
  if kind == "events":
    read_events(tmp_path)
  else:
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_tensorboard_shows_texts_and_images(tmp_path):
  pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
  with Writers(tmp_path, total_steps=1) as found:
    assert found.shows_images
    found.text("config", "| a | 1 |")
    found.images(1, {"prompts/0": pixels})
  shown = {v.tag: v for e in stored_events(tmp_path) for v in e.summary.value}
  text = shown["config"]
  assert text.metadata.plugin_data.plugin_name == "text"
  assert text.tensor.string_val == [b"| a | 1 |"]
  image = shown["prompts/0"].image
  assert (image.height, image.width) == (5, 7)
  png = Image.open(io.BytesIO(image.encoded_image_string))
  np.testing.assert_array_equal(png, pixels)
  with Writers(tmp_path, total_steps=1, tensorboard=False) as found:
    assert not found.shows_images
    found.images(1, {"prompts/0": pixels})


@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "pipe", "folder"])
@pytest.mark.parametrize("start_step", [0, 3])
def test_metrics_that_are_not_ours_are_left_alone(tmp_path, kind, start_step):
  other, path = tmp_path / "other", tmp_path / "run" / "metrics.jsonl"
  path.parent.mkdir()
  other.write_text("precious")
  make = {
    "link": lambda: path.symlink_to(other),
    "dangling": lambda: path.symlink_to(tmp_path / "nowhere"),
    "hard link": lambda: path.hardlink_to(other),
    "pipe": lambda: os.mkfifo(path),
    "folder": lambda: path.mkdir(),
  }
  make[kind]()
  with pytest.raises(ValueError, match=r"metrics.jsonl (is a|has 2 names).*workdir"):
    write_steps(path.parent, [1], start_step=start_step)
  assert other.read_text() == "precious"
  assert not (tmp_path / "nowhere").exists() and os.path.lexists(path)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_files_that_are_not_ours_are_not_replaced(tmp_path, kind):
  other, path = tmp_path / "other", tmp_path / "run" / "result.json"
  path.parent.mkdir()
  other.write_text("precious")
  make = {"link": lambda: path.symlink_to(other), "pipe": lambda: os.mkfifo(path)}
  make.get(kind, path.mkdir)()
  with pytest.raises(ValueError, match=r"result.json is a .*another workdir"):
    write_json(path, {"accuracy": 1})
  assert other.read_text() == "precious"
  assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_the_workdir_itself_may_be_a_link(tmp_path):
  (tmp_path / "scratch").mkdir()
  (tmp_path / "run").symlink_to("scratch")
  write_steps(tmp_path / "run", [1, 2])
  write_json(tmp_path / "run" / "result.json", {})
  assert len(lines(tmp_path / "scratch")) == 2


def test_a_line_that_is_none_ends_what_is_kept(tmp_path):
  file = tmp_path / "metrics.jsonl"
  for odd in ("[" * 10**5, '{"step": NaN}', '{"step": "2"}', "[2]"):
    file.write_text(f'{{"step": 1}}\n{odd}\n{{"step": 2}}\n')
    write_steps(tmp_path, [3], start_step=2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 3]

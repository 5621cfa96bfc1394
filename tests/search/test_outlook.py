"""A search says what it is about to do and how long that takes, before it begins."""

import dataclasses
import datetime
import json
import types

import pytest
from tiny_commands import make_place
from tiny_training import assert_same, make_data, prepare, stored, tiny_config

from insvp_jax.logs import progress
from insvp_jax.search import outlook as outlook_lib
from insvp_jax.search import tune
from insvp_jax.search.outlook import (
  Outlook,
  Pace,
  Sizes,
  Times,
  Work,
  about,
  flops_of,
  forecast,
  work_of,
)
from insvp_jax.train import trainer

# None of this is about devices, and for one all compiles sooner.
pytestmark = pytest.mark.usefixtures("one_device")

WORKS = {
  "linear": Work(0, 3, 0.0, 100.0, 0.0, 0, 4),
  "insvp": Work(2, 3, 200.0, 200.0, 4e6, 8, 10, grid="2 lr"),
  "vpt_deep": Work(2, 3, 200.0, 200.0, 2e6, 8, 10),
}


@pytest.fixture
def clock(monkeypatch):
  """The time in seconds, which a test sets."""
  clock = types.SimpleNamespace(now=0.0)
  monkeypatch.setattr(progress.time, "perf_counter", lambda: clock.now)
  return clock


def test_the_pace_of_the_first_steps_tells_how_long_all_takes(capsys, clock):
  outlook = Outlook(WORKS)
  assert outlook.summary() == (
    "13 runs: linear 3 final of 4 steps, insvp 2 trials of 8 steps (2 lr) and 3 "
    "final of 10, vpt_deep 2 trials of 8 steps and 3 final of 10; those that are "
    "finished are kept"
  )
  # Steps on cached features and the first, compiling step say nothing of the others.
  with outlook.row("linear").final() as whole:
    for clock.now in (1.0, 50.0):
      whole.at(clock.now / 100)
  with outlook.row("vpt_deep").trials(2) as whole:
    whole.at(0.0)
    assert capsys.readouterr().out == "" and whole.seconds_left() is None
    # 100 of 400 images of vpt_deep in 10 seconds: 1,000 of these take 100, and 1,000
    # of insvp, each twice the work, 200.
    clock.now += 10
    whole.at(0.25)
    told = capsys.readouterr().out
    assert told == "all runs of this search take about 5:00 at this pace\n"
    assert whole.seconds_left() == pytest.approx(290, rel=1e-3)
    assert whole.text() == "search 3%, 4:50 left"
  with outlook.row("insvp").trials(2):
    clock.now += 1
    whole.at(0.5)
  assert capsys.readouterr().out == ""


def test_what_is_finished_is_counted_once(clock):
  outlook = Outlook(WORKS)
  row, whole = outlook.row("insvp"), outlook.whole
  row.keep(trials=1)
  with pytest.raises(KeyError), row.trials(1):
    whole.at(0.5)
    raise KeyError
  # It did not come to its end, and is repeated.
  one = 200 / 3000 * 2
  assert whole.share == pytest.approx(one, rel=1e-3)
  with row.trials(1):
    whole.at(0.5)
    assert whole.share == pytest.approx(1.5 * one, rel=1e-3)
  row.keep(finals=1)
  for _ in range(2):
    with row.final():
      pass
  for label in ("linear", "vpt_deep"):
    outlook.row(label).keep(trials=WORKS[label].num_trials, finals=3)
  assert whole.share == pytest.approx(1.0)


def test_rows_on_cached_features_alone_tell_their_own_pace(capsys, clock):
  outlook = Outlook({"linear": WORKS["linear"]})
  with outlook.row("linear").final() as whole:
    whole.at(0.0)
    clock.now = 7.0
    whole.at(0.5)
  assert capsys.readouterr().out.startswith("all runs of this search take about 0:42 ")


@pytest.mark.parametrize("method", ["linear", "vpt_deep"])
def test_work_counts_images_of_training_and_evaluation(method):
  config = tiny_config(method, batch_size=8, total_epochs=2.0)
  prepared = prepare(config)
  sizes = Sizes.of(make_data())
  assert sizes == Sizes(train=24, val=10, final=34, test=13)
  flops = flops_of(config, prepared.program, sizes.train)
  work = work_of(config, sizes, flops, num_trials=2, num_finals=3)
  assert (work.trial_steps, work.final_steps) == (6, 8)
  assert work.images == 2 * (48 + 10 / 2) + 3 * (64 + 13 / 2)
  is_cached = method == "linear"
  assert (work.flops == 0) == is_cached == (work.feature_flops > 0)
  assert work.num_cached == (24 + 10 + 34 + 13 if is_cached else 0)
  final = work_of(config, sizes, flops, num_trials=0, num_finals=3)
  assert final.num_cached == (34 + 13 if is_cached else 0)


# Before it begins.

_TRIAL = Times(start=1.0, feature=0.0, compilation=20.0, image=0.1)
_FINAL = dataclasses.replace(_TRIAL, image=0.05)
_ALL = {label: (work.num_trials, work.num_finals) for label, work in WORKS.items()}


def test_the_time_of_all_follows_from_the_steps_of_one_row():
  outlook = Outlook(WORKS)
  pace = Pace("insvp", _TRIAL, _FINAL, together=2, num_compiled=2)
  # By images and FLOPs, linear at a thousandth of insvp's: its features are cached.
  steps = (2 * 200 * 0.1 + 3 * 200 * 0.05) * (1 + 1 / 2) + 3 * 100 * 0.05 / 1000
  # Two populations and nine final runs; two programs that are compiled, two that are
  # not, and the evaluations of all four.
  starts, compilation = 2 + 9, (2 + 4 / 2) * 20
  assert outlook.seconds(pace) == pytest.approx(steps + starts + compilation)
  # Two final runs of insvp are left: no other row is compiled any more.
  left = dict.fromkeys(WORKS, (0, 0)) | {"insvp": (0, 2)}
  assert outlook.seconds(pace, left) == pytest.approx(2 * 200 * 0.05 + 2 + 20 / 2)
  # On another task everything is compiled anew.
  other = outlook.seconds(pace, works=WORKS)
  assert other == pytest.approx(outlook.seconds(pace) + 2 * 20)


def test_features_that_are_computed_once_take_their_time():
  work = Work(0, 3, 0.0, 100.0, 0.0, 0, 4, num_cached=70, feature_flops=1e6)
  slow = Work(0, 1, 0.0, 100.0, 4e6, 0, 4)
  alone = Pace("linear", dataclasses.replace(_TRIAL, feature=0.25), _TRIAL)
  alone = dataclasses.replace(alone, num_cached=20)
  # 20 of 70 have been computed, in a quarter of a second each.
  steps = 3 * 100 * 0.1 + 3 + 20 / 2
  assert Outlook({"linear": work}).seconds(alone) == pytest.approx(steps + 50 * 0.25)
  # By their FLOPs beside a row that trains on images.
  beside = Outlook({"linear": work, "slow": slow})
  steps = 100 * 0.1 + 3 * 100 * 0.1 / 1000 + 4 + 20 / 2
  pace = Pace("slow", _TRIAL, _TRIAL)
  assert beside.seconds(pace) == pytest.approx(steps + 70 * 0.1 / 4)
  # Two such rows share them.
  both = Outlook({"linear": work, "mlp": work, "slow": slow}).seconds(pace)
  assert both == pytest.approx(beside.seconds(pace) + 3 * 100 * 0.1 / 1000 + 3)


def test_what_is_measured_is_a_small_part_of_what_is_left(monkeypatch):
  outlook = Outlook(WORKS)
  assert outlook.to_measure(_ALL) is None  # over in no time
  monkeypatch.setattr(outlook_lib, "_WORTH_MEASURING", 1.0)
  assert outlook.to_measure(_ALL) is None  # 46 steps of insvp are left
  many = {k: dataclasses.replace(w, final_steps=200) for k, w in WORKS.items()}
  assert Outlook(many).to_measure(_ALL) == ("insvp", 5)
  left = {**_ALL, "insvp": (0, 0), "vpt_deep": (0, 1)}
  assert Outlook(many).to_measure(left) == ("vpt_deep", 2)
  assert outlook.to_measure(dict.fromkeys(WORKS, (0, 0))) is None
  single = {**dict.fromkeys(WORKS, (0, 0)), "vpt_deep": (0, 1)}
  assert Outlook(many).to_measure(single) is None


def test_the_forecast_says_until_when():
  now = datetime.datetime(2026, 11, 27, 15, 28)
  assert forecast(840, now=now) == "search: about 14 min, until about 15:42"
  assert forecast(840, (36000, 36000), now=now) == (
    "search: about 14 min, until about 15:42; the 3 tasks that are left about 20.2 h, "
    "until about Sat 28 Nov, 11:42"
  )
  times = [0.2, 94, 100, 5400, 6000, 95 * 3600]
  expected = ["1 s", "94 s", "2 min", "90 min", "1.7 h", "4.0 days"]
  assert list(map(about, times)) == expected


def test_what_was_expected_is_the_time_left_until_steps_tell(capsys, clock):
  outlook = Outlook(WORKS)
  outlook.whole.expect(300)
  clock.now = 20.0
  with outlook.row("vpt_deep").trials(2) as whole:
    assert whole.seconds_left() == 280
    whole.at(0.0)
    clock.now += 10
    whole.at(0.25)
    assert whole.seconds_left() == pytest.approx(290, rel=1e-3)
  assert capsys.readouterr().out == ""  # it has been said


def test_measuring_changes_no_bit_of_a_search(monkeypatch, tmp_path, capsys):
  """Whatever is drawn at random: mixing, crops and flips, dropout."""
  monkeypatch.setattr(trainer, "load_data", lambda *_: make_data())
  config = tiny_config(
    "vpt_deep",
    backbone__depth=1,
    backbone__weights=str(make_place(tmp_path / "place") / "backbone0.npz"),
    loss__mixup_alpha=0.8,
    data__preset="cifar",
    vpt_deep__dropout=0.1,
    total_steps=20,
    log_every_steps=20,
  )
  config.tune.lr, config.tune.population = (0.01, 0.05), 2
  expected = tune.run(config, tmp_path / "plain")
  plain, *_ = capsys.readouterr()
  monkeypatch.setattr(outlook_lib, "_WORTH_MEASURING", 1.0)
  found = tune.run(config, tmp_path / "measured")
  lines = capsys.readouterr().out.splitlines()
  assert "search: about" not in plain
  # After what there is to do, and before anything is done.
  assert lines[1].startswith("search: about ") and "until about" in lines[1]
  for name in ("lr", "trials", "test_accuracies"):
    assert found["vpt_deep"][name] == expected["vpt_deep"][name]

  def trials_of(name):
    lines = (tmp_path / name / "vpt_deep/trials.jsonl").read_text().splitlines()
    clock = ("train_seconds", "images_per_second")
    return [{k: v for k, v in json.loads(x).items() if k not in clock} for x in lines]

  assert trials_of("measured") == trials_of("plain")
  runs = (tmp_path / name / "vpt_deep/seed0" for name in ("measured", "plain"))
  assert_same(*map(stored, runs))
  # Started again, only what is missing counts.
  folder = tmp_path / "measured/vpt_deep"
  search = tune.Search(config, "auto", None)
  assert search.left(folder) == (0, 0)
  (folder / "seed0/result.json").unlink()
  assert search.left(folder) == (0, 1)
  config.tune.lr = (0.01, 0.05, 0.02)
  assert tune.Search(config, "auto", None).left(folder) == (1, 1)

"""A search says what it is about to do, and after its first steps how long it takes."""

import types

import pytest
from tiny_training import make_data, prepare, tiny_config

from insvp_jax.logs import progress
from insvp_jax.search.outlook import Outlook, Work, work_of

WORKS = {
  "linear": Work(0, 3, 0.0, 100.0, 0.0),
  "insvp": Work(2, 3, 200.0, 200.0, 4e6),
  "vpt_deep": Work(2, 3, 200.0, 200.0, 2e6),
}


@pytest.fixture
def clock(monkeypatch):
  """The time in seconds, which a test sets."""
  clock = types.SimpleNamespace(now=0.0)
  monkeypatch.setattr(progress.time, "perf_counter", lambda: clock.now)
  return clock


def test_the_pace_of_the_first_steps_tells_how_long_all_takes(capsys, clock):
  outlook = Outlook(WORKS)
  assert outlook.summary().startswith("13 runs: linear 3 final, insvp 2 trials and 3 f")
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
  config = tiny_config(method, batch_size=8, total_steps=5)
  prepared = prepare(config)
  data = make_data()
  work = work_of(
    config, prepared.program, data, num_trials=2, num_finals=3, final_steps=6
  )
  num_val, num_test = len(data.splits["val"]), len(data.splits["test"])
  assert work.images == 2 * (40 + num_val / 2) + 3 * (48 + num_test / 2)
  assert (work.flops == 0) == (method == "linear")

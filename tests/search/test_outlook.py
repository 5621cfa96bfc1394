"""A search says what it is about to do, and after its first steps how long it takes."""

import pytest
from tiny_training import make_data, prepare, tiny_config

from insvp_jax.search.outlook import Outlook, Work, work_of
from insvp_jax.train.timing import Timer

WORKS = {
  "linear": Work(0, 3, 500.0, 0.0),
  "insvp": Work(2, 3, 1000.0, 4e6),
  "vpt_deep": Work(2, 3, 1000.0, 2e6),
}


def timer_at(images_per_second):
  timer = Timer()
  timer.timed_seconds, timer.timed_images = 1.0, images_per_second
  return timer


def test_the_pace_of_the_first_steps_tells_how_long_all_takes(capsys):
  outlook = Outlook(WORKS)
  assert outlook.summary().startswith("13 runs: linear 3 final, insvp 2 trials and 3 f")
  # Steps on cached features and the first, compiling step say nothing of the others.
  outlook.tell("linear", timer_at(10**6))
  outlook.tell("vpt_deep", Timer())
  assert capsys.readouterr().out == ""
  # 1,000 images of vpt_deep at 10 a second, and 1,000 of insvp, each twice the work.
  outlook.tell("vpt_deep", timer_at(10))
  assert (
    capsys.readouterr().out == "all runs of this search take about 5:00 at this pace\n"
  )
  outlook.tell("insvp", timer_at(10))
  assert capsys.readouterr().out == ""


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

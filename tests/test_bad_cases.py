"""Some of the cases of `bad_cases.py`, which has them all."""

import bad_cases
import pytest


@pytest.mark.parametrize(
  "kind, every", [("load", 41), ("resume", 59), ("search", 19), ("config", 149)]
)
def test_a_bad_case_is_refused_in_one_line_or_changes_nothing(kind, every):
  cases = bad_cases.KINDS[kind][0]()[::every]
  outcomes = [bad_cases.outcome(kind, case) for case in cases]
  # How many files a checkpoint has, and so which of them these are, is Orbax's matter.
  assert bad_cases.REFUSED in outcomes and len(outcomes) <= 20, outcomes


def test_another_outcome_is_found(monkeypatch):
  (case, *_) = bad_cases.load_cases()
  assert bad_cases.outcome("load", case) in (bad_cases.SAME, bad_cases.REFUSED)
  expected = bad_cases._loaded()[1] + 1
  made = bad_cases._loaded()[0]
  monkeypatch.setattr(bad_cases, "_loaded", lambda: (made, expected))
  monkeypatch.setitem(bad_cases.DAMAGES, "nothing", lambda path: None)
  with pytest.raises(AssertionError, match="other predictions"):
    bad_cases.outcome("load", (case[0], "nothing"))


def test_a_traceback_is_found(monkeypatch):
  def fail(case, workdir):
    int("x")  # a ValueError, but none of this package's

  monkeypatch.setitem(bad_cases.KINDS, "load", (bad_cases.load_cases, fail))
  with pytest.raises(AssertionError, match="no error of this package"):
    bad_cases.outcome("load", None)

"""A few seeds of each fuzzer of `fuzzers.py`."""

import fuzzers
from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

SEEDS = st.integers(0, 2**32)


@pytest.mark.parametrize(
  "fuzzer",
  [fuzzer for fuzzer in fuzzers.FUZZERS if fuzzer != fuzzers.run_meta],
  ids=lambda f: f.__name__,
)
@settings(max_examples=60)
@given(seed=SEEDS)
def test_damage_is_content_or_one_clear_error(fuzzer, seed):
  fuzzer(seed)


# Each loads a run.
@settings(max_examples=15)
@given(seed=SEEDS)
def test_a_damaged_description_is_content_or_one_clear_error(seed):
  fuzzers.run_meta(seed)

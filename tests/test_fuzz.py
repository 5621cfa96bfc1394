"""A few seeds of each fuzzer of `fuzzers.py`."""

import fuzzers
from hypothesis import given, settings
from hypothesis import strategies as st
import pytest


@pytest.mark.parametrize("fuzzer", fuzzers.FUZZERS, ids=lambda f: f.__name__)
@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_damage_is_content_or_one_clear_error(fuzzer, seed):
  fuzzer(seed)

"""Text reaches every terminal."""

import io
import sys

import pytest

from insvp_jax import errors

TEXT = "98.1 \u00b1 0.2, 3 \u00d7 4, \u00c4pfel, \udce4"


@pytest.mark.parametrize(
  "error, expected",
  [
    (MemoryError(), True),
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), True),
    (RuntimeError("INTERNAL: no room"), False),
    (ValueError("RESOURCE_EXHAUSTED"), False),
  ],
)
def test_errors_that_say_that_the_memory_is_too_small(error, expected):
  assert errors.is_out_of_memory(error) == expected


@pytest.mark.parametrize(
  "encoding, expected",
  [
    ("ascii", "98.1 +- 0.2, 3 x 4, \\xc4pfel, \\udce4"),
    ("latin-1", "98.1 \u00b1 0.2, 3 \u00d7 4, \u00c4pfel, \\udce4"),
    ("utf-8", "98.1 \u00b1 0.2, 3 \u00d7 4, \u00c4pfel, \\udce4"),
  ],
)
def test_what_an_encoding_lacks_is_spelt(monkeypatch, encoding, expected):
  file = io.BytesIO()
  monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, encoding))
  monkeypatch.setattr(sys, "stderr", io.StringIO())  # takes all by itself
  errors.print_anything()
  print(TEXT, end="", flush=True)
  assert file.getvalue().decode(encoding) == expected
  monkeypatch.setattr(sys, "stdout", None)
  errors.print_anything()


def test_a_message_moves_no_cursor_and_reads_as_it_is():
  text = "\x1b]0;title\x07 c\u202elerr\x9b1m\r\n \u00c4\u200d"
  shown = r"\x1b]0;title\x07 c\u202elerr\x9b1m" + " \u00c4\u200d"
  assert errors.one_line(ValueError(text)) == shown
  assert errors.printable(shown) == shown

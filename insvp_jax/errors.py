"""How text reaches a user: bad input in one line, a bug with its traceback."""

import codecs
import io
from pathlib import Path
import sys
import unicodedata

# What this package raises for bad input.
INPUT_ERRORS = (ValueError, KeyError, FloatingPointError, OSError)
# How characters are spelt that a terminal or a file behind a pipe cannot take.
_SPELT = {"±": "+-", "×": "x", "–": "-", "…": "..."}
# Characters that reorder the text around them, so that it reads as another.
_BIDIRECTIONAL = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def is_ours(error: BaseException) -> bool:
  """Returns whether this package raised the error, so that its message suffices.

  The same types from elsewhere are bugs, and keep their traceback; only what the
  operating system says (no space, no permission) is the user's to mend, too.
  """
  if isinstance(error, OSError):
    return True
  traceback = error.__traceback__
  if traceback is None:
    return False
  while traceback.tb_next is not None:
    traceback = traceback.tb_next
  raised_in = traceback.tb_frame.f_code.co_filename
  return raised_in.startswith(str(Path(__file__).parent))


def is_out_of_memory(error: BaseException) -> bool:
  """Returns whether an error says that host or device has too little memory."""
  # JAX has no type of its own for it.
  return isinstance(error, MemoryError) or (
    isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
  )


def one_line(error: BaseException) -> str:
  """Returns the message without line breaks and what else moves the cursor."""
  message: object = error
  # str(KeyError) is the repr of its message; ml_collections puts one in the other.
  while isinstance(message, KeyError | AttributeError) and message.args:
    message = message.args[0]
  return printable(" ".join(str(message).split()))


def printable(text: str) -> str:
  r"""Returns a text that every terminal can show, on one line.

  Names in files of others may hold anything. Bytes that are no UTF-8 become \xNN, and
  so do characters that a terminal obeys, and those that reorder the text.
  """
  return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
  """Returns a character, or an escape for one that cannot be shown."""
  # How Python keeps the bytes of file names that are no UTF-8.
  if "\udc80" <= character <= "\udcff":
    return f"\\x{ord(character) - 0xDC00:02x}"
  is_moving = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
  if is_moving or character in _BIDIRECTIONAL:
    return ascii(character)[1:-1]
  return character


def print_anything() -> None:
  """Lets standard output and error take every text, whatever their encoding.

  A result is not lost because its terminal is ASCII: "±" becomes "+-", and what has no
  such spelling its escape. Names of files that are no text in any encoding, too.
  """
  codecs.register_error("insvp_jax", _spell)
  for stream in (sys.stdout, sys.stderr):
    # None without a terminal on Windows; others in notebooks and tests.
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors="insvp_jax")


def _spell(error: UnicodeError) -> tuple[str, int]:
  """Returns what stands for characters that cannot be encoded, and where they end."""
  if not isinstance(error, UnicodeEncodeError):
    raise error
  text = error.object[error.start : error.end]
  escaped = (c.encode("ascii", "backslashreplace").decode() for c in text)
  spelt = (_SPELT.get(c, e) for c, e in zip(text, escaped, strict=True))
  return "".join(spelt), error.end

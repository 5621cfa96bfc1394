"""How an error of ours reaches a user: one line, no traceback."""

from pathlib import Path

# What this package raises for bad input.
INPUT_ERRORS = (ValueError, KeyError, FloatingPointError, OSError)


def is_ours(error: BaseException) -> bool:
  """Returns whether this package raised the error, so that its message suffices.

  The same types from elsewhere are bugs, and keep their traceback; only what the
  operating system says (no space, no permission) is the user's to mend, too.
  """
  if isinstance(error, OSError):
    return True
  frame = error.__traceback__
  while frame.tb_next is not None:
    frame = frame.tb_next
  package = str(Path(__file__).parent)
  return frame.tb_frame.f_code.co_filename.startswith(package)


def one_line(error: BaseException) -> str:
  """Returns the message without line breaks."""
  text: object = error
  # str(KeyError) is the repr of its message; ml_collections puts one in the other.
  while isinstance(text, KeyError | AttributeError) and text.args:
    text = text.args[0]
  return " ".join(str(text).split())

"""How an error reaches a user: bad input in one line, a bug with its traceback."""

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
  traceback = error.__traceback__
  if traceback is None:
    return False
  while traceback.tb_next is not None:
    traceback = traceback.tb_next
  raised_in = traceback.tb_frame.f_code.co_filename
  return raised_in.startswith(str(Path(__file__).parent))


def one_line(error: BaseException) -> str:
  """Returns the message without line breaks."""
  message: object = error
  # str(KeyError) is the repr of its message; ml_collections puts one in the other.
  while isinstance(message, KeyError | AttributeError) and message.args:
    message = message.args[0]
  return " ".join(str(message).split())

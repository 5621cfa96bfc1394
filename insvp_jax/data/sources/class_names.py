"""Names of classes as people write them: made alike, put in order, told where odd."""

from collections.abc import Iterable, Sequence
import re
import unicodedata

from absl import logging

from insvp_jax.errors import printable

# How many names a message tells.
_NUM_NAMED = 5


def class_name(text: str) -> str:
  """Returns the name of a class, which every terminal can show."""
  # In a locale that is not UTF-8, Python hands out the bytes of other names.
  text = text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
  # macOS decomposes accents: the same name has to be the same class everywhere.
  return printable(unicodedata.normalize("NFC", text))


def in_order(names: Iterable[str]) -> tuple[str, ...]:
  """Returns the names, each once: by their value if all are numbers, else as text.

  So grades stay in their order, and 10 comes after 2.
  """
  once = set(names)
  if all(re.fullmatch(r"-?[0-9]{1,15}(\.[0-9]{1,15})?", name) for name in once):
    return tuple(sorted(once, key=lambda name: (float(name), name)))
  return tuple(sorted(once))


def tell_alike(place: str, names: Sequence[str]) -> None:
  """Warns of classes that differ in case or spaces alone, and so may be one.

  Args:
    place: where they are, for the message.
    names: of all classes.
  """
  same: dict[str, list[str]] = {}
  for name in names:
    # Spaces of all kinds, also those without a width.
    letters = [c for c in name if unicodedata.category(c) not in ("Zs", "Cf")]
    same.setdefault("".join(letters).casefold(), []).append(name)
  if alike := [names for names in same.values() if len(names) > 1]:
    logging.warning(
      "%s: classes differ in case or spaces alone: %s; if they are one, give them one "
      "name",
      place,
      "; ".join(" and ".join(map(repr, names)) for names in alike[:_NUM_NAMED]),
    )

"""The same picture in two splits or under two classes: found, counted, left out.

Only images in memory are compared: a picture is the same where its stored square is.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools

from absl import logging
import numpy as np

from insvp_jax.data.splits import ArraySplit
from insvp_jax.errors import printable

# A picture in two of these splits stays in the first.
_ORDER = ("test", "val", "train")
_KEY_SIDE = 8  # Pixels per side that tell most pictures apart; the others are compared.


@dataclasses.dataclass(frozen=True)
class Group:
  """Equal pictures.

  Attributes:
    places: (split, position in it) of each.
    labels: of each.
  """

  places: tuple[tuple[str, int], ...]
  labels: tuple[int, ...]

  @property
  def leaks(self) -> bool:
    """Whether it is in two splits."""
    return len({split for split, _ in self.places}) > 1

  @property
  def contradicts(self) -> bool:
    """Whether it is under two classes."""
    return len(set(self.labels)) > 1


def find(splits: Mapping[str, ArraySplit]) -> list[Group]:
  """Returns the groups of equal pictures that leak or contradict."""
  by_key: dict[bytes, list[tuple[str, int]]] = {}
  for name in sorted(splits, key=_ORDER.index):
    images = splits[name].images
    step = max(1, images.shape[1] // _KEY_SIDE)
    keys = np.ascontiguousarray(images[:, ::step, ::step])
    for position, key in enumerate(keys):
      by_key.setdefault(key.tobytes(), []).append((name, position))
  groups = []
  for places in by_key.values():
    for same in _equal(splits, places) if len(places) > 1 else ():
      labels = tuple(int(splits[name].labels[i]) for name, i in same)
      group = Group(tuple(same), labels)
      if group.leaks or group.contradicts:
        groups.append(group)
  return groups


def _equal(
  splits: Mapping[str, ArraySplit], places: Sequence[tuple[str, int]]
) -> list[list[tuple[str, int]]]:
  """Returns those of the places whose pictures are equal, group by group."""
  by_pixels: dict[bytes, list[tuple[str, int]]] = {}
  for name, i in places:
    by_pixels.setdefault(splits[name].images[i].tobytes(), []).append((name, i))
  return [same for same in by_pixels.values() if len(same) > 1]


def check(
  splits: Mapping[str, ArraySplit],
  files: Mapping[str, Sequence[str]],
  action: str,
  source: str,
) -> dict[str, np.ndarray]:
  """Does about equal pictures what `config.data.duplicates` says.

  Args:
    splits: those of train, val and test that are in memory.
    files: the names of their files.
    action: "warn", "drop" or "error".
    source: what the images are of, for the message.

  Returns:
    For each of the splits the positions that are kept. With "drop", a picture in two
    splits stays in test, or else in val; one under two classes stays in test alone.

  Raises:
    ValueError: `action` is "error", and there are some.
  """
  kept = {name: np.arange(len(split)) for name, split in splits.items()}
  groups = find(splits)
  if not groups:
    return kept
  message = f"{source}: {_text(groups, files)}"
  if action == "error":
    raise ValueError(
      f"{message}. Remove them, or set config.data.duplicates to drop or warn."
    )
  if action == "warn":
    logging.warning(
      "%s; accuracies are too good by that. --config.data.duplicates=drop leaves them "
      "out of train and val",
      message,
    )
    return kept
  dropped: dict[str, set[int]] = {name: set() for name in splits}
  for group in groups:
    first = group.places[0][0]  # The order of `find` is that of _ORDER.
    for name, position in group.places:
      if name != "test" and (group.contradicts or name != first):
        dropped[name].add(position)
  logging.warning(
    "%s; left out: %s",
    message,
    ", ".join(f"{len(some)} of {name}" for name, some in dropped.items() if some)
    or "none, as all are of test",
  )
  return {
    name: np.array([i for i in positions if i not in dropped[name]], int)
    for name, positions in kept.items()
  }


def _text(groups: Sequence[Group], files: Mapping[str, Sequence[str]]) -> str:
  """Returns how many pictures are twice there, and two names for each kind."""
  parts = []
  for is_kind, words in (
    (lambda group: group.leaks, "in two splits"),
    (lambda group: group.contradicts, "under two classes"),
  ):
    kind = [group for group in groups if is_kind(group)]
    if not kind:
      continue
    pairs = itertools.combinations(zip(kind[0].places, kind[0].labels, strict=True), 2)
    leaks = words == "in two splits"
    one, two = next(
      (a[0], b[0]) for a, b in pairs if (a[0][0] != b[0][0] if leaks else a[1] != b[1])
    )
    pair = (printable(files[split][position]) for split, position in (two, one))
    names = " and ".join(pair)
    plural = "picture is" if len(kind) == 1 else "pictures are"
    parts.append(f"{len(kind)} {plural} {words} (equal pixels), such as {names}")
  return "; ".join(parts)

"""Which split a folder's name speaks of: "Test Images", "seg_train", "val2017", "dev".

A name is only half of the evidence, since classes may be called "test_tube" or "train":
`image_folder` looks at what the folders hold, too.
"""

import dataclasses
import re
import unicodedata

# The words that stand for splits. "eval" is val, or test beside another val.
_WORDS = {
  "train": ("train", "training", "trn", "tr"),
  "val": ("val", "valid", "validation", "vld", "va", "dev", "devel", "development"),
  "eval": ("eval", "evaluation"),
  "test": ("test", "testing", "tests", "tst", "te", "ts", "holdout", "heldout"),
  "unlabelled": (
    *("unlabelled", "unlabeled", "unlabel", "unsup", "unsupervised", "nolabel"),
    *("pred", "preds", "predict", "prediction", "predictions", "inference"),
  ),
}
_SPLIT_OF = {word: split for split, words in _WORDS.items() for word in words}
# A folder of such a name and no other holds a split, whatever lies beside it.
_USUAL = {"train", "training", "val", "valid", "validation", "test", "testing"}
# Words that say nothing about which split it is. They may be written together with one
# that does, as in "trainset".
_NEUTRAL = {
  *("set", "sets", "data", "dataset", "datasets", "split", "splits", "part"),
  *("image", "images", "img", "imgs", "pic", "pics", "pictures", "photo", "photos"),
  *("folder", "dir", "files", "jpg", "jpeg", "png", "rgb", "raw", "all", "full"),
  *("small", "final", "new", "resized", "cropped", "crops", "labelled", "labeled"),
}
_ALTERNATIVES = "|".join(sorted(_NEUTRAL, key=len, reverse=True))
# Two letters may be the end of any word.
_LONG = "|".join(sorted((w for w in _SPLIT_OF if len(w) > 2), key=len, reverse=True))
_COMPOUND = re.compile(f"(?:{_ALTERNATIVES})?({_LONG})({_LONG})?(?:{_ALTERNATIVES})?")


@dataclasses.dataclass(frozen=True)
class SplitName:
  """What a folder's name says.

  Attributes:
    split: "train", "val", "eval", "test" or "unlabelled".
    rest: the words that say nothing of splits; those of a data set, or of a class.
    is_usual: whether the name is one of the usual words, alone or with neutral ones.
  """

  split: str
  rest: tuple[str, ...]
  is_usual: bool


def parse(name: str) -> SplitName | None:
  """Returns what a folder's name says about a split; None if it speaks of none."""
  text = unicodedata.normalize("NFKC", name)
  text = re.sub("(?<=[a-z])(?=[A-Z])", " ", text).lower()
  text = re.sub(r"\b(hold|held)[\W_]*out", "holdout", text)
  # Years, versions and sizes: "val2017", "train_64x64".
  text = re.sub(r"\d+(x\d+)?", " ", text)
  words: list[str] = []
  rest: list[str] = []
  for token in re.findall(r"[^\W\d_]+", text):
    if token in _SPLIT_OF:
      words.append(token)
    elif token in _NEUTRAL:
      continue
    elif match := _COMPOUND.fullmatch(token):
      words.extend(word for word in match.groups() if word)
    else:
      rest.append(token)
  splits = {_SPLIT_OF[word] for word in words}
  if "unlabelled" in splits:
    split = "unlabelled"
  elif splits == {"train", "val"}:  # "trainval"
    split = "train"
  elif len(splits) == 1:
    (split,) = splits
  else:
    return None
  usual = not rest and len(words) == 1 and words[0] in _USUAL
  return SplitName(split, tuple(rest), usual)

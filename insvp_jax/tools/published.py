"""The papers' own tables, as numbers to stand beside those of runs.

A table is a text, a line for each row: its label, marks of `NOTES` in braces, and
behind a bar its cells. A cell is an accuracy in percent as it was printed, then its
wins over full fine-tuning in brackets where the paper counts them, then marks. A `-` is
a cell that the paper leaves empty. A column of parameters comes first.

Sources: InsVP (Liu et al., "InsVP: Efficient Instance Visual Prompting from Image
Itself", ACM Multimedia 2024), tables 1 to 5; VPT (Jia et al., "Visual Prompt Tuning",
ECCV 2022), tables 1, 2, 4 and 5. The accuracies by task of VTAB-1k are not in VPT's
text: they are those that V-PETL Bench lists (Xin et al. 2024).
"""

from collections.abc import Mapping
import dataclasses
import functools
import re
import types
from typing import Any

from insvp_jax import trees
from insvp_jax.data import GROUPS, TASKS

# What a mark in a cell or behind a row's label says.
NOTES = {
  "*": "of 1,000 training images: equal to VPT's result on VTAB-1k, while other rows "
  "of this table train on the whole sets",
  "+": "a mean over results on whole training sets and on 1,000 images",
  "r": "on ResNeXt-101, not on this table's backbone",
  "m": "on MoCo-v3, not on this table's backbone",
  "c": "on CLIP, not on this table's backbone",
  "z": "in VPT's code both projections start at zero, so that only a bias trains",
  "q": "as InsVP's table 1 has it, for four of its ten data sets",
  "s": "listed by V-PETL Bench, not in VPT's text",
}

# What the papers call a method: (its name here, the fields that make it this row).
_WHOLE = {f"use_{part}": True for part in ("patch", "global", "common", "specific")}
_METHODS: dict[str, tuple[str, Mapping[str, Any]]] = {
  "Full": ("full", {}),
  "Linear": ("linear", {}),
  "Partial": ("partial", {}),
  "Partial-1": ("partial", {"blocks": 1}),
  "MLP-3": ("mlp", {"hidden_layers": 2}),
  "Bias": ("bias", {}),
  "Sidetune": ("sidetune", {}),
  "Adapter": ("adapter", {}),
  "AdaptFormer": ("adaptformer", {}),
  "VP": ("vp", {}),
  "VPT": ("vpt_deep", {"location": "prepend"}),
  "VPT-Shallow": ("vpt_shallow", {"location": "prepend"}),
  "VPT-Deep": ("vpt_deep", {"location": "prepend"}),
  "VPT (pad)": ("vpt_shallow", {"location": "pad"}),
  "DAM-VP": ("dam_vp", {}),
  "ILM-VP": ("ilm_vp", {}),
  "Yoo et al.": ("gated", {}),
  "E²VPT": ("e2vpt", {}),
  "TransHP": ("transhp", {}),
  "LION": ("lion", {}),
  "AutoVP": ("autovp", {}),
  "InsVP": ("insvp", _WHOLE),
  # InsVP's table 5 adds one component from row to row.
  "no prompts": ("linear", {}),
  "patch": (
    "insvp",
    {**_WHOLE, "use_global": False, "use_common": False, "use_specific": False},
  ),
  "+ global": ("insvp", {**_WHOLE, "use_common": False, "use_specific": False}),
  "+ common": ("insvp", {**_WHOLE, "use_specific": False}),
  "+ specific": ("insvp", _WHOLE),
}


@dataclasses.dataclass(frozen=True)
class Column:
  """A column of accuracies.

  Attributes:
    title: its name.
    parts: names of tasks, or of the tasks of each group: the accuracy is the mean over
      the parts of each part's mean over its tasks.
    backbone: the id of the backbone whose runs belong here; "" for any.
  """

  title: str
  parts: tuple[tuple[str, ...], ...]
  backbone: str = ""

  @property
  def tasks(self) -> tuple[str, ...]:
    """All tasks of the column."""
    return tuple(task for part in self.parts for task in part)


@dataclasses.dataclass(frozen=True)
class PaperCell:
  """What a paper printed.

  Attributes:
    accuracy: in percent.
    text: the accuracy with its digits.
    wins: on how many of the column's tasks the method beats full fine-tuning; None
      where the paper does not say.
    notes: what else to know of it.
  """

  accuracy: float
  text: str
  wins: int | None = None
  notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class PaperRow:
  """A row of a paper's table.

  Attributes:
    label: what the paper calls the method.
    method: its name in `METHODS`.
    fields: of the method, that a run of this row has.
    cells: one for each column; None where the paper has none.
    params: of all tasks together, in backbones; None where the paper does not say.
    notes: what to know of the whole row.
  """

  label: str
  method: str
  fields: Mapping[str, Any]
  cells: tuple[PaperCell | None, ...]
  params: float | None = None
  notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class PaperTable:
  """A paper's table.

  Attributes:
    name: by which it is asked for.
    title: what it shows.
    source: paper and table.
    columns: of accuracies.
    rows: as printed.
    counts_wins: whether there are wins over full fine-tuning.
    counts_params: whether there is a column of total parameters.
    takes_others: whether runs of methods that the paper has not become rows, too.
  """

  name: str
  title: str
  source: str
  columns: tuple[Column, ...]
  rows: tuple[PaperRow, ...]
  counts_wins: bool = False
  counts_params: bool = False
  takes_others: bool = True

  @property
  def backbones(self) -> tuple[str, ...]:
    """The ids of the columns' backbones, each once."""
    return tuple(dict.fromkeys(column.backbone for column in self.columns))


def _cell(text: str) -> PaperCell | None:
  """Returns the cell of "68.93(1)*"; None of "-"."""
  if text == "-":
    return None
  match = re.fullmatch(r"([0-9.]+)(?:\(([0-9]+)\))?(\D*)", text)
  if match is None:
    raise ValueError(f"{text!r} is no cell of a published table.")
  number, wins, marks = match.groups()
  notes = tuple(NOTES[mark] for mark in marks)
  return PaperCell(float(number), number, None if wins is None else int(wins), notes)


def _rows(text: str, has_params: bool = False) -> tuple[PaperRow, ...]:
  """Returns the rows of a text."""
  rows = []
  for line in text.strip().splitlines():
    label, _, values = line.strip().partition(" | ")
    label, _, marks = label.partition(" {")
    words = values.split()
    params = float(words.pop(0)) if has_params else None
    notes = tuple(NOTES[mark] for mark in marks.removesuffix("}"))
    cells = tuple(map(_cell, words))
    rows.append(PaperRow(label, *_METHODS[label], cells, params, notes))
  return tuple(rows)


# --- The columns.

# The files of these backbones, as `--config.backbone.name` takes them.
VIT, SWIN = "vit_b16_i21k", "timm/swin_base_patch4_window7_224.ms_in22k"
MOCO, MAE = "mocov3_b16_i1k", "mae_b16_i1k"
CONVNEXT, RESNET = "timm/convnext_base.fb_in22k", "timm/resnet50.tv_in1k"
# As InsVP's tables call the data sets of HTA, in their order.
_HTA = {
  "DTD": "hta_dtd",
  "CUB": "hta_cub",
  "Birds": "hta_nabirds",
  "Dogs": "hta_stanford_dogs",
  "Flowers": "hta_oxford_flowers",
  "Food": "hta_food101",
  "C100": "hta_cifar100",
  "C10": "hta_cifar10",
  "GTSRB": "hta_gtsrb",
  "SVHN": "hta_svhn",
}
_VTAB = ("natural", "specialized", "structured")


def _hta(backbone: str, *titles: str) -> tuple[Column, ...]:
  """Returns a column for each data set of HTA."""
  return tuple(Column(title, ((_HTA[title],),), backbone) for title in titles)


def _groups(backbone: str, *names: str, prefix: str = "") -> tuple[Column, ...]:
  """Returns a column for each group of tasks, of the mean over them."""
  titles = {"fgvc": "FGVC"}
  return tuple(
    Column(f"{prefix}{titles.get(n, n.title())}", (GROUPS[n],), backbone) for n in names
  )


def _vtab_tasks() -> tuple[Column, ...]:
  """Returns a column for each task of VTAB, in the order of V-PETL's list."""
  order = (
    *("cifar100", "caltech101", "dtd", "oxford_flowers102", "oxford_iiit_pet"),
    *("svhn", "sun397", "patch_camelyon", "eurosat", "resisc45"),
    *("diabetic_retinopathy", "clevr_count", "clevr_distance", "dmlab"),
    *("kitti_distance", "dsprites_location", "dsprites_orientation"),
    *("smallnorb_azimuth", "smallnorb_elevation"),
  )
  return tuple(Column(task, ((task,),), VIT) for task in order)


# --- The tables.

_INSVP = "InsVP (Liu et al. 2024)"
_VPT = "VPT (Jia et al. 2022)"


@functools.cache
def tables() -> Mapping[str, PaperTable]:
  """Returns the tables by name."""
  mean = Column("mean", (tuple(_HTA.values()),), VIT)
  listed = (
    PaperTable(
      "insvp_1",
      "HTA: ten data sets, ViT-B/16 pre-trained on ImageNet-21k",
      f"{_INSVP}, table 1",
      (*_hta(VIT, *_HTA), mean),
      _rows("""
        Full | 64.3* 87.3 82.7 89.4 98.8 84.9 68.9* 97.4 97.1 87.4* 85.8+
        Linear | 63.2* 85.3 75.9 86.2 97.9 84.4 63.4* 96.3 68.0 36.6* 75.7+
        Partial-1 | 70.1 85.6 77.8 85.5 98.2 83.8 78.0 95.0 89.3 82.4 84.6
        MLP-3 | 66.2 85.1 77.3 84.9 97.9 84.6 77.5 93.2 71.8 60.5 79.9
        Bias | 69.8 88.4 84.2 91.2 98.8 86.2 82.9 96.9 89.9 82.5 87.1
        Sidetune | 57.7 84.7 75.8 85.8 96.9 78.7 68.8 90.4 90.9 80.5 81.0
        Adapter | 62.7 87.1 84.3 89.8 98.5 86.0 74.2 97.7 91.1 36.3 80.8
        AdaptFormer | 64.2 87.3 84.1 88.1 98.4 85.7 79.4 96.5 91.7 83.0 85.8
        VP | 59.5 84.6 77.7 84.5 97.7 80.5 78.7 94.2 89.4 87.6 83.4
        VPT | 65.8* 88.5 84.2 90.2 99.0 83.3 78.8* 96.8 90.7 78.1* 85.5+
        DAM-VP | 73.1 87.5 82.1 92.3 99.2 86.9 88.1 97.3 90.6 87.9 88.5
        ILM-VP {r} | 41.4 7.7 11.6 87.6 27.9 23.0 45.9 81.7 59.9 81.4 46.8
        Yoo et al. {m} | 69.6 82.9 76.0 83.4 93.7 82.9 85.8 97.3 92.6 90.1 85.4
        E²VPT | 66.8 88.4 84.2 91.3 99.0 84.0 80.4 97.1 91.0 79.2 86.1
        TransHP | 68.4 87.1 82.7 91.5 98.6 85.5 86.9 97.3 91.3 82.9 87.2
        LION | - - - 83.6 90.5 - 65.4 90.8 - - -
        AutoVP {c} | 62.5 85.4 83.5 90.3 90.4 82.3 77.9 95.2 93.1 92.9 85.4
        InsVP | 74.5 89.3 84.6 93.6 99.2 89.5 91.3 98.4 96.1 96.1 91.3
      """),
    ),
    PaperTable(
      "insvp_2",
      "VTAB-1k, ViT-B/16 pre-trained on ImageNet-21k",
      f"{_INSVP}, table 2",
      _groups(VIT, *_VTAB),
      _rows("""
        Full | 75.9 83.4 47.6
        Linear | 68.9 77.2 26.8
        Partial-1 | 69.4 78.5 34.2
        MLP-3 | 67.8 72.8 30.6
        Bias | 73.3 78.3 44.1
        Sidetune | 58.2 68.1 23.4
        Adapter {z} | 70.4 77.1 33.4
        VPT | 78.5 82.4 55.0
        Yoo et al. {m} | 74.8 83.4 49.1
        E²VPT | 80.0 84.4 57.4
        InsVP | 81.8 85.2 58.4
      """),
    ),
    PaperTable(
      "insvp_3",
      "HTA, Swin-B pre-trained on ImageNet-21k",
      f"{_INSVP}, table 3",
      _hta(SWIN, "CUB", "Birds", "C100", "GTSRB", "SVHN"),
      _rows("""
        Full | 89.7 86.8 73.3 97.1 91.2
        VP | 86.5 82.9 80.6 82.4 80.3
        VPT | 90.0 85.4 80.5 86.2 87.8
        DAM-VP | 90.4 86.9 88.1 86.8 81.7
        E²VPT | 90.3 85.2 83.5 87.1 88.2
        InsVP | 91.2 87.7 90.3 90.1 91.4
      """),
    ),
    PaperTable(
      "insvp_4",
      "HTA, ViT-B/16 pre-trained by MoCo-v3",
      f"{_INSVP}, table 4",
      _hta(MOCO, "CUB", "Birds", "C100", "GTSRB", "SVHN"),
      _rows("""
        Full | 78.8 72.8 84.0 96.8 90.6
        VP | 75.4 69.0 79.1 89.8 91.3
        VPT | 72.1 65.3 72.8 88.5 61.8
        DAM-VP | 79.7 71.4 81.8 92.8 89.3
        E²VPT | 73.3 66.8 80.4 89.2 80.3
        InsVP | 80.2 72.8 83.5 95.6 92.7
      """),
    ),
    PaperTable(
      "insvp_5",
      "InsVP's components, one more from row to row",
      f"{_INSVP}, table 5",
      _hta(VIT, "CUB", "Birds", "C100", "SVHN"),
      _rows("""
        no prompts | 85.3 75.9 63.4* 36.6*
        patch | 87.1 83.1 85.5 85.3
        + global | 87.9 83.5 87.0 91.8
        + common | 88.9 84.3 90.3 94.5
        + specific | 89.3 84.6 91.2 96.1
      """),
      takes_others=False,
    ),
    PaperTable(
      "vpt_1",
      "FGVC and VTAB-1k, ViT-B/16 pre-trained on ImageNet-21k",
      f"{_VPT}, table 1",
      _groups(VIT, "fgvc", *_VTAB),
      _rows(
        """
        Full | 24.02 88.54 75.88 83.36 47.64
        Linear | 1.02 79.32(0) 68.93(1) 77.16(1) 26.84(0)
        Partial-1 | 3.00 82.63(0) 69.44(2) 78.53(0) 34.17(0)
        MLP-3 | 1.35 79.80(0) 67.80(2) 72.83(0) 30.62(0)
        Sidetune | 3.69 78.35(0) 58.21(0) 68.12(0) 23.41(0)
        Bias | 1.05 88.41(3) 73.30(3) 78.25(0) 44.09(2)
        Adapter {z} | 1.23 85.66(2) 70.39(4) 77.11(0) 33.43(0)
        VPT-Shallow | 1.04 84.62(1) 76.81(4) 79.66(0) 46.98(4)
        VPT-Deep | 1.18 89.11(4) 78.48(6) 82.43(2) 54.98(8)
        """,
        has_params=True,
      ),
      counts_wins=True,
      counts_params=True,
    ),
    PaperTable(
      "vpt_2",
      "VTAB-1k, Swin-B pre-trained on ImageNet-21k",
      f"{_VPT}, table 2",
      _groups(SWIN, *_VTAB),
      _rows(
        """
        Full | 19.01 79.10 86.21 59.65
        Linear | 1.01 73.52(5) 80.77(0) 33.52(0)
        MLP-3 | 1.47 73.56(5) 75.21(0) 35.69(0)
        Partial | 3.77 73.11(4) 81.70(0) 34.96(0)
        Bias | 1.06 74.19(2) 80.14(0) 42.42(0)
        VPT-Shallow | 1.01 79.85(6) 82.45(0) 37.75(0)
        VPT-Deep | 1.05 76.78(6) 84.53(0) 53.35(0)
        """,
        has_params=True,
      ),
      counts_wins=True,
      counts_params=True,
    ),
    PaperTable(
      "vpt_4",
      "VTAB-1k, ViT-B/16 pre-trained without labels",
      f"{_VPT}, table 4",
      (
        *_groups(MAE, *_VTAB, prefix="MAE "),
        *_groups(MOCO, *_VTAB, prefix="MoCo-v3 "),
      ),
      _rows("""
        Full | 59.29 79.68 53.82 71.95 84.72 51.98
        Linear | 18.87 53.72 23.70 67.46 81.08 30.33
        Partial-1 | 58.44 78.28 47.64 72.31 84.58 47.89
        Bias | 54.55 75.68 47.70 72.89 81.14 53.43
        Adapter {z} | 54.90 75.19 38.98 74.19 82.66 47.69
        VPT-Shallow | 39.96 69.65 27.50 67.34 82.26 37.55
        VPT-Deep | 36.02 60.61 26.57 70.27 83.04 42.38
      """),
      counts_wins=True,
    ),
    PaperTable(
      "vpt_5",
      "VTAB-1k, ConvNets: ConvNeXt-B (ImageNet-21k) and ResNet-50 (ImageNet-1k)",
      f"{_VPT}, table 5",
      (
        *_groups(CONVNEXT, *_VTAB, prefix="ConvNeXt "),
        *_groups(RESNET, *_VTAB, prefix="ResNet "),
      ),
      _rows("""
        Full | 77.97 83.71 60.41 59.72 76.66 54.08
        Linear | 74.48 81.50 34.76 63.75 77.60 30.96
        Partial-1 | 73.76 81.64 39.55 64.34 78.64 45.78
        MLP-3 | 73.78 81.36 35.68 61.79 70.77 33.97
        Bias | 69.07 72.81 25.29 63.51 77.22 33.39
        VPT (pad) | 78.48 83.00 44.64 66.25 77.32 37.52
      """),
      counts_wins=True,
    ),
    PaperTable(
      "vpt_tasks",
      "VTAB-1k by task, ViT-B/16 pre-trained on ImageNet-21k",
      "VPT (Jia et al. 2022), the accuracies by task as V-PETL Bench lists them",
      _vtab_tasks(),
      _rows("""
        VPT-Shallow {s} | 77.7 86.9 62.6 97.5 87.3 74.5 51.2 78.2 92.0 75.6 72.9 50.5 \
          58.6 40.5 67.1 68.7 36.1 20.2 34.1
        VPT-Deep {s} | 78.8 90.8 65.8 98.0 88.3 78.1 49.6 81.8 96.1 83.4 68.4 68.5 \
          60.0 46.5 72.8 73.6 47.9 32.9 37.8
      """),
    ),
    PaperTable(
      "lion",
      "LION, ViT-B/16 pre-trained on ImageNet-21k",
      f"{_INSVP}, table 1",
      _hta(VIT, "Dogs", "Flowers", "C100", "C10"),
      _rows("LION {q} | 83.6 90.5 65.4 90.8"),
      takes_others=False,
    ),
  )
  return types.MappingProxyType({table.name: table for table in listed})


def table(name: str) -> PaperTable:
  """Returns a paper's table.

  Raises:
    ValueError: there is none of that name, with the nearest that there is.
  """
  return trees.lookup(tables(), name, "table")


def num_train(task: str) -> frozenset[int]:
  """Returns how many images the published protocols' final models are trained on.

  Args:
    task: its name; for one that is not published there is none.
  """
  subsets = TASKS[task].subsets.values() if task in TASKS else ()
  return frozenset(s.train + (s.val if s.retrain else 0) for s in subsets)

"""InsVP's presets, and the rules that its fields must keep."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from insvp_jax import trees
from insvp_jax.methods import checks
from insvp_jax.methods.base import BackboneSpec
from insvp_jax.methods.insvp_prompters import ACTIVATIONS, specific_grid
from insvp_jax.methods.ops import conv

CHOICES = {
  "specific_activation": tuple(ACTIVATIONS),
  "specific_input": ("original", "prompted"),
  "prompt_init": ("vpt", "unit"),
  "conv": conv.CHOICES,
}
LENGTHS = {"global_kernels": 2, "global_dilations": 2, "specific_kernels": 3}

# Shared by the presets.
_COMMON = {
  "use_patch": True,
  "use_global": True,
  "use_common": True,
  "use_specific": True,
  "prompt_length": 9,
  "patch_hidden": 16,
  "global_hidden": 6,
  "specific_kernels": (9, 5, 3),
  "simam": False,
  "dropout": 0.1,
  "conv": conv.AUTO,
}
PRESETS = {
  # Equations 4 to 13. What the paper leaves open: a global prompter with the
  # extents 11 and 25 of the released one, dilated; VPT's prompt_init.
  "paper": {
    **_COMMON,
    "global_kernels": (3, 3),
    "global_dilations": (5, 12),
    "specific_activation": "relu",
    "specific_input": "original",
    "train_specific": True,
    "image_fusion": (0.3, 0.7),
    "feature_fusion": (0.5, 0.5),
    "prompt_init": "vpt",
    "prompt_dropout": 0.0,
  },
  # What the authors' published code computes.
  "release": {
    **_COMMON,
    "global_kernels": (11, 25),
    "global_dilations": (1, 1),
    "specific_activation": "leaky_relu",
    "specific_input": "prompted",
    "train_specific": False,
    "image_fusion": (1.0, 2.0),
    "feature_fusion": (1.0, 1.0),
    "prompt_init": "unit",
    "prompt_dropout": 0.1,
  },
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """InsVP's fields after the preset's defaults; see `InsVP` for each."""

  prompt_length: int
  prompted_blocks: int
  use_patch: bool
  use_global: bool
  use_common: bool
  use_specific: bool
  patch_hidden: int
  global_hidden: int
  global_kernels: Sequence[int]
  global_dilations: Sequence[int]
  specific_kernels: Sequence[int]
  specific_activation: str
  specific_input: str
  train_specific: bool
  image_fusion: Sequence[float]
  feature_fusion: Sequence[float]
  simam: bool
  prompt_init: str
  dropout: float
  prompt_dropout: float
  conv: str


def _fusion_default(preset: str, default: Sequence[float], used: Sequence[bool]):
  """The paper fuses convexly: a component that stands alone has weight 1."""
  if preset == "paper" and sum(used) == 1:
    return (1.0, 1.0)
  return default


def resolve(preset: str, given: Mapping[str, Any], spec: BackboneSpec) -> Settings:
  """Fills in the preset's defaults and checks every value.

  Args:
    preset: a key of `PRESETS`.
    given: values by field name; None stands for the preset's.
    spec: the backbone's sizes.

  Raises:
    ValueError: an unknown preset, or a value that a field cannot have.
  """
  values: dict[str, Any] = dict(trees.lookup(PRESETS, preset, "InsVP preset"))
  values["prompted_blocks"] = spec.depth
  given = {name: value for name, value in given.items() if value is not None}
  for name in ("use_patch", "use_global", "use_common", "use_specific"):
    values[name] = checks.boolean(name, given.get(name, values[name]))
  for name, used in (
    ("image_fusion", (values["use_patch"], values["use_global"])),
    ("feature_fusion", (values["use_common"], values["use_specific"])),
  ):
    values[name] = _fusion_default(preset, values[name], used)
  values.update(given)
  _check(values, spec)
  for name, length in LENGTHS.items():
    values[name] = checks.positive_ints(name, values[name], length)
  for name in ("image_fusion", "feature_fusion"):
    values[name] = checks.numbers(name, values[name], 2)
  for name in ("dropout", "prompt_dropout"):
    values[name] = checks.rate(name, values[name])
  return Settings(**values)


def _check(values: Mapping[str, Any], spec: BackboneSpec) -> None:
  for name in ("prompt_length", "patch_hidden", "global_hidden"):
    checks.positive_int(name, values[name])
  for name in ("simam", "train_specific"):
    checks.boolean(name, values[name])
  for name, known in CHOICES.items():
    checks.choice(name, values[name], known)
  checks.block_count("prompted_blocks", values["prompted_blocks"], spec.depth)
  if values["use_specific"]:
    specific_grid(spec.width, spec.image_size)

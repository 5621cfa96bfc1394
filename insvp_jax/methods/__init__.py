"""Adaptation methods: one file each, found by name in `METHODS`."""

from collections.abc import Mapping
import re
from typing import Any

from insvp_jax import trees
from insvp_jax.methods import fields
from insvp_jax.methods.adapter import Adapter
from insvp_jax.methods.adapter_plus import AdapterPlus
from insvp_jax.methods.adaptformer import AdaptFormer
from insvp_jax.methods.autovp import AutoVP
from insvp_jax.methods.base import BackboneSpec, Method
from insvp_jax.methods.bias import Bias, BitFit
from insvp_jax.methods.combined import Combined, Parts
from insvp_jax.methods.convpass import Convpass
from insvp_jax.methods.dam_vp import DAMVP
from insvp_jax.methods.difffit import DiffFit
from insvp_jax.methods.e2vpt import E2VPT
from insvp_jax.methods.fact import FacTTK, FacTTT
from insvp_jax.methods.full import Full
from insvp_jax.methods.gated import Gated
from insvp_jax.methods.hooks import (
  PROMPTS,
  Adaptation,
  BlockPrompts,
  HookArrays,
  Hooks,
)
from insvp_jax.methods.ilm_vp import ILMVP
from insvp_jax.methods.insvp import InsVP
from insvp_jax.methods.linear import Linear
from insvp_jax.methods.lion import LION
from insvp_jax.methods.ln_tune import LNTune
from insvp_jax.methods.lora import LoRA
from insvp_jax.methods.mlp import MLP
from insvp_jax.methods.partial import Partial
from insvp_jax.methods.repadapter import RepAdapter
from insvp_jax.methods.sidetune import Sidetune
from insvp_jax.methods.ssf import SSF
from insvp_jax.methods.transhp import TransHP
from insvp_jax.methods.vapt import VAPT
from insvp_jax.methods.vfpt import VFPT
from insvp_jax.methods.vp import VP
from insvp_jax.methods.vpt import VPTDeep, VPTShallow

__all__ = [
  "METHODS",
  "Adaptation",
  "BackboneSpec",
  "BlockPrompts",
  "HookArrays",
  "Hooks",
  "Method",
  "create_method",
  "hparams_of",
  "method_fields",
  "parts_of",
  "register",
]

METHODS: dict[str, type[Method]] = {
  "insvp": InsVP,
  "vpt_shallow": VPTShallow,
  "vpt_deep": VPTDeep,
  "e2vpt": E2VPT,
  "vfpt": VFPT,
  "vapt": VAPT,
  "gated": Gated,
  "transhp": TransHP,
  "vp": VP,
  "dam_vp": DAMVP,
  "ilm_vp": ILMVP,
  "autovp": AutoVP,
  "linear": Linear,
  "full": Full,
  "mlp": MLP,
  "partial": Partial,
  "bias": Bias,
  "bitfit": BitFit,
  "ln_tune": LNTune,
  "difffit": DiffFit,
  "lora": LoRA,
  "ssf": SSF,
  "fact_tt": FacTTT,
  "fact_tk": FacTTK,
  "repadapter": RepAdapter,
  "adapter": Adapter,
  "adaptformer": AdaptFormer,
  "adapter_plus": AdapterPlus,
  "convpass": Convpass,
  "sidetune": Sidetune,
  "lion": LION,
}


# Between the names of methods that are combined.
_AND = "+"


def register(method: type[Method]) -> str:
  """Adds a class to `METHODS` under its name in lower case; returns that name.

  From then on configs have a section of its fields, and the trainer, a search and
  `load_run` know it. Adding it again changes nothing.

  Raises:
    ValueError: another class has the name.
  """
  name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", method.__name__).lower()
  # A notebook's cell that is run again makes the class anew.
  origin = (method.__module__, method.__qualname__)
  known = METHODS.setdefault(name, method)
  if (known.__module__, known.__qualname__) != origin:
    raise ValueError(
      f"there is a method {name!r} already, {known.__module__}.{known.__qualname__}; "
      "give your class another name."
    )
  METHODS[name] = method
  return name


def parts_of(name: str) -> tuple[str, ...]:
  """Returns the names of the methods that a name stands for: ("insvp", "lora").

  Raises:
    ValueError: an unknown method, with the nearest known name, or one that is there
      twice.
  """
  parts = tuple(name.split(_AND))
  for part in parts:
    trees.lookup(METHODS, part, "method")
  if len(set(parts)) < len(parts):
    raise ValueError(f"the method {name!r} has one method twice; name each once.")
  return parts


def method_fields(name: str) -> tuple[str, ...]:
  """Returns the names of a method's own fields.

  Raises:
    ValueError: unknown method, with the nearest known name.
  """
  return tuple(fields.declared(trees.lookup(METHODS, name, "method")))


def hparams_of(name: str) -> tuple[str, ...]:
  """Returns the names of the fields that may be data, of one method or of several."""
  return tuple(
    dict.fromkeys(h for part in parts_of(name) for h in METHODS[part].HPARAMS)
  )


def create_method(
  name: str | type[Method], spec: BackboneSpec, num_classes: int = 0, /, **kwargs: Any
) -> Method:
  """Returns a method for a backbone.

  Args:
    name: a key of `METHODS`, several of them joined by "+", or a class.
    spec: of the backbone.
    num_classes: k; 0 where there is no head.
    **kwargs: the method's own fields; None is the method's default. Of several methods
      {method: its fields}.

  Raises:
    ValueError: unknown method or field, with the nearest known name, a value that a
      field cannot have, a backbone that lacks what the method changes, or methods that
      cannot be combined.
  """
  if isinstance(name, type):
    return _create(name, name.__name__, spec, num_classes, kwargs)
  parts = parts_of(name)
  if len(parts) == 1:
    return _create(METHODS[name], name, spec, num_classes, kwargs)
  for section, values in kwargs.items():
    if section not in parts or not isinstance(values, Mapping):
      raise ValueError(
        f"unknown field {section!r} of the methods {name!r}, expected the fields of "
        f"each by its name: {', '.join(f'{part}={{...}}' for part in parts)}."
      )
  methods = {
    part: _create(METHODS[part], part, spec, num_classes, kwargs.get(part, {}))
    for part in parts
  }
  return Combined(spec, num_classes, Parts(methods))


def _create(
  method: type[Method],
  label: str,
  spec: BackboneSpec,
  num_classes: int,
  kwargs: Mapping[str, Any],
) -> Method:
  """Returns one method; `label` names it in messages."""
  known = tuple(fields.declared(method))
  for field in kwargs:
    if field not in known:
      listed = f"Known: {', '.join(known)}." if known else "It has none."
      raise ValueError(
        f"unknown field {field!r} of the method {label!r}."
        f"{trees.did_you_mean(field, known)} {listed}"
      )
  values = {field: value for field, value in kwargs.items() if value is not None}
  created = method(spec, num_classes, **values)
  missing = created.sites() - spec.sites
  if missing:
    listed = ", ".join(sorted(spec.sites)) or "none"
    raise ValueError(
      f"the method {label!r} changes what this backbone does not have: "
      f"{', '.join(sorted(missing))}. It has {listed}."
    )
  if PROMPTS in created.sites() and len(spec.stages) > 1 and not method.BY_STAGE:
    widths = ", ".join(str(stage.width) for stage in spec.stages)
    raise ValueError(
      f"the method {label!r} makes prompts of one width, but the stages of this "
      f"backbone have {widths}."
    )
  return created

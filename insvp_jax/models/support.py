"""Which method runs on which backbone: found by building them.

python -m insvp_jax.models.support
"""

from collections.abc import Mapping
from typing import Any

from insvp_jax.methods import METHODS, BackboneSpec, create_method
from insvp_jax.models.classifier import create_backbone

# {architecture: one of its variants}. What runs does not depend on the size.
ARCHITECTURES = {
  **{"ViT": "B/16", "Swin": "swin_b", "ConvNeXt": "convnext_b", "ResNet": "resnet50"},
}
# Settings that run where the method's defaults do not.
SETTINGS: tuple[tuple[str, Mapping[str, Any]], ...] = (
  ("insvp", {"use_common": False, "use_specific": False}),
  ("vpt_shallow", {"location": "pad"}),
)


def rows() -> list[tuple[str, Mapping[str, Any]]]:
  """Returns (method, fields) of all methods and of `SETTINGS`."""
  settings = [(name, fields) for name in METHODS for fields in ({}, *_others(name))]
  return settings


def _others(name: str) -> list[Mapping[str, Any]]:
  return [fields for method, fields in SETTINGS if method == name]


def label(method: str, fields: Mapping[str, Any]) -> str:
  """Returns a row's name in the table."""
  listed = ", ".join(f"`{field}={value}`" for field, value in fields.items())
  return f"`{method}` with {listed}" if fields else f"`{method}`"


def refusal(method: str, fields: Mapping[str, Any], spec: BackboneSpec) -> str:
  """Returns why a method does not run on a backbone; "" where it does."""
  try:
    create_method(method, spec, 2, **fields).trainable_patterns()
  except ValueError as error:
    return str(error)
  return ""


def table() -> str:
  """Returns the whole as Markdown."""
  # With its head, which some methods read.
  specs = {
    title: create_backbone(variant, 224, {"head_classes": 1000}).spec
    for title, variant in ARCHITECTURES.items()
  }
  lines = [f"| method | {' | '.join(specs)} |", "|---" * (1 + len(specs)) + "|"]
  for method, fields in rows():
    cells = ["" if refusal(method, fields, s) else "yes" for s in specs.values()]
    lines.append(f"| {label(method, fields)} | {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  print(table(), end="")

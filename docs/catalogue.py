"""The catalogue of methods, made from the methods themselves.

An extension of Sphinx: it stands in catalogue.md in place of `MARK`. Descriptions,
sources and fields are those of the classes, counts and backbones are found by building
them, costs and accuracies are read off measured.md.

  python docs/catalogue.py

prints it.
"""

from collections.abc import Mapping
from pathlib import Path
import re
import sys
from typing import Any

from insvp_jax import trees
from insvp_jax.methods import METHODS, Method, fields
from insvp_jax.models import support
from insvp_jax.models.classifier import create_backbone, create_model
from insvp_jax.train import state as state_lib

MARK = "<!-- catalogue -->"
MEASURED = Path(__file__).resolve().parent / "measured.md"
# What the published counts are of.
BACKBONE, NUM_CLASSES, SOURCE_CLASSES = "B/16", 100, 1000

# x: an image; B_j: block j; E_j, P_j, c_j: its patch tokens, prompts and class token;
# f: the feature; h: hidden units. Each with the names of its source.
EQUATIONS = {
  "insvp": (
    r"\tilde x = x + a\,p^l(x) + b\,p^g(x), \qquad "
    r"p^F_j = c\,p^c_j + d\,p^s(x), \qquad "
    r"[c_{j+1}, \_, E_{j+1}] = B_j([c_j, p^F_j, E_j])"
  ),
  "vpt_shallow": r"[c_1, Z_1, E_1] = B_1([c_0, P, E_0])",
  "vpt_deep": r"[c_j, \_, E_j] = B_j([c_{j-1}, P_{j-1}, E_{j-1}])",
  "e2vpt": (
    r"P_j \leftarrow m_\mathrm{token} \odot m_\mathrm{piece} \odot P_j, \qquad "
    r"K_j \leftarrow [K_j, P^K_j], \quad V_j \leftarrow [V_j, P^V_j]"
  ),
  "vfpt": (
    r"P_j \leftarrow [\Re\,\mathcal F_{2D}(P_j^{1:f}), P_j^{f+1:p}], \qquad "
    r"f = \lfloor \alpha p \rfloor"
  ),
  "vapt": (
    r"P_j = v + U\,\mathrm{relu}(D v), \qquad "
    r"v = A_j\,\mathrm{conv}_j(\mathrm{LN}_j(E_{j-1}))"
  ),
  "gated": (
    r"P^\mathrm{in}_{j+1} = g_j P^\mathrm{out}_j + (1 - g_j) P^\mathrm{in}_j, \quad "
    r"g_j = \sigma(\gamma_j), \qquad \mathrm{softmax}(Q K^\top / (\tau_j \sqrt{e}))"
  ),
  "transhp": (
    r"\mathcal L = \mathcal L_\mathrm{CE} + \textstyle\sum_j w_j\,\mathrm{CE}"
    r"\left((\langle p^\mathrm{out}_{j,c}, u_{j,c}\rangle)_c, y_j\right)"
  ),
  "vp": r"x' = x + \delta",
  "dam_vp": (
    r"x' = x + \delta_{c(x)}, \qquad c(x) = \arg\min_i \lVert f(x) - \mu_i \rVert"
  ),
  "ilm_vp": (
    r"x' = \mathrm{pad}(x) + m \odot \sigma(\delta), \qquad "
    r"\mathrm{logit}_k(x) = s_{\pi(k)}(x')"
  ),
  "autovp": (
    r"x' = \mathrm{pad}(\mathrm{resize}_\rho(x)) + m_\rho \odot \sigma(\delta), \qquad "
    r"\mathrm{logits}(x) = W s(x') + b \ \text{or}\ "
    r"\mathrm{mean}_{i \in \pi(k)} s_i(x')"
  ),
  "linear": r"\mathrm{logits} = W f(x) + b",
  "full": r"\mathrm{logits} = W f_\theta(x) + b, \quad \theta\ \text{trains, too}",
  "mlp": (
    r"\mathrm{logits} = W h_m(\cdots h_1(f)) + b, \qquad "
    r"h(f) = \mathrm{dropout}(\mathrm{BN}(\mathrm{relu}(W_h f + b_h)))"
  ),
  "partial": r"\theta = \{B_{l-k+1}, \dots, B_l, \mathrm{LN}, W, b\}",
  "bias": r"y = W x + b, \quad \text{of which}\ b\ \text{trains}",
  "bitfit": r"y = W x + b, \quad \text{of which}\ b\ \text{trains}",
  "ln_tune": r"y = \gamma \odot (x - \mathrm{E}[x]) / \sqrt{\mathrm{Var}[x]} + \beta",
  "difffit": (
    r"y = x + g_1 \odot \mathrm{MSA}(\mathrm{LN}(x)), \qquad "
    r"z = y + g_2 \odot \mathrm{MLP}(\mathrm{LN}(y))"
  ),
  "lora": r"W x \leftarrow W x + s\,U D x, \qquad \mathrm{rank}(U D) \le r",
  "ssf": r"y \leftarrow \gamma \odot y + \beta",
  "fact_tt": r"\Delta W_i = s\,u\,S_i\,v",
  "fact_tk": r"\Delta W_i = s\,u \left(\textstyle\sum_k p_{ki} C_{::k}\right) v",
  "repadapter": r"x \leftarrow x + s\,(B (A x + a) + b)",
  "adapter": r"m \leftarrow m + U\,\mathrm{act}(D m + b_D) + b_U",
  "adaptformer": (
    r"z = y + \mathrm{MLP}(\mathrm{LN}(y)) + s\,(U\,\mathrm{relu}(D y + b_D) + b_U)"
  ),
  "adapter_plus": r"z \leftarrow z + \gamma \odot (U\,\mathrm{gelu}(D z + b_D) + b_U)",
  "convpass": (
    r"y \leftarrow y + s\,U g(\mathrm{conv}_{3 \times 3}(g(D x))), \qquad "
    r"g(t) = t\,\sigma(1.702\,t)"
  ),
  "sidetune": (
    r"f' = s f + (1 - s)\,W\,\mathrm{flatten}(\mathrm{AlexNet}(x)), \qquad "
    r"s = \sigma(\alpha)"
  ),
  "lion": r"z = \tanh(W z + U x + b), \qquad x \leftarrow x + V z + c",
}


def trained(name: str) -> dict[str, int]:
  """Returns how many parameters train by default on ViT-B/16 at 224 px, by part.

  Nothing is computed, only shapes. A part is an array or a layer of the prompter, the
  backbone as a whole, or the head beyond the one dense layer that every method has.
  """
  # A scan has one block to trace; `partial` tells the blocks apart.
  backbone = {"scan": name != "partial"}
  if name in ("ilm_vp", "autovp"):
    backbone["head_classes"] = SOURCE_CLASSES
  model = create_model(
    BACKBONE, name, num_classes=NUM_CLASSES, backbone_kwargs=backbone
  )
  shapes = state_lib.param_shapes(model)
  mask = trees.mask(shapes, model.prompter.trainable_patterns())
  parts: dict[str, int] = {}
  for leaf, shape in trees.split(shapes, mask)[0].items():
    part, within, *_ = leaf.split("/")
    key = within if part == "prompter" else part
    parts[key] = parts.get(key, 0) + trees.count({leaf: shape})
  if "head" in parts:
    parts["head"] -= (model.prompter.spec.width + 1) * NUM_CLASSES
  return {part: number for part, number in parts.items() if number}


def _column(table: str, title: str) -> dict[str, str]:
  """Returns a column of measured.md by the first one.

  Args:
    table: its first two titles, joined by "|".
    title: of the column.
  """
  for block in re.findall(r"(?:^\|.*\n)+", MEASURED.read_text(), re.M):
    rows = [[c.strip(" `") for c in row.split("|")[1:-1]] for row in block.splitlines()]
    if rows[0][:2] == table.split("|"):
      at = rows[0].index(title)
      return {row[0]: row[at] for row in rows[2:]}
  raise LookupError(f"measured.md has no table {table!r}.")


def source(method: type[Method]) -> str:
  """Returns the papers of a method, as its file names them; "" for none."""
  doc = sys.modules[method.__module__].__doc__ or ""
  found = re.search(r"^Source: (.*?)(?:\n\n|\Z)", doc, re.M | re.S)
  return " ".join(found[1].split()) if found else ""


def field_table(method: type[Method], spec: Any) -> str:
  """Returns the fields of a method with their defaults on a backbone."""
  declared = fields.declared(method)
  resolved = method.resolve(spec, {})
  rows = [
    f"| `{name}` | {_default(field, resolved[name])} | {escape(field.doc)} |"
    for name, field in declared.items()
  ]
  if not rows:
    return "It has no fields."
  return "\n".join(["| field | default | what it is |", "|---|---|---|", *rows])


def _default(field: fields.Declaration, value: Any) -> str:
  if not field.presets:
    return f"`{value!r}`"
  if len({repr(preset) for preset in field.presets.values()}) == 1:
    return f"`{value!r}`"
  return ", ".join(f"`{value!r}` ({name})" for name, value in field.presets.items())


def escape(text: str) -> str:
  """Returns plain text as Markdown."""
  return re.sub(r"([\\*_\[\]<>|$`{}])", r"\\\1", text)


def entry(
  name: str,
  parts: Mapping[str, int],
  specs: Mapping[str, Any],
  cost: str,
  accuracy: str,
) -> str:
  """Returns one method's part of the catalogue.

  Args:
    name: of the method.
    parts: what it trains, from `trained`.
    specs: of the backbones, by their title.
    cost: of a train step, in forward passes of the plain backbone; "" if unknown.
    accuracy: measured, in %; "" if it was not.
  """
  method = METHODS[name]
  summary = (method.__doc__ or "").strip().splitlines()[0]
  listed = ", ".join(f"`{part}` {number:,}" for part, number in parts.items())
  runs = [title for title, spec in specs.items() if not support.refusal(name, {}, spec)]
  lines = [
    f"## {name}",
    "",
    escape(summary),
    "",
    f"$${EQUATIONS[name]}$$",
    "",
    f"- *Trains*, besides a linear head: {listed or 'nothing'}."
    f" In all {sum(parts.values()):,} on ViT-B/16.",
  ]
  if cost:
    lines.append(f"- *A train step* costs {cost} forward passes of the plain backbone.")
  if accuracy:
    lines.append(f"- *Measured*: {accuracy}% on the mean of five sets.")
  lines.append(f"- *Runs on* {', '.join(runs)}.")
  if papers := source(method):
    lines.append(f"- *Source*: {escape(papers)}")
  return "\n".join([*lines, "", field_table(method, specs["ViT"]), ""])


def catalogue() -> str:
  """Returns all of it as MyST: a table, and a section for each method.

  Raises:
    LookupError: a method without an equation.
  """
  costs = _column("boxed|forward, MFLOP per image", "train step / plain ViT forward")
  accuracies = _column("test accuracy, %|parameters", "mean")
  if missing := METHODS.keys() - EQUATIONS.keys():
    raise LookupError(
      f"{', '.join(sorted(missing))}: not among EQUATIONS of docs/catalogue.py."
    )
  specs = {
    title: create_backbone(variant, 224, {"head_classes": SOURCE_CLASSES}).spec
    for title, variant in support.ARCHITECTURES.items()
  }
  counts = {name: trained(name) for name in METHODS}
  lines = [
    "| method | parameters | step / forward | mean accuracy, % |",
    "|---|---|---|---|",
    *(
      f"| [{name}](#{name}) | {sum(counts[name].values()):,} "
      f"| {costs.get(name, '')} | {accuracies.get(name, '')} |"
      for name in METHODS
    ),
    "",
    *(
      entry(name, counts[name], specs, costs.get(name, ""), accuracies.get(name, ""))
      for name in METHODS
    ),
  ]
  return "\n".join(lines)


def _read(app: Any, docname: str, content: list[str]) -> None:
  del app, docname
  if MARK in content[0]:
    content[0] = content[0].replace(MARK, catalogue())


def setup(app: Any) -> dict[str, bool]:
  """Connects the extension."""
  app.connect("source-read", _read)
  return {"parallel_read_safe": True}


if __name__ == "__main__":
  print(catalogue())

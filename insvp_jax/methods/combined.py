"""Several methods at once, such as "vpt_deep+bias": the union of what they do."""

from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any

import flax.linen as nn

from insvp_jax.methods.base import Method
from insvp_jax.methods.hooks import Adaptation, CombinedHooks, Hooks, block_of


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
  """The methods of a combination by name, hidden from Flax, which renames tuples."""

  methods: Mapping[str, Method]

  def __iter__(self) -> Iterator[tuple[str, Method]]:
    """Yields (name, method), in their order."""
    return iter(self.methods.items())


class Combined(Method):
  """Applies methods side by side, each with its parameters under its own name.

  What a method changes, the next one finds changed: the order is that of the names.

  Attributes:
    parts: the methods.
  """

  parts: Parts = Parts({})

  def __post_init__(self) -> None:
    """Checks that no two methods claim one thing."""
    owners: dict[str, str] = {}
    for name, part in self.parts:
      for claim in sorted(part.claims()):
        if claim in owners:
          raise ValueError(
            f"the methods {owners[claim]!r} and {name!r} cannot be combined: both "
            f"have their own {claim.replace('_', ' ')}, of which there is one."
          )
        owners[claim] = name
    if framing := owners.get("input_size"):
      for name, part in self.parts:
        if name != framing and "prompt_image" in part.overridden_hooks():
          raise ValueError(
            f"the methods {framing!r} and {name!r} cannot be combined: the one takes "
            "images of a size of its own, the other changes those of the backbone's."
          )
    if "logits" in owners and "head" in owners:
      raise ValueError(
        f"the methods {owners['logits']!r} and {owners['head']!r} cannot be combined: "
        "the one trains no head, the other has one of its own."
      )
    super().__post_init__()

  def setup(self) -> None:
    """Binds the methods, each under its own name."""
    for name, part in self.parts:
      setattr(self, name, part.clone())

  def _bound(self) -> dict[str, Method]:
    return {name: getattr(self, name) for name, _ in self.parts}

  @nn.nowrap
  def hooks(self) -> Hooks:
    return CombinedHooks.of(tuple((name, part.hooks()) for name, part in self.parts))

  def prompt_image(self, images, *, route=None, train=False):
    for part in self._bound().values():
      images = part.prompt_image(images, train=train, **_routed(part, route))
    return images

  @nn.nowrap
  def routes(self) -> bool:
    return any(part.routes() for _, part in self.parts)

  def route(self, feature):
    # That there is but one is a claim.
    return next(p for p in self._bound().values() if p.routes()).route(feature)

  @nn.nowrap
  def spare_params(self, params):
    return sum(part.spare_params(params.get(name, {})) for name, part in self.parts)

  @nn.nowrap
  def input_size(self) -> int:
    sizes = [part.input_size() for _, part in self.parts]
    return next((s for s in sizes if s != self.spec.image_size), self.spec.image_size)

  @nn.nowrap
  def reads_source_head(self) -> bool:
    return any(part.reads_source_head() for _, part in self.parts)

  def adapt_logits(self, logits, *, train=False):
    for part in self._bound().values():
      logits = part.adapt_logits(logits, train=train)
    return logits

  @nn.nowrap
  def prompted_size(self) -> int:
    sizes = [part.prompted_size() for _, part in self.parts]
    return next((s for s in sizes if s != self.spec.image_size), self.spec.image_size)

  def adapt(self, images, prompted, *, embed=None, train=False) -> Adaptation:
    adapted = {
      name: part.adapt(images, prompted, embed=embed, train=train)
      for name, part in self._bound().items()
    }
    blocks = {name: a.blocks for name, a in adapted.items()}
    if any(isinstance(tree, list) for tree in blocks.values()):
      blocks = [
        {name: block_of(tree, i) for name, tree in blocks.items()}
        for i in range(self.spec.depth)
      ]
    prompts = [a.prompts for a in adapted.values() if a.prompts is not None]
    return Adaptation(
      blocks=blocks,
      shared={name: a.shared for name, a in adapted.items()},
      prompts=prompts[0] if prompts else None,
    )

  def adapt_feature(self, feature, images, *, train=False):
    for part in self._bound().values():
      feature = part.adapt_feature(feature, images, train=train)
    return feature

  @nn.nowrap
  def head(self, linear: nn.Module) -> nn.Module:
    for _, part in self.parts:
      linear = part.head(linear)
    return linear

  @nn.nowrap
  def extra_loss(self, params, reads, targets):
    total = 0.0
    for name, part in self.parts:
      own = [None if block is None else block.get(name) for block in reads]
      total += part.extra_loss(params.get(name, {}), own, targets)
    return total

  @nn.nowrap
  def prepares(self) -> bool:
    return any(part.prepares() for _, part in self.parts)

  @nn.nowrap
  def prepare(self, params, batches, apply):
    return self._with_own("prepare", params, batches, apply)

  @nn.nowrap
  def _with_own(self, function: str, params, batches, apply):
    """Returns the parameters after a function of each method.

    Each sees its own parameters as the method's; the whole model has those of all.
    """
    for name, part in self.parts:
      if function == "prepare" and not part.prepares():
        continue
      everyone = params.get("prompter", {})

      def whole(own, everyone=everyone, name=name):
        prompter = {**everyone, name: own.get("prompter", {})}
        return {**own, "prompter": {n: tree for n, tree in prompter.items() if tree}}

      def logits(own, images, whole=whole):
        return apply.logits(whole(own), images)

      def source_logits(own, images, whole=whole):
        return apply.source_logits(whole(own), images)

      own = {**params, "prompter": everyone.get(name, {})}
      own_apply = apply._replace(logits=logits, source_logits=source_logits)
      own = getattr(part, function)(own, batches, own_apply)
      params = whole(own)
    return params

  @nn.nowrap
  def refresh_every_epochs(self) -> int:
    return max((part.refresh_every_epochs() for _, part in self.parts), default=0)

  @nn.nowrap
  def refresh(self, params, batches, apply):
    return self._with_own("refresh", params, batches, apply)

  @nn.nowrap
  def adjust_updates(self, updates, *, params, grads, lr):
    for part_name, part in self.parts:
      inner, outer = "prompter/", f"prompter/{part_name}/"

      def own(flat: Mapping[str, Any], outer=outer, inner=inner) -> dict[str, Any]:
        return {
          name.replace(outer, inner, 1): leaf
          for name, leaf in flat.items()
          if name.startswith(outer) or not name.startswith(inner)
        }

      adjusted = part.adjust_updates(
        own(updates), params=own(params), grads=own(grads), lr=lr
      )
      updates = {
        **updates,
        **{name.replace(inner, outer, 1): leaf for name, leaf in adjusted.items()},
      }
    return updates

  @nn.nowrap
  def merge(self, params, sites):
    for name, part in self.parts:
      sites = part.merge(params.get(name, {}), sites)
    return sites

  @nn.nowrap
  def place_hparams(self, hparams: Mapping[str, Any]) -> dict[str, Any]:
    return {
      part: {n: v for n, v in hparams.items() if n in (*method.HPARAMS, *method.MASKS)}
      for part, method in self.parts
    }

  def prompts(self, images, *, route=None):
    prompts = {}
    for part in self._bound().values():
      prompts |= part.prompts(images, **_routed(part, route))
    return prompts

  @nn.nowrap
  def trainable_patterns(self) -> tuple[str, ...]:
    return self._patterns("trainable_patterns")

  @nn.nowrap
  def updated_patterns(self) -> tuple[str, ...]:
    return self._patterns("updated_patterns")

  @nn.nowrap
  def measures(self) -> tuple[str, ...]:
    return self._patterns("measures")

  @nn.nowrap
  def _patterns(self, kind: str) -> tuple[str, ...]:
    """Returns the patterns of all methods, with the method's name after "prompter/"."""
    patterns: dict[str, None] = {}
    for name, part in self.parts:
      for pattern in getattr(part, kind)():
        prefix, slash, rest = pattern.partition("/")
        if prefix == "prompter":
          pattern = f"{prefix}/{name}{slash}{rest}"
        patterns[pattern] = None
    return tuple(patterns)


def _routed(part: Method, route: Any) -> dict[str, Any]:
  """Returns the argument `route` of a method that has one."""
  return {"route": route} if part.routes() else {}

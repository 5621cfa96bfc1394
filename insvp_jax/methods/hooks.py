"""What a method does inside the backbone: static functions over arrays.

A method speaks to a backbone in two forms. Its Flax module makes the arrays of an
`Adaptation`, once per forward pass. Its `Hooks` are functions that the backbone calls
within its blocks, each with that block's slice of the arrays. So no backbone knows a
method and no method knows a backbone's code; and as arrays with a block axis are
ordinary inputs, `scan`, `remat`, mixed precision, sharding and a population of trials
work for every method.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import flax
import jax
from jaxtyping import Array

# The operations that `Hooks.after` may follow, in the order of a forward pass.
OPERATIONS = (
  *("embedding", "norm1", "query", "key", "value", "out"),
  *("norm2", "fc1", "fc2", "encoder_norm"),
)
# The branches of a block that `Hooks.branch` may change before they join the stream.
BRANCHES = ("attn", "mlp")
# The functions of `Hooks` that a backbone calls without a name of an operation.
FUNCTIONS = ("enter", "qkv", "leave", "pool")
# What a method may ask of a backbone besides functions in its blocks: that prompts join
# its tokens, that it takes images of another size than its own, and that it has
# LayerNorms.
PROMPTS, PROMPTED_SIZE, LAYER_NORMS = "prompts", "prompted_size", "layer_norms"
# All that a backbone can offer.
SITES = frozenset(
  (*OPERATIONS, *BRANCHES, *FUNCTIONS, PROMPTS, PROMPTED_SIZE, LAYER_NORMS)
)


class HookArrays(NamedTuple):
  """What a hook computes with.

  Attributes:
    block: the block's slice of `Adaptation.blocks`; None outside of blocks.
    shared: `Adaptation.shared`.
  """

  block: Any = None
  shared: Any = None


NO_ARRAYS = HookArrays()


@dataclasses.dataclass(frozen=True)
class Hooks:
  """The identity at every site. A method overrides what it changes.

  Tokens x [b, m, d] start with the prefix (class token) and the patches, row by row;
  prompts whose outputs are read follow. Where only some outputs are read afterwards, as
  in the last block, `branch` and `leave` see those tokens alone. What a hook returns is
  cast to the type of what it replaces.

  Attributes:
    at: the operations and branches that `after` and `branch` are called for.
    makes_prompts: `enter` makes every block's prompts: those of the block before are
      not read.
    reads_prompts: `leave` reads what a block made of its prompts.
    pools_prompts: `pool` reads what the last block made of its prompts.
  """

  at: tuple[str, ...] = ()
  makes_prompts: bool = False
  reads_prompts: bool = False
  pools_prompts: bool = False

  def enter(
    self, p: HookArrays, x: Array, prompts: Array | None
  ) -> tuple[Array, Array | None]:
    """Returns (tokens, prompts) as the block shall get them.

    Args:
      p: the arrays.
      x: prefix and patch tokens [b, n, d].
      prompts: [b or 1, p, d], or None.
    """
    del p
    return x, prompts

  def after(self, p: HookArrays, name: str, x: Array, y: Array) -> Array:
    """Returns what stands for y, the output of the operation `name` on x.

    The flat projections "query", "key" and "value" are [b, m, d], before heads; "out"
    is after them. "fc1" comes before the activation. "embedding" is of patches, before
    their positions, and x are the images. Prompts that are keys and values only pass
    "norm1", "key" and "value", in calls of their own.
    """
    del p, name, x
    return y

  def qkv(
    self, p: HookArrays, q: Array, k: Array, v: Array
  ) -> tuple[Array, Array, Array]:
    """Returns queries, keys and values, [b, m, heads, d / heads].

    Keys and values include those of prompts.
    """
    del p
    return q, k, v

  def branch(
    self, p: HookArrays, name: str, stream: Array, normed: Array, out: Array
  ) -> Array:
    """Returns what joins the stream in place of a branch's output.

    Args:
      p: the arrays.
      name: "attn" or "mlp".
      stream: the tokens [b, m, d] that it joins.
      normed: what the branch computed on: the stream after the norm.
      out: what the branch gave.
    """
    del p, name, stream, normed
    return out

  def leave(
    self,
    p: HookArrays,
    x: Array,
    prompts: Array | None,
    before: tuple[Array, Array | None],
  ) -> tuple[Array, Array | None, Any]:
    """Returns (tokens, prompts, what `Method.extra_loss` reads of this block or None).

    Args:
      p: the arrays.
      x: the block's output.
      prompts: the prompts' outputs where they are read, else the prompts as they were.
      before: (x, prompts) as `enter` returned them.
    """
    del p, before
    return x, prompts, None

  def pool(
    self,
    p: HookArrays,
    norm: Callable[[Array], Array],
    tokens: Array,
    prompts: Array | None,
  ) -> Array:
    """Returns the feature [b, d], in place of the backbone's own pooling.

    Args:
      p: the arrays; `p.block` is None.
      norm: the backbone's last norm.
      tokens: prefix and patch tokens of the last block, before that norm.
      prompts: the last block's outputs of the prompts if `pools_prompts`.
    """
    raise NotImplementedError

  def overrides(self, name: str) -> bool:
    """Returns whether a function is not the identity."""
    return getattr(type(self), name) is not getattr(Hooks, name)

  def sites(self) -> frozenset[str]:
    """Returns the sites that a backbone must have for these hooks."""
    return frozenset((*self.at, *filter(self.overrides, FUNCTIONS)))


@flax.struct.dataclass
class BlockPrompts:
  """Prompt tokens for l of the blocks.

  Block `first` + i takes `tokens[i]` in place of the prompt outputs of the block before
  it. The blocks after these carry the prompts along, or have none. So l = 1 is
  VPT-Shallow and l = depth is VPT-Deep.

  Attributes:
    tokens: [l, b, p, d]; b is 1 where all instances share the prompts. For a backbone
      of several stages a tuple with such an array for each stage that has prompts, the
      first ones; d is the stage's width, and only the last of them may have fewer sets
      than the stage has blocks. The annotation is wide because JAX's transformations
      put other leaves here.
    first: the first block that has prompts.
    carry: whether the blocks after the l carry the prompts along.
  """

  tokens: Any
  first: int = flax.struct.field(pytree_node=False, default=0)
  carry: bool = flax.struct.field(pytree_node=False, default=True)


@flax.struct.dataclass
class Adaptation:
  """The arrays of one forward pass, and the functions that take them.

  Attributes:
    blocks: a tree whose leaves have the blocks as first axis: block i gets slice i. Or
      a list with a tree for each block, where blocks differ; None for none.
    shared: a tree that every block gets whole, as do the embedding and the last norm.
    prompts: tokens that join the sequence, or None.
    hooks: the functions.
  """

  blocks: Any = None
  shared: Any = None
  prompts: BlockPrompts | None = None
  hooks: Hooks = flax.struct.field(pytree_node=False, default=Hooks())


# A backbone as it is.
UNCHANGED = Adaptation()


def block_of(blocks: Any, i: int) -> Any:
  """Returns block i's part of `Adaptation.blocks`."""
  if isinstance(blocks, list):
    return blocks[i]
  return jax.tree.map(lambda leaf: leaf[i], blocks)


@dataclasses.dataclass(frozen=True)
class CombinedHooks(Hooks):
  """The hooks of several methods, one after the other.

  The arrays are dicts with a method's name as key. At most one of them pools.

  Attributes:
    parts: (name, hooks) of each method.
  """

  parts: tuple[tuple[str, Hooks], ...] = ()

  @classmethod
  def of(cls, parts: tuple[tuple[str, Hooks], ...]) -> "CombinedHooks":
    """Returns the combination."""
    flags = ("makes_prompts", "reads_prompts", "pools_prompts")
    return cls(
      at=tuple(dict.fromkeys(name for _, hooks in parts for name in hooks.at)),
      parts=parts,
      **{flag: any(getattr(hooks, flag) for _, hooks in parts) for flag in flags},
    )

  def overrides(self, name: str) -> bool:
    return any(hooks.overrides(name) for _, hooks in self.parts)

  def _each(self, p: HookArrays, function: str):
    """Yields (name, hooks, arrays) of each method that changes a function."""

    def of(tree: Any, name: str) -> Any:
      return None if tree is None else tree[name]

    for name, hooks in self.parts:
      if hooks.overrides(function):
        yield name, hooks, HookArrays(of(p.block, name), of(p.shared, name))

  def enter(self, p, x, prompts):
    for _, hooks, arrays in self._each(p, "enter"):
      x, prompts = hooks.enter(arrays, x, prompts)
    return x, prompts

  def after(self, p, name, x, y):
    for _, hooks, arrays in self._each(p, "after"):
      if name in hooks.at:
        y = hooks.after(arrays, name, x, y)
    return y

  def qkv(self, p, q, k, v):
    for _, hooks, arrays in self._each(p, "qkv"):
      q, k, v = hooks.qkv(arrays, q, k, v)
    return q, k, v

  def branch(self, p, name, stream, normed, out):
    for _, hooks, arrays in self._each(p, "branch"):
      if name in hooks.at:
        out = hooks.branch(arrays, name, stream, normed, out)
    return out

  def leave(self, p, x, prompts, before):
    reads = {}
    for name, hooks, arrays in self._each(p, "leave"):
      x, prompts, read = hooks.leave(arrays, x, prompts, before)
      if read is not None:
        reads[name] = read
    return x, prompts, reads or None

  def pool(self, p, norm, tokens, prompts):
    for _, hooks, arrays in self._each(p, "pool"):
      return hooks.pool(arrays, norm, tokens, prompts)
    raise NotImplementedError

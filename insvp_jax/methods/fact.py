"""FacT: one low-rank factorisation of the updates of all weight matrices.

Source: Jie and Deng 2023, "FacT: Factor-Tuning for Lightweight Adaptation on Vision
Transformer", section 3.2; indices as in its code.

A block's weights are 4 + 2 c matrices [d, d]: query, key, value, out, and c each of the
MLP's layers, whose hidden width is c d (c = 4 in the paper). The update of each is
scale * u S v, u [d, r] and v [r, d] shared by all n = l (4 + 2 c). FacT-TT (tensor
train) has S [r, r] for each: 2 d r + n r^2 parameters. FacT-TK (Tucker) has
S_j = sum_k core[:, :, k] p[k, j], core [r, r, r], p [r, n]: 2 d r + n r + r^3.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import flax.linen as nn
import jax

from insvp_jax.methods import checks
from insvp_jax.methods.base import BackboneSpec, Method
from insvp_jax.methods.fields import field
from insvp_jax.methods.hooks import Adaptation, Hooks
from insvp_jax.methods.ops.dropout import block_keys, drop_tokens
from insvp_jax.methods.ops.initializers import torch_uniform
from insvp_jax.methods.ops.stacked import StackedDense

_ATTENTION = ("query", "key", "value", "out")
_SITES = (*_ATTENTION, "fc1", "fc2")


def _cut(x: Any, chunks: int) -> Any:
  """Returns [..., c k] as [..., c, k]."""
  return x.reshape(*x.shape[:-1], chunks, -1)


def _joined(x: Any) -> Any:
  """Returns [..., c, k] as [..., c k]; the inverse of `_cut`."""
  return x.reshape(*x.shape[:-2], -1)


@dataclasses.dataclass(frozen=True)
class FacTHooks(Hooks):
  """Adds the updates' outputs: a block has S of each site, [r, r], [r, cr], [cr, r].

  Attributes:
    chunks: matrices c of each of the MLP's layers.
  """

  chunks: int = 4

  def after(self, p, name, x, y):
    shared, key = p.shared, p.block["dropout_key"]
    if key is not None:
      key = jax.random.fold_in(key, self.at.index(name))
    if name == "fc2":
      hidden = _joined(_cut(x, self.chunks) @ shared["u"])
    else:
      hidden = x @ shared["u"]
    hidden = drop_tokens(key, shared["dropout"], hidden @ p.block[name])
    if name == "fc1":
      update = _joined(_cut(hidden, self.chunks) @ shared["v"])
    else:
      update = hidden @ shared["v"]
    return y + shared["scale"] * update


def _rank_field(default: int) -> Any:
  return field(default, "rank r of all updates", check=checks.below_width)


class _FacT(Method):
  """What both factorisations share; the updates start at zero and can be merged."""

  scale: float | int = field(
    1.0, "factor of the updates", check=checks.finite_number, hparam=True
  )
  dropout: float | int = field(
    0.1, "rate on the r hidden values", check=checks.rate, hparam=True
  )

  @classmethod
  def resolve(cls, spec: BackboneSpec, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields; see `Method.resolve`."""
    if spec.mlp_dim % spec.width:
      raise ValueError(
        f"mlp_dim is {spec.mlp_dim}, but FacT cuts the MLP's layers into matrices of "
        f"width x width: it needs a backbone whose mlp_dim is a multiple of its width, "
        f"{spec.width}."
      )
    return super().resolve(spec, values)

  @property
  def _chunks(self) -> int:
    """Matrices [d, d] in each of the MLP's layers."""
    return self.spec.mlp_dim // self.spec.width

  @nn.nowrap
  def hooks(self) -> Hooks:
    return FacTHooks(at=_SITES, chunks=self._chunks)

  def setup(self) -> None:
    """Creates u and v."""
    width, rank = self.spec.width, self.rank
    self.u = self.param("u", torch_uniform(width), (width, rank))
    self.v = self.param("v", nn.initializers.zeros, (rank, width))

  def adapt(self, images, prompted, *, embed=None, train=False) -> Adaptation:
    del images, prompted, embed
    rate = self.hparam("dropout")
    blocks = self._cores(self._factors())
    blocks["dropout_key"] = block_keys(self, self.spec.depth, rate, train)
    return Adaptation(
      blocks=blocks,
      shared={
        "u": self.u,
        "v": self.v,
        "scale": self.hparam("scale"),
        "dropout": rate,
      },
    )

  def _factors(self) -> Mapping[str, Any]:
    """Returns the parameters that S is made of, as they are named."""
    raise NotImplementedError

  @nn.nowrap
  def _cores(self, factors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns S of each site, with the blocks as first axis; for NumPy and JAX."""
    raise NotImplementedError

  @nn.nowrap
  def merge(self, params: Mapping[str, Any], sites):
    """Returns the operations with W + scale * u S v in place of W."""
    sites, cores = dict(sites), self._cores(params)
    u, v = params["u"], params["v"]
    for name in _SITES:
      core = cores[name]
      if name == "fc2":
        # Each chunk of inputs with its rows of S: [l, c, d, r] to [l, c d, r].
        core = u @ core.reshape(len(core), self._chunks, self.rank, self.rank)
        update = core.reshape(len(core), -1, self.rank) @ v
      elif name == "fc1":
        update = _joined(_cut(u @ core, self._chunks) @ v)
      else:
        update = u @ core @ v
      kernel = sites[name]["kernel"] + self.scale * update
      sites[name] = {**sites[name], "kernel": kernel}
    return sites


class FacTTT(_FacT):
  """Factors as a tensor train: a small matrix for each large one."""

  rank: int = _rank_field(16)

  def setup(self) -> None:
    """Creates u, v and the small matrices."""
    super().setup()
    rank, many = self.rank, self._chunks * self.rank
    shapes = {name: (rank, rank) for name in _ATTENTION}
    shapes |= {"fc1": (rank, many), "fc2": (many, rank)}
    for name, shape in shapes.items():
      init = torch_uniform(shape[0])
      setattr(self, name, StackedDense(self.spec.depth, shape, init, bias_init=None))

  def _factors(self) -> Mapping[str, Any]:
    return {name: getattr(self, name)() for name in _SITES}

  @nn.nowrap
  def _cores(self, factors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: factors[name]["kernel"] for name in _SITES}


class FacTTK(_FacT):
  """Factors as Tucker: one small tensor, and r numbers for each large matrix."""

  rank: int = _rank_field(16)

  def setup(self) -> None:
    """Creates u, v, the core and the numbers of each matrix."""
    super().setup()
    rank, xavier = self.rank, nn.initializers.xavier_uniform()
    self.core = self.param("core", xavier, (rank,) * 3)
    matrices = (len(_ATTENTION) + 2 * self._chunks) * self.spec.depth
    self.p = self.param("p", xavier, (rank, matrices))

  def _factors(self) -> Mapping[str, Any]:
    return {"core": self.core, "p": self.p}

  @nn.nowrap
  def _cores(self, factors: Mapping[str, Any]) -> dict[str, Any]:
    depth, rank, chunks = self.spec.depth, self.rank, self._chunks
    matrices = factors["core"] @ factors["p"]  # [r, r, l (4 + 2 c)]
    matrices = matrices.reshape(rank, rank, depth, -1).transpose(2, 3, 0, 1)
    cores = {name: matrices[:, i] for i, name in enumerate(_ATTENTION)}
    # Column m of the MLP's is column m div c of matrix m mod c, as in the code.
    fc1, fc2 = (
      layer.transpose(0, 2, 3, 1).reshape(depth, rank, chunks * rank)
      for layer in (matrices[:, len(_ATTENTION) : -chunks], matrices[:, -chunks:])
    )
    return cores | {"fc1": fc1, "fc2": fc2.transpose(0, 2, 1)}

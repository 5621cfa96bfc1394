"""Runs that differ only in numbers, trained as one: stacked states, vmapped steps.

The members share the frozen backbone. Each has its own trainable parameters, moments,
learning rate, weight decay and numbers of the method, and what follows from its seed:
initial values, order of the data, crops, mixing and dropout. Where all have one seed
they share the batches, too, and what is computed from these and frozen weights alone is
computed once.

No operation joins two members, so one that diverges leaves the others as they are.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from insvp_jax import trees
from insvp_jax.checkpoints import wide_head
from insvp_jax.data import ArraySplit, members, pipeline, preprocess, resident
from insvp_jax.data.splits import Split
from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.distributed import sharding as sharding_lib
from insvp_jax.train import calls, evaluate, parameters, steps
from insvp_jax.train import program as program_lib
from insvp_jax.train.program import Program
from insvp_jax.train.steps import TrainState


def can_train_together(seeds: Sequence[int], split: Split) -> bool:
  """Returns whether members of these seeds can train on this split as one.

  Of a stream that would be one reader per seed, each decoding the same images.
  """
  return len(set(seeds)) == 1 or isinstance(split, ArraySplit)


@dataclasses.dataclass(frozen=True)
class Population:
  """How some members share one state; compiled once for any number of chunks.

  A stacked state is a `TrainState` whose leaves have a leading axis m, members, but
  for those that the members share.

  Attributes:
    program: of each member.
    one_seed: whether all members have the same seed.
    one_backbone: whether frozen backbones are the same; random ones follow the seed.
    alone: whether there is one member; its step is then the plain one.
  """

  program: Program
  one_seed: bool
  one_backbone: bool
  alone: bool = False

  @classmethod
  def of(
    cls, configs: Sequence[ConfigDict], program: Program, weights: Mapping | None
  ) -> "Population":
    """Returns the population of some configurations.

    Args:
      configs: of the members; alike but for seed, lr, wd and the program's numbers.
      program: made for any of them.
      weights: the backbone's parameters; None for random ones.
    """
    one_seed = len({config.seed for config in configs}) == 1
    return cls(program, one_seed, one_seed or weights is not None, len(configs) == 1)

  @functools.cached_property
  def axes(self) -> TrainState:
    """A state with 0 for leaves that are stacked and None for shared ones."""

    def axis(name: str, trainable: bool) -> int | None:
      shared = self.one_backbone if name.startswith("backbone/") else self.one_seed
      return None if shared and not trainable else 0

    mask = trees.flatten(self.program.mask)
    return TrainState(
      step=None,
      params=trees.unflatten({n: axis(n, chosen) for n, chosen in mask.items()}),
      opt_state=0,
      rng=None if self.one_seed else 0,
      peak_lr=0,
      wd=0,
      numbers=0,
    )

  @functools.cached_property
  def state_sharding(self) -> TrainState:
    """Where a stacked state lies: a shared backbone as each run's would."""
    sharding = self.program.state_sharding
    whole = mesh_lib.replicated(self.program.mesh)
    axes = trees.flatten(self.axes.params)
    shared = trees.flatten(sharding.params)
    params = {n: shared[n] if axes[n] is None else whole for n in axes}
    return sharding.replace(params=trees.unflatten(params))

  def draw(
    self, configs: Sequence[ConfigDict], weights: Mapping | None
  ) -> dict[int, dict[str, Any]]:
    """Returns each seed's initial parameters, on the host."""
    init, seeds = configs[0].backbone.init, {config.seed for config in configs}
    return parameters.init_members(self.program.model, seeds, weights, init)

  def create(
    self, configs: Sequence[ConfigDict], drawn: Mapping[int, Mapping[str, Any]]
  ) -> TrainState:
    """Returns the stacked state before the first step, on every device.

    Args:
      configs: of the members.
      drawn: from `draw`.
    """
    width = self.program.trained.head.num_classes
    widened = {seed: wide_head.widen(params, width) for seed, params in drawn.items()}
    each = [trees.flatten(widened[config.seed]) for config in configs]
    frozen_dtype = jnp.dtype(configs[0].backbone.frozen_dtype)
    axes, params = trees.flatten(self.axes.params), {}
    for name, trainable in trees.flatten(self.program.mask).items():
      leaves = [params_of[name] for params_of in each]
      leaf = leaves[0] if axes[name] is None else np.stack(leaves)
      params[name] = leaf if trainable else np.asarray(leaf, frozen_dtype)
    params = sharding_lib.device_put(
      trees.unflatten(params), self.state_sharding.params
    )
    seeds = np.array([config.seed % 2**32 for config in configs], np.uint32)
    numbers = [program_lib.numbers_of(config, self.program) for config in configs]

    return self._create(
      params,
      seeds[0] if self.one_seed else seeds,
      np.array([program_lib.peak_lr(config) for config in configs], np.float32),
      np.array([config.optim.wd for config in configs], np.float32),
      {n: np.stack([x[n] for x in numbers]) for n in numbers[0]},
    )

  @functools.cached_property
  def _create(self) -> Callable:
    """Jitted; adds the optimizer's state, which the parameters alone decide."""

    def create(params, seed, peak_lr, wd, numbers):
      rng = jax.random.key(seed)
      step, opt_state = jnp.zeros((), jnp.int32), self.program.optimizer.init(params)
      return TrainState(step, params, opt_state, rng, peak_lr, wd, numbers)

    axes = self.axes
    return jax.jit(
      jax.vmap(create, (axes.params, axes.rng, 0, 0, 0), axes),
      out_shardings=self.state_sharding,
      donate_argnums=0,
    )

  def member(self, state: TrainState, index: int) -> TrainState:
    """Returns one member's state, as a run of its own would have it."""
    return _map(lambda leaf: leaf[index], self.axes, state)

  def stack(self, states: Sequence[TrainState]) -> TrainState:
    """Returns the stacked state of members at the same step."""
    return _map(lambda *leaves: jnp.stack(leaves), self.axes, *states)

  @functools.cached_property
  def train_step(self) -> Callable:
    """Jitted `(stacked state, batch) -> (stacked state, metrics [m])`; donates."""
    whole = mesh_lib.replicated(self.program.mesh)
    return jax.jit(
      self._train_function,
      donate_argnums=0,
      in_shardings=(self.state_sharding, self._batch_sharding),
      out_shardings=(self.state_sharding, whole),
    )

  @functools.cached_property
  def train_call(self) -> Callable:
    """Jitted `(stacked state, arrays, seeds, count) -> (stacked state, ...)`."""
    program, state = self.program, self.state_sharding
    whole = mesh_lib.replicated(program.mesh)
    order, gather = resident.epoch_order, program.gather
    if not self.one_seed:
      order = _orders
      gather = jax.vmap(gather, (None, 0, 0, None))
    function = calls.create_train_call(
      self._train_function,
      program.mask,
      order=order,
      gather=gather,
      batch_size=program.batch_size,
      sharding=self._batch_sharding,
    )
    return jax.jit(
      function,
      donate_argnums=0,
      in_shardings=(state, whole, whole, whole),
      out_shardings=(state, whole, whole),
    )

  @functools.cached_property
  def eval_step(self) -> Callable:
    """Jitted `(stacked params, batch, stacked numbers) -> sums [m]`."""
    mesh, function = self.program.mesh, self.program.eval_function
    whole, rows = mesh_lib.replicated(mesh), mesh_lib.batch_sharding(mesh)
    return jax.jit(
      jax.vmap(function, (self.axes.params, None, 0)),
      in_shardings=(self.state_sharding.params, rows, whole),
      out_shardings=whole,
    )

  @functools.cached_property
  def _train_function(self) -> Callable:
    if self.alone:
      return self._train_alone
    batch = None if self.one_seed else 0
    axes = self.axes
    return jax.vmap(self.program.train_function, (axes, batch), (axes, 0))

  def _train_alone(self, state, batch):
    state, metrics = self.program.train_function(self.member(state, 0), batch)
    return self.stack([state]), jax.tree.map(lambda value: value[None], metrics)

  @property
  def _batch_sharding(self) -> jax.sharding.NamedSharding:
    mesh = self.program.mesh
    rows = mesh_lib.batch_sharding(mesh)
    if self.one_seed:
      return rows
    return jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(None, *rows.spec)
    )

  def batches(
    self,
    configs: Sequence[ConfigDict],
    split: Split,
    start_step: int,
    arrays: Mapping[str, Any] | None = None,
  ) -> Iterator[steps.Batch]:
    """Yields the members' batches, of one seed [b, ...], else [m, b, ...].

    Args:
      configs: of the members.
      split: that they train on.
      start_step: number of batches before the first one.
      arrays: images or features of the split and labels, if on the devices.
    """
    config, sharding = configs[0], self._batch_sharding
    options = {
      "batch_size": config.batch_size,
      "preset": preprocess.get_preset(config.data.preset),
      "image_size": self.program.model.backbone.image_size,
      "start_step": start_step,
      "sharding": sharding,
    }
    if not self.one_seed:
      seeds = [each.seed for each in configs]
      arrays = arrays or resident.put_split(split, sharding)
      return members.member_batches(arrays, seeds=seeds, **options)
    return pipeline.train_batches(arrays or split, seed=config.seed, **options)

  def evaluate(
    self, state: TrainState, batches: Iterable[steps.Batch]
  ) -> dict[str, np.ndarray]:
    """Returns accuracy in [0, 1] and loss in nats of each member, both [m].

    Args:
      state: the stacked state.
      batches: from `features.eval_batches`.
    """
    sums = evaluate.sums(
      lambda params, batch: self.eval_step(params, batch, state.numbers),
      state.params,
      batches,
    )
    return {
      "accuracy": sums["correct"] / sums["count"],
      "loss": sums["loss"] / sums["count"],
    }


def _orders(seeds, epoch, number: int):
  """Returns the orders [m, n] of an epoch of each seed."""
  return jax.vmap(lambda seed: resident.epoch_order(seed, epoch, number))(seeds)


def _map(function: Callable, axes: Any, *states: Any) -> Any:
  """Maps the stacked leaves; of the shared ones the first state's stay."""

  def each(axis, *parts):
    return parts[0] if axis is None else jax.tree.map(function, *parts)

  return jax.tree.map(each, axes, *states, is_leaf=lambda axis: axis is None)

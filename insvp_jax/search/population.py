"""Trials of a search that train as one: a batched step under the trainer's loop.

Trials differ only in numbers that are data: learning rate, weight decay, hparams of the
method. They have one seed, so they see the same batches and start from the same
parameters; the frozen backbone is there once, and what is computed from it and the
batch alone is computed once.

`stack_program` maps a program's steps over m trials. The state of m trials is a
`TrainState` whose trainable parameters, optimizer state and numbers have a leading axis
m; the step, the random key and frozen parameters have none. No operation joins two
trials, so one that diverges leaves the others as they are.

A GPU or TPU computes all trials at once: one that a trial does not fill takes little
longer for several. A CPU is filled by one, and the activations of several do not fit
its caches: there the trials take turns within each step (`takes_turns`). They gain all
the same, because a call gets fresh memory for its activations, which the operating
system has to clear first: all trials of a call use the same. docs/measured.md has the
numbers.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from insvp_jax import trees
from insvp_jax.data.splits import Split
from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.models import quantized
from insvp_jax.train import losses, optim
from insvp_jax.train.program import Program, create_state
from insvp_jax.train.state import TrainState, cast_frozen, hparams_of

# Of the device's memory: the rest is for what the compiler needs besides.
_MEMORY_SHARE = 0.7
# Without a limit that the device knows.
_MAX_MEMBERS = 64
# Of trials that take turns: what more of them gain is less than what is lost when they
# are interrupted, since trials under way start again.
_MAX_TURNS = 4


def stack_program(program: Program, *, in_turn: bool = False) -> Program:
  """Returns the program whose steps train and evaluate any number of trials.

  Args:
    program: of one trial.
    in_turn: whether the trials are computed one after the other within a step, not all
      at once; see `takes_turns`. The results are the same up to rounding.
  """
  if in_turn:
    train, evaluate = _in_turn(program)
  else:
    axes, one = _axes(program), program.functions
    train = jax.vmap(one.train, (axes, None), (axes, 0))
    evaluate = jax.vmap(one.evaluate, (axes.params, None, 0))
  functions = dataclasses.replace(program.functions, train=train, evaluate=evaluate)
  # Shardings stay: what is stacked is whole on every device, with or without axis m.
  return dataclasses.replace(program, functions=functions)


def stack_state(
  configs: Sequence[ConfigDict], program: Program, params: Mapping[str, Any]
) -> TrainState:
  """Returns the state of several trials before the first step.

  Args:
    configs: of the trials; alike but for lr, wd and the program's hparams.
    program: of one trial, or stacked.
    params: that all start from; see `state.init_params`.
  """
  state = create_state(configs[0], program, params)
  changing, frozen = trees.split(state.params, program.carried)
  replicated = program.state_sharding.step
  # Frozen parameters stay where they are.
  changing, opt_state = _repeat((changing, state.opt_state), len(configs), replicated)
  hparams = [hparams_of(config, program.hparams) for config in configs]
  peak_lr = [optim.peak_lr(config.optim, config.batch_size) for config in configs]
  numbers = {
    "peak_lr": np.array(peak_lr, np.float32),
    "wd": np.array([config.optim.wd for config in configs], np.float32),
    "hparams": {name: np.stack([h[name] for h in hparams]) for name in program.hparams},
  }
  return state.replace(
    params=trees.merge(changing, frozen),
    opt_state=opt_state,
    **jax.device_put(numbers, replicated),
  )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _repeat(tree: Any, num_members: int, sharding: jax.sharding.Sharding) -> Any:
  """Returns the arrays with a leading axis m, m times the same."""
  stacked = jax.tree.map(lambda x: jnp.stack([x] * num_members), tree)
  return jax.lax.with_sharding_constraint(stacked, sharding)


def _axes(program: Program) -> TrainState:
  """Returns the axis of each part of a state that counts trials, or None."""
  is_carried = trees.flatten(program.carried)
  return TrainState(
    step=None,
    params=trees.unflatten({n: 0 if c else None for n, c in is_carried.items()}),
    opt_state=0,
    rng=None,
    peak_lr=0,
    wd=0,
    hparams=0,
  )


def _in_turn(program: Program) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """Returns (train, evaluate) as with `jax.vmap`, in a loop over the trials."""
  one, carried = program.functions, program.carried

  def train(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Any]:
    # Only what differs goes through the loop: frozen weights are there once.
    changing, frozen = trees.split(state.params, carried)

    def member(values):
      changing, others = values
      weights, changing = quantized.hold(frozen, changing)
      params = trees.merge(changing, weights)
      new, metrics = one.train(state.replace(params=params, **others), batch)
      changing, _ = trees.split(new.params, carried)
      return (changing, new.opt_state, new.step), metrics

    names = ("opt_state", "peak_lr", "wd", "hparams")
    others = {name: getattr(state, name) for name in names}
    (changing, opt_state, steps), metrics = jax.lax.map(member, (changing, others))
    params = trees.merge(changing, frozen)
    return state.replace(step=steps[0], params=params, opt_state=opt_state), metrics

  def evaluate(
    params: Mapping[str, Any], batch: Mapping[str, Any], hparams: Any = None
  ) -> Any:
    changing, frozen = trees.split(params, carried)

    def member(values):
      changing, hparams = values
      weights, changing = quantized.hold(frozen, changing)
      return one.evaluate(trees.merge(changing, weights), batch, hparams)

    return jax.lax.map(member, (changing, hparams))

  return train, evaluate


def takes_turns(program: Program) -> bool:
  """Returns whether trials that train together are computed one after the other.

  On CPUs, unless nothing but the head trains: then what is computed once for all of
  them is nearly all of the work.

  Args:
    program: of one trial.
  """
  on_cpu = mesh_lib.platform(program.mesh) == "cpu"
  return on_cpu and not _trains_head_alone(program)


def _trains_head_alone(program: Program) -> bool:
  trainable, _ = trees.split(program.mask, program.mask)
  return all(name.startswith("head/") for name in trainable)


def population_size(
  configs: Sequence[ConfigDict], program: Program, split: Split
) -> int:
  """Returns how many of the trials shall train at once.

  `config.tune.population`, or with 0 (automatic) as many as the device's memory holds.
  Of a CPU's trials, which take turns, that is a few, or 1 where the trials are most of
  what the memory holds, since each has its own copy of all that trains.

  Args:
    configs: of all trials.
    program: of one trial.
    split: that they train on.
  """
  asked, num_trials = configs[0].tune.population, len(configs)
  if not program.objective.ONE_FEATURE:
    # Its evaluation is that of one model.
    return 1
  if asked:
    return min(asked, num_trials)
  stats = jax.local_devices()[0].memory_stats()
  if stats and "bytes_limit" in stats:
    shared, each = member_bytes(configs[0], program)
    shared += split.stored_size**2 * 3 * len(split)
    free = _MEMORY_SHARE * stats["bytes_limit"] - shared
    return max(1, min(num_trials, int(free // each)))
  if _trains_head_alone(program):
    return min(num_trials, _MAX_MEMBERS)
  trainable, frozen = trees.split(program.shapes, program.mask)
  is_small = _MAX_TURNS * trees.count(trainable) <= trees.count(frozen)
  return min(num_trials, _MAX_TURNS) if is_small else 1


def balanced_size(num_trials: int, limit: int) -> int:
  """Returns the size of the fewest populations that hold a number of trials.

  All but the last are full, and the last lacks as little as possible.
  """
  num_populations = -(-num_trials // limit)
  return -(-num_trials // num_populations)


def member_bytes(config: ConfigDict, program: Program) -> tuple[int, int]:
  """Returns the bytes on a device (that the trials share, of each trial).

  An estimate by abstract evaluation, which allocates nothing: parameters, gradients,
  moments, and what the forward pass keeps for the backward pass.
  """
  stored = cast_frozen(program.shapes, program.mask, config)
  frozen = _nbytes(trees.split(stored, program.mask)[1])
  of_one, of_two = (_population_bytes(config, program, m) for m in (1, 2))
  each = of_two - of_one
  return frozen + max(of_one - each, 0), max(each, 1)


def _population_bytes(config: ConfigDict, program: Program, num_members: int) -> int:
  """Returns the bytes that m trials need besides frozen parameters."""
  model, size = program.model, program.model.input_size
  stored = cast_frozen(program.shapes, program.mask, config)
  trainable, frozen = trees.split(stored, program.mask)
  batch_size = min(config.microbatch_size or config.batch_size, config.batch_size)
  images = jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.float32)
  stacked = {
    name: jax.ShapeDtypeStruct((num_members, *leaf.shape), leaf.dtype)
    for name, leaf in trainable.items()
  }

  def loss(trainable, frozen, images):
    variables = {"params": trees.merge(trainable, frozen)}
    rngs = {"dropout": jax.random.key(0)}
    logits = model.apply(variables, images, train=True, rngs=rngs)
    targets = jnp.zeros((batch_size, model.head.num_classes)).at[:, 0].set(1.0)
    return jnp.mean(losses.cross_entropy(logits, targets))

  def backward(trainable, frozen, images):
    def population_loss(trainable):
      return jax.vmap(loss, (0, None, None))(trainable, frozen, images)

    # The backward pass as a function: what it holds is what the forward pass keeps.
    return jax.vjp(population_loss, trainable)[1]

  kept = jax.eval_shape(backward, stacked, frozen, images)
  moments = jax.eval_shape(program.optimizer.init, program.shapes)
  # Parameters, gradients and updates.
  of_trainable = 3 * _nbytes(stacked) + num_members * _nbytes(moments)
  activations = (_nbytes(kept) + 2 * _nbytes(images)) / program.mesh.size
  return int(of_trainable + activations)


def _nbytes(tree: Any) -> int:
  return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

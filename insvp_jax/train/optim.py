"""Learning rate schedules and the optimizer of the trainable parameters.

Both read the `optim` section of the config. The learning rate of a train step is
`schedule(step) * peak_lr`: the schedule's factor, which peaks at 1, times the one
number that a search varies. It is applied in `steps.update_params`, so the optimizer
itself knows no learning rate.

A *train step* consumes one batch, an *update* changes the parameters. They differ only
when `accumulate_steps` > 1; then all steps of an update have the same learning rate.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax

from insvp_jax import trees

Config = ConfigDict | Mapping[str, Any]
Schedule = Callable[[Any], Any]


def peak_lr(optim: Config, batch_size: int) -> float:
  """Returns the lr at the schedule's peak.

  Args:
    optim: the config section. `lr_scale_by_batch` > 0 multiplies lr by
      (images per update) / lr_scale_by_batch.
    batch_size: images per train step, over all devices.

  Raises:
    ValueError: float32 does not hold it.
  """
  if optim["lr_scale_by_batch"] <= 0:
    return float(optim["lr"])
  images_per_update = batch_size * optim["accumulate_steps"]
  lr = float(optim["lr"]) * (images_per_update / optim["lr_scale_by_batch"])
  if lr > 3.4e38:
    raise ValueError(
      f"optim.lr is {optim['lr']:g}, which optim.lr_scale_by_batch="
      f"{optim['lr_scale_by_batch']} makes {lr:g}; lower it."
    )
  return lr


def create_schedule(
  optim: Config, *, total_steps: int, steps_per_epoch: int
) -> Schedule:
  """Returns the factor of the peak lr, in [0, 1], as a function of the train step.

  The schedules, with W warm-up updates out of T:
    constant: 1.
    cosine: half a cosine from 1 (at W) to end_lr_factor (at T).
    cosine_epochwise: the factor changes only between epochs. Epoch e of a warm-up
      of W epochs has e / W, so that the first epoch trains with lr 0, as VPT does.
    polynomial: (1 - t) ** power from 1 (at W) to end_lr_factor (at T), for t from 0 to
      1; power is 0.9, or config.optim.power.
    multistep: 1, a tenth after half of the updates behind W, a hundredth after 72%.
  In the warm-up of all but cosine_epochwise, update i (from 0) has (i + 1) / W: 1 / W
  at first, 1 at updates W - 1 and W. Train step s (from 0) belongs to update
  s // accumulate_steps.

  Args:
    optim: the config section.
    total_steps: train steps of the whole run.
    steps_per_epoch: train steps of one epoch.

  Raises:
    ValueError: an unknown schedule, a value out of range, or a warm-up that does
      not end before the run does.

  Source: cosine_epochwise is the schedule of VPT (Jia et al., ECCV 2022), the linear
    start at lr / W that of InsVP (Liu et al., ACM MM 2024), multistep that of ILM-VP
    (Chen et al., CVPR 2023) and AutoVP (Tsao et al., ICLR 2024), polynomial that of
    DeepLab (Chen et al., TPAMI 2018) and SETR (Zheng et al., CVPR 2021).
  """
  check_optim(optim)
  create = trees.lookup(SCHEDULES, optim["schedule"], "schedule")
  for name, value in (
    ("total_steps", total_steps),
    ("steps_per_epoch", steps_per_epoch),
  ):
    if value < 1:
      raise ValueError(f"{name} is {value}; it must be at least 1.")
  accumulate_steps = optim["accumulate_steps"]
  if total_steps < accumulate_steps:
    raise ValueError(
      f"optim.accumulate_steps is {accumulate_steps}, but the run has only "
      f"{total_steps} steps: no update would happen. Lower it or train longer."
    )
  by_update = create(optim, total_steps, steps_per_epoch)

  def schedule(step):
    return by_update(step // accumulate_steps)

  return schedule


def create_optimizer(
  optim: Config,
  params: Mapping[str, Any],
  mask: Mapping[str, Any],
) -> optax.GradientTransformationExtraArgs:
  """Returns the optimizer over the full tree of parameters, for a lr of 1.

  Trainable leaves: clip by their global norm, then AdamW (decoupled decay) or SGD
  (decay added to the gradient, before the momentum), with the mean of
  `accumulate_steps` gradients. Frozen leaves: updates are zero, and neither moments
  nor accumulated gradients exist for them.

  Args:
    optim: the config section. `no_decay` holds regular expressions over the
      '/'-names of parameters without weight decay; () decays all that train.
    params: the full tree, arrays or `jax.ShapeDtypeStruct`.
    mask: bools in the structure of `params`; True is trainable.

  Returns:
    The optimizer, whose updates are to be multiplied by the learning rate. Its
    `update(..., wd=x)` decays by x, which may be data, in place of the config
    section's constant.

  Raises:
    ValueError: an unknown optimizer, a value out of range, a `no_decay` pattern
      that matches no parameter at all, a mask that does not fit the parameters or
      selects none, or a trainable leaf that is not float32.
  """
  check_optim(optim)
  create = trees.lookup(OPTIMIZERS, optim["name"], "optimizer")
  _check_trainable(params, mask)
  no_decay = trees.mask(params, tuple(optim["no_decay"]))
  decay = jax.tree.map(lambda excluded: not excluded, no_decay)
  links = [create(optim, decay)]
  if optim["grad_clip_norm"] > 0:
    # Inside the partition: before it, the norm would run over frozen leaves too.
    links.insert(0, optax.clip_by_global_norm(optim["grad_clip_norm"]))
  trainable = optax.chain(*links)
  if optim["accumulate_steps"] > 1:
    steps = optax.MultiSteps(trainable, optim["accumulate_steps"])
    # Its own `gradient_transformation` would not pass `wd` on.
    trainable = optax.GradientTransformationExtraArgs(steps.init, steps.update)
  # Not optax.masked: that lets the raw gradients of frozen leaves through.
  return optax.partition(
    {"trainable": trainable, "frozen": optax.set_to_zero()},
    jax.tree.map(lambda chosen: "trainable" if chosen else "frozen", dict(mask)),
  )


def check_optim(optim: Config) -> None:
  """Checks names and ranges of the config section.

  Raises:
    ValueError: names the field, its value and what is allowed.
  """
  trees.lookup(OPTIMIZERS, optim["name"], "optimizer")
  trees.lookup(SCHEDULES, optim["schedule"], "schedule")
  for field, (is_valid, allowed) in _RANGES.items():
    value = optim[field]
    if not is_valid(value):
      raise ValueError(f"optim.{field} is {value!r}; it must be {allowed}.")
  if optim["warmup_epochs"] > 0 and optim["warmup_steps"] > 0:
    raise ValueError(
      f"both optim.warmup_epochs ({optim['warmup_epochs']}) and optim.warmup_steps "
      f"({optim['warmup_steps']}) are set; set one of them to 0."
    )
  if optim["name"] == "sgd" and optim["nesterov"] and optim["momentum"] == 0:
    raise ValueError("optim.nesterov needs optim.momentum > 0, which is 0.")


_NOT_NEGATIVE = (lambda value: 0 <= value < float("inf"), "a number >= 0")
# As float32, in which the optimizer computes: 1 - 1e-9 is 1 there.
_BELOW_ONE = (lambda value: 0 <= value < 1 and np.float32(value) < 1, "in [0, 1)")
_RANGES = {
  "lr": _NOT_NEGATIVE,
  "head_lr": _NOT_NEGATIVE,
  "wd": _NOT_NEGATIVE,
  "b1": _BELOW_ONE,
  "b2": _BELOW_ONE,
  "eps": (lambda value: 1e-37 < value < float("inf"), "a number > 0 in float32"),
  "momentum": _BELOW_ONE,
  "warmup_epochs": _NOT_NEGATIVE,
  "warmup_steps": _NOT_NEGATIVE,
  "end_lr_factor": (lambda value: 0 <= value <= 1, "in [0, 1]"),
  "power": (lambda value: 0 < value < float("inf"), "a number > 0"),
  "grad_clip_norm": (_NOT_NEGATIVE[0], "a number >= 0 (0 is off)"),
  "accumulate_steps": (
    lambda value: value >= 1 and value == int(value),
    "a whole number >= 1",
  ),
  "lr_scale_by_batch": (_NOT_NEGATIVE[0], "a number >= 0 (0 is off)"),
}


def _stepwise(decay: Callable[[Config, int], Schedule]):
  """Returns the factory of a schedule with a linear warm-up and then `decay`.

  Args:
    decay: of the config section and the number of updates that it takes.
  """

  def create(optim: Config, total_steps: int, steps_per_epoch: int) -> Schedule:
    total = total_steps // optim["accumulate_steps"]
    steps = optim["warmup_steps"] or optim["warmup_epochs"] * steps_per_epoch
    warmup = round(steps / optim["accumulate_steps"])
    _check_warmup(optim, warmup, total, "updates")
    after = decay(optim, total - warmup)
    if not warmup:
      return after
    # (count + 1) / W: the first update must not be lost to lr 0.
    before = optax.linear_schedule(1.0 / warmup, 1.0, warmup - 1)
    return optax.join_schedules([before, after], [warmup])

  return create


def _constant(optim: Config, num_updates: int) -> Schedule:
  del optim, num_updates
  return optax.constant_schedule(1.0)


def _cosine(optim: Config, num_updates: int) -> Schedule:
  return optax.cosine_decay_schedule(1.0, num_updates, float(optim["end_lr_factor"]))


def _polynomial(optim: Config, num_updates: int) -> Schedule:
  end, power = float(optim["end_lr_factor"]), float(optim["power"])
  return optax.polynomial_schedule(1.0, end, power, num_updates)


def _multistep(optim: Config, num_updates: int) -> Schedule:
  del optim
  # In whole numbers: 72% of 200 epochs is the start of one.
  boundaries = {-(-num_updates * percent // 100): 0.1 for percent in (50, 72)}
  return optax.piecewise_constant_schedule(1.0, boundaries)


def _create_cosine_epochwise(
  optim: Config, total_steps: int, steps_per_epoch: int
) -> Schedule:
  warmup = int(optim["warmup_epochs"])
  if optim["warmup_steps"] > 0 or warmup != optim["warmup_epochs"]:
    raise ValueError(
      "the schedule 'cosine_epochwise' changes between epochs only, so its warm-up "
      "must be whole epochs: set optim.warmup_steps to 0 and optim.warmup_epochs to "
      f"a whole number; got {optim['warmup_steps']} and {optim['warmup_epochs']}."
    )
  total = total_steps / steps_per_epoch
  _check_warmup(optim, warmup, total, "epochs")
  by_epoch = optax.cosine_decay_schedule(
    1.0, total - warmup, alpha=float(optim["end_lr_factor"])
  )
  if warmup:
    by_epoch = optax.join_schedules(
      [optax.linear_schedule(0.0, 1.0, warmup), by_epoch], [warmup]
    )
  return lambda update: by_epoch(update * optim["accumulate_steps"] // steps_per_epoch)


def _check_warmup(optim: Config, warmup: int, total: float | int, unit: str) -> None:
  if warmup > 0 and warmup >= total:
    raise ValueError(
      f"the warm-up takes {warmup} of the run's {total:g} {unit} "
      f"(optim.warmup_epochs={optim['warmup_epochs']}, "
      f"optim.warmup_steps={optim['warmup_steps']}); it must end before the run does. "
      "Shorten it or train longer."
    )


def _create_adamw(optim: Config, decay_mask: Any):
  # optax.adamw with lr 1, and with a decay that may be data.
  return optax.chain(
    optax.scale_by_adam(
      b1=optim["b1"], b2=optim["b2"], eps=optim["eps"], mu_dtype=jnp.float32
    ),
    _decay_weights(optim["wd"], decay_mask),
    optax.scale_by_learning_rate(1.0),
  )


def _create_sgd(optim: Config, decay_mask: Any):
  sgd = optax.sgd(
    1.0,
    momentum=optim["momentum"] or None,
    nesterov=optim["nesterov"],
    accumulator_dtype=jnp.float32,
  )
  return optax.chain(_decay_weights(optim["wd"], decay_mask), sgd)


def _decay_weights(constant: float, mask: Any):
  """As `optax.add_decayed_weights`, whose decay `update(..., wd=...)` may replace."""

  def update(updates, state, params=None, *, wd=constant, **others):
    del others
    if isinstance(wd, float | int) and wd == 0:
      return updates, state
    return jax.tree.map(lambda g, p: g + wd * p, updates, params), state

  init = optax.init_empty_state
  return optax.masked(optax.GradientTransformationExtraArgs(init, update), mask)


def _check_trainable(params: Mapping[str, Any], mask: Mapping[str, Any]) -> None:
  if jax.tree.structure(dict(params)) != jax.tree.structure(dict(mask)):
    names = sorted(set(trees.flatten(params)) ^ set(trees.flatten(mask)))
    raise ValueError(
      "the mask of trainable parameters does not have the tree of the parameters; "
      f"in one of them only: {', '.join(names[:5])}."
    )
  trainable, _ = trees.split(params, mask)
  if not trainable:
    raise ValueError("the mask selects no parameter: there is nothing to train.")
  for name, leaf in trainable.items():
    if leaf.dtype != jnp.float32:
      raise ValueError(
        f"the trainable parameter {name!r} is {leaf.dtype}; parameters that train, "
        "and so their moments, must be float32. Only frozen ones may be narrower."
      )


SCHEDULES = {
  "constant": _stepwise(_constant),
  "cosine": _stepwise(_cosine),
  "polynomial": _stepwise(_polynomial),
  "multistep": _stepwise(_multistep),
  "cosine_epochwise": _create_cosine_epochwise,
}
OPTIMIZERS = {"adamw": _create_adamw, "sgd": _create_sgd}

"""The parts of a train step, each as a program of its own, to be timed apart.

What is fused in the whole step is not in its parts, so they need not add up to it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from insvp_jax import trees
from insvp_jax.data import preprocess
from insvp_jax.train import losses, steps
from insvp_jax.train.program import Program

PARTS = (
  "input",
  "prompters",
  "backbone forward",
  "backbone backward",
  "optimizer",
  "rest",
)


def _prompt(model, images, train: bool):
  """Returns what the method makes of the images; for `model.apply(method=...)`."""
  prompted = model.prompt_image(images, train=train)
  return prompted, model.prompter.adapt(images, prompted, train=train)


def evaluation_functions(
  program: Program, params: Mapping[str, Any], images: jax.Array
) -> dict[str, Callable[[], Any]]:
  """Returns the part of evaluation that can be timed alone: "prompters".

  Args:
    program: of the method.
    params: its parameters.
    images: normalised, [b, h, w, 3].
  """

  @jax.jit
  def prompters(params, images):
    return program.model.apply(
      {"params": params}, images, method=lambda m, x: _prompt(m, x, False)
    )

  return {"prompters": lambda: prompters(params, images)}


def train_functions(
  program: Program,
  state: Callable[[], steps.TrainState],
  batch: Mapping[str, jax.Array],
  preset: preprocess.Preset,
) -> dict[str, Callable[[], Any]]:
  """Returns the programs that `train_parts` needs the seconds of.

  Args:
    program: of the method.
    state: returns the newest state.
    batch: one train batch on the devices.
    preset: how its images are normalised.
  """
  model, mask = program.model, program.mask
  # As many images as a step computes at once; `train_parts` counts them all.
  batch = {k: v[: len(v) // program.num_parts] for k, v in batch.items()}
  images = jax.jit(lambda x: preprocess.normalise(preset, x))(batch["images"])
  key = jax.random.key(1)

  def prompters(trainable, frozen, images):
    variables = {"params": trees.merge(trainable, frozen)}
    rngs = {"dropout": key}
    return model.apply(
      variables, images, rngs=rngs, method=lambda m, x: _prompt(m, x, True)
    )

  def loss(trainable, frozen, images, labels):
    variables = {"params": trees.merge(trainable, frozen)}
    logits = model.apply(variables, images, train=True, rngs={"dropout": key})
    targets = losses.targets(labels, model.head.num_classes)
    return jnp.mean(losses.cross_entropy(logits, targets))

  def prompters_gradient(trainable, frozen, images, cotangents):
    found, backward = jax.vjp(lambda t: prompters(t, frozen, images), trainable)
    return found, backward(cotangents)

  def optimizer(grads, state):
    return steps.update_params(program.optimizer, program.schedule, mask, state, grads)

  def split():
    return trees.split(state().params, mask)

  prompted = jax.jit(prompters)
  cotangents = jax.tree.map(jnp.ones_like, prompted(*split(), images))
  grads = jax.tree.map(jnp.zeros_like, split()[0])
  forward, gradient = jax.jit(loss), jax.jit(jax.value_and_grad(loss))
  backward, update = jax.jit(prompters_gradient), jax.jit(optimizer)
  labels = batch["labels"]
  return {
    "prompters forward": lambda: prompted(*split(), images),
    "prompters": lambda: backward(*split(), images, cotangents),
    "forward": lambda: forward(*split(), images, labels),
    "gradient": lambda: gradient(*split(), images, labels),
    "optimizer": lambda: update(grads, state()),
  }


def train_parts(seconds: Mapping[str, float], num_parts: int = 1) -> dict[str, float]:
  """Returns the seconds of each part of a train step.

  Prompters are both passes through them; the head and the loss count as backbone.

  Args:
    seconds: of the whole ("train"), of its "input" and of `train_functions`.
    num_parts: in which the batch is computed.
  """
  computed = ("prompters", "prompters forward", "forward", "gradient")
  seconds = {**seconds, **{name: num_parts * seconds[name] for name in computed}}
  both = seconds["prompters"]
  found = {
    "input": seconds["input"],
    "prompters": both,
    "backbone forward": seconds["forward"] - seconds["prompters forward"],
    "backbone backward": (seconds["gradient"] - seconds["forward"])
    - (both - seconds["prompters forward"]),
    "optimizer": seconds["optimizer"],
  }
  return {**found, "rest": seconds["train"] - sum(found.values())}


def evaluation_parts(seconds: Mapping[str, float], whole: str) -> dict[str, float]:
  """Returns the seconds of each part of evaluation; the rest is the backbone.

  Args:
    seconds: of the whole, of its "input" and of `evaluation_functions`.
    whole: "eval" or "predict".
  """
  known = {"input": seconds["input"], "prompters": seconds["prompters"]}
  return {**known, "backbone forward": seconds[whole] - sum(known.values())}

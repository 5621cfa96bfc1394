"""FLOPs of a train step as a multiple of the forward pass, by method.

  python benchmarks/gradient_economy.py [--backbone=boxed] [--batch_size=8]

Read off the compiled programs (`cost_analysis`), so the numbers do not depend on the
machine's speed. Full fine-tuning needs about 3 (forward, gradients of activations,
gradients of weights); a method whose frozen weights get no gradient about 2.
"""

import argparse

import jax
import jax.numpy as jnp

from insvp_jax import optim, program, steps, trees
from insvp_jax.config import defaults
from insvp_jax.data.preprocess import PRESETS
from insvp_jax.methods import METHODS
from insvp_jax.models.classifier import create_model


def count_flops(function, *args) -> float:
  """Returns the FLOPs of a compiled function."""
  return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def ratio(backbone: str, method: str, batch_size: int) -> tuple[float, float]:
  """Returns (MFLOPs of the method's forward pass per image, train step / forward)."""
  model = create_model(backbone, method, num_classes=10)
  config = defaults()
  config.optim.lr = 1.0
  shapes = program.param_shapes(model)
  mask = trees.mask(shapes, model.prompter.trainable_patterns())
  schedule = optim.create_schedule(
    config.optim, total_steps=100, steps_per_epoch=10, batch_size=batch_size
  )
  optimizer = optim.create_optimizer(config.optim, schedule, shapes, mask)
  state = steps.TrainState(
    step=jax.ShapeDtypeStruct((), jnp.int32),
    params=shapes,
    opt_state=jax.eval_shape(optimizer.init, shapes),
    rng=jax.eval_shape(lambda: jax.random.key(0)),
    peak_lr=jax.ShapeDtypeStruct((), jnp.float32),
  )
  size = model.backbone.image_size
  batch = {
    "images": jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8),
    "labels": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
  }
  images = jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.float32)
  forward = count_flops(lambda p, x: model.apply({"params": p}, x), shapes, images)
  step = steps.create_train_step(
    model, optimizer, mask, preset=PRESETS["vtab"], loss=config.loss.to_dict()
  )
  return forward / batch_size / 1e6, count_flops(step, state, batch) / forward


def main() -> None:
  """Prints one row per method."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--backbone", default="boxed")
  parser.add_argument("--batch_size", type=int, default=8)
  args = parser.parse_args()
  print(f"| {args.backbone} | forward, MFLOP per image | train step / forward |")
  print("|---|---|---|")
  for method in METHODS:
    forward, multiple = ratio(args.backbone, method, args.batch_size)
    print(f"| {method} | {forward:,.0f} | {multiple:.2f} |", flush=True)


if __name__ == "__main__":
  main()

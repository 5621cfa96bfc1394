"""FLOPs of a train step as a multiple of the forward pass, by method.

  python -m benchmarks.gradient_economy [--backbone=boxed] [--batch_size=8]
      [--methods=insvp,vpt_deep]

Read off the compiled programs (`cost_analysis`), so the numbers do not depend on the
machine's speed. Full fine-tuning needs about 3 (forward, gradients of activations,
gradients of weights); a method whose frozen weights get no gradient about 2.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from insvp_jax import trees
from insvp_jax.config import defaults
from insvp_jax.data.preprocess import PRESETS
from insvp_jax.methods import METHODS
from insvp_jax.models.classifier import PromptedClassifier, create_model
from insvp_jax.search import tables
from insvp_jax.train import optim, steps
from insvp_jax.train import state as state_lib
from insvp_jax.train.objectives import Classification


def count_flops(function, *args, compiled: bool = True) -> float:
  """Returns the FLOPs of a function, after the compiler's work or before it."""
  lowered = jax.jit(function).lower(*args)
  return (lowered.compile() if compiled else lowered).cost_analysis()["flops"]


def _images(model: PromptedClassifier, batch_size: int, dtype: Any):
  size = model.input_size
  return jax.ShapeDtypeStruct((batch_size, size, size, 3), dtype)


def forward_flops(
  model: PromptedClassifier, batch_size: int, *, compiled: bool = True
) -> float:
  """Returns the FLOPs of a model's forward pass; allocates no weights."""
  images = _images(model, batch_size, jnp.float32)
  shapes = state_lib.param_shapes(model)
  return count_flops(
    lambda p, x: model.apply({"params": p}, x), shapes, images, compiled=compiled
  )


def plain_forward_flops(backbone: str, batch_size: int) -> float:
  """Returns the FLOPs of the backbone alone, computing every token in every block."""
  fields = {"skip_unread": False}
  model = create_model(backbone, "linear", num_classes=10, backbone_kwargs=fields)
  # Matrix products: what the compiler makes of them are the same products.
  return forward_flops(model, batch_size, compiled=False)


def train_step_flops(
  model: PromptedClassifier, batch_size: int, *, compiled: bool = True
) -> float:
  """Returns the FLOPs of a model's train step; allocates no weights."""
  config = defaults()
  shapes = state_lib.param_shapes(model)
  mask = trees.mask(shapes, model.prompter.trainable_patterns())
  schedule = optim.create_schedule(config.optim, total_steps=100, steps_per_epoch=10)
  optimizer = optim.create_optimizer(config.optim, shapes, mask)
  state = steps.TrainState(
    step=jax.ShapeDtypeStruct((), jnp.int32),
    params=shapes,
    opt_state=jax.eval_shape(optimizer.init, shapes),
    rng=jax.eval_shape(lambda: jax.random.key(0)),
    peak_lr=jax.ShapeDtypeStruct((), jnp.float32),
  )
  batch = {
    "images": _images(model, batch_size, jnp.uint8),
    "labels": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
  }
  step = steps.create_train_step(
    model,
    optimizer,
    schedule,
    mask,
    objective=Classification(
      model.head.num_classes, PRESETS["vtab"], config.loss.to_dict()
    ),
  )
  return count_flops(step, state, batch, compiled=compiled)


def ratio(
  backbone: str,
  method: str,
  batch_size: int,
  method_kwargs: Mapping[str, Any] | None = None,
) -> tuple[float, float, float]:
  """Counts one method's FLOPs.

  Returns:
    MFLOPs of the method's forward pass per image; its train step over that forward
    pass; its train step over the plain backbone's forward pass.
  """
  model = create_model(
    backbone,
    method,
    num_classes=10,
    # For methods that read the classes that a backbone was trained on.
    backbone_kwargs={"head_classes": 10 if method in ("ilm_vp", "autovp") else 0},
    method_kwargs=dict(method_kwargs or {}),
  )
  forward = forward_flops(model, batch_size)
  step = train_step_flops(model, batch_size)
  plain = plain_forward_flops(backbone, batch_size)
  return forward / batch_size / 1e6, step / forward, step / plain


def main() -> None:
  """Prints one row per method."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--backbone", default="boxed")
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument("--methods", help="some, joined by commas; all without it")
  args = parser.parse_args()
  cases = [*((m, {}) for m in METHODS), ("insvp", {"preset": "release"})]
  if args.methods:
    cases = [(method, {}) for method in args.methods.split(",")]
  rows = []
  for method, kwargs in cases:
    try:
      forward, *ratios = ratio(args.backbone, method, args.batch_size, kwargs)
    except ValueError as error:
      parser.error(f"{method} on {args.backbone}: {error}")
    name = " ".join((method, *kwargs.values()))
    rows.append([name, f"{forward:,.0f}", *(f"{number:.2f}" for number in ratios)])
  titles = [args.backbone, "forward, MFLOP per image", "train step / forward"]
  print(tables.markdown(rows, [*titles, "train step / plain ViT forward"]), end="")


if __name__ == "__main__":
  main()

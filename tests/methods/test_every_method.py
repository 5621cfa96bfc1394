"""What holds for every method, whatever it is: on tiny shapes, form by form."""

import functools
import re
from typing import Any

import jax
from jax import export as jax_export
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import draw_backbone
from tiny_training import SIZE, make_split, tiny_config

from insvp_jax import trees
from insvp_jax.checkpoints.checkpointer import Checkpointer
from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.methods import METHODS
from insvp_jax.methods import fields as fields_lib
from insvp_jax.models.classifier import create_model
from insvp_jax.models.quantized import Quantized
from insvp_jax.models.weights import npz
from insvp_jax.search import population
from insvp_jax.train import flops
from insvp_jax.train import state as state_lib
from insvp_jax.train.program import create_program, create_state, model_kwargs

# What fits the two blocks of width 16 and the 4 x 4 patches, by method; and of some
# methods a second case, after a colon.
TINY_FIELDS: dict[str, dict[str, Any]] = {
  "lora": {"rank": 2, "dropout": 0.1},
  "vpt_shallow": {"prompt_length": 2},
  "vpt_shallow:below": {"prompt_length": 1, "location": "below"},
  "vpt_shallow:pad": {"prompt_length": 2, "location": "pad"},
  "vpt_deep:last": {"prompted_from": "last", "prompted_blocks": 1, "pool": "both"},
  "e2vpt": {"prompt_length": 2, "kv_length": 2},
  "vfpt": {"prompt_length": 4},
  "vapt": {"prompt_length": 2, "hidden": 2},
  "gated": {"prompt_length": 2},
  "gated:mean": {"prompt_length": 2, "pool": "mean"},
  "transhp": {"levels": (2,)},
  "ilm_vp": {"inner_size": SIZE},
  "autovp": {"inner_size": SIZE, "scale_init": 1.1},
  "autovp:mapped": {
    **{"inner_size": SIZE, "resize": False, "additive": True},
    **{"mapping": "iterative", "sources_per_target": 2},
  },
  "dam_vp": {"max_clusters": 3},
  "dam_vp:neurons": {"max_clusters": 2, "classifier": "neurons"},
  "vp:source": {"classifier": "source"},
  "vp:random": {"location": "random_patch", "prompt_size": 5},
  "adapter": {"hidden": 2, "activation": "quick_gelu"},
  "adapter:vpt_zero": {"hidden": 2, "adapter_init": "vpt_zero"},
  "adaptformer": {"hidden": 2},
  "adapter_plus": {"hidden": 2},
  "convpass": {"hidden": 2},
  "sidetune": {"channels": (4, 6, 8, 6, 4)},
  "lion": {"channels": 2, "hidden": 4},
  "repadapter": {"hidden": 2},
  "fact_tt": {"rank": 2},
  "fact_tk": {"rank": 2},
  "insvp+lora": {"lora.rank": 2},
}
# What is added to all keys alike cancels in the softmax; what is added to all channels
# of a token alike, as InsVP's last bias is where a token is one channel, in the norm.
CANCELS = r"key/(bias|shift)|specific_prompter/Conv_2/bias"
# Trainable parameters that two steps leave where they were.
STILL: dict[str, set[str]] = {
  # Counted between epochs.
  **dict.fromkeys(("ilm_vp", "autovp:mapped"), {"prompter/label_mapping"}),
  # Published so: all is zero, and only the last bias has a gradient, ever.
  "adapter:vpt_zero": {
    f"prompter/{leaf}" for leaf in ("down/kernel", "down/bias", "up/kernel")
  },
}
COMBINED = ("insvp+lora", "vpt_deep+bias")
# Other backbones than the tiny ViT, after an "@".
BACKBONES: dict[str, dict[str, Any]] = {
  # The published form of the activation takes longest to compile.
  "swin": {"name": "swin_t", "window": 2, "gelu": "tanh"},
  "convnext": {"name": "convnext_t", "num_heads": None},
  "resnet": {"name": "resnet50", "num_heads": None, "patch_size": None, "width": 4},
}
# One of each kind of prompt, and of what trains, on each.
ELSEWHERE = (
  *("insvp@swin", "vpt_shallow@swin", "vpt_shallow:pad@convnext", "full@resnet"),
)
NAMES = (*METHODS, *(name for name in TINY_FIELDS if ":" in name), *COMBINED)
NAMES = (*dict.fromkeys((*NAMES, *ELSEWHERE)),)
# They read the classes that the backbone was trained on.
SOURCE_HEAD = {"vp:source", "ilm_vp", "autovp", "autovp:mapped"}
# Its leaves cannot be split where blocks share them.
NEEDS_UNROLLED = {"partial"}
# Stored and restored between the steps: a leaf of each kind. What a checkpoint does
# with a leaf does not depend on the method.
STORED = {"insvp", "e2vpt", "lora", "mlp", "transhp", "full", "vpt_deep+bias"}
STORED |= set(ELSEWHERE)
CLASSES = 3


def config_of(name, **changes):
  """Returns the config of a method on a tiny ViT, or on the backbone after "@"."""
  name, _, backbone = name.partition("@")
  # AdamW makes steps out of rounding errors, and decay moves what has no gradient.
  plain = {"optim__name": "sgd", "optim__lr": 0.3, "optim__wd": 0.0}
  # Dropout is drawn for all tokens, or for those that are read.
  plain["backbone__skip_unread"] = False
  method = name.partition(":")[0]
  config = tiny_config(method, backbone__mlp_dim=64, **plain, **changes)
  for field, value in TINY_FIELDS.get(name, {}).items():
    section, _, field = field.rpartition(".")
    config[section or method][field] = value
  if "inner_size" in TINY_FIELDS.get(name, {}):
    config.image_size = SIZE + 8
  if name in SOURCE_HEAD:
    config.backbone.head_classes = 7
  if backbone:
    config.backbone.update(depth=None, mlp_dim=None, depths=(2, 2), patch_size=4)
    config.backbone.update(BACKBONES[backbone])
  return config


def form_of(name):
  """Returns what is set of a method where any form will do.

  Of the methods every second one has `remat` where the others have not, and every
  second pair has frozen kernels in 8 bits. (Every method in all of these forms takes
  minutes; it was run once.)
  """
  number = NAMES.index(name)
  return {
    "backbone__remat": number % 2 == 0,
    "backbone__frozen_dtype": ("float32", "int8")[number // 2 % 2],
  }


@functools.cache
def program_of(name, **changes):
  """Returns (config, program) of a method in one form; compiles nothing."""
  config = config_of(name, **changes)
  mesh = mesh_lib.create_mesh(jax.devices()[:1])
  return config, create_program(config, CLASSES, 24, mesh)


_PARAMS: dict[tuple[str, str], Any] = {}


def init_params(name, program):
  """Returns a method's own first parameters on a backbone; drawn once for each."""
  shapes = program.shapes["backbone"]
  key = name, str(trees.flatten(shapes))
  if key not in _PARAMS:
    _PARAMS[key] = state_lib.init_params(
      program.model, seed=0, weights=draw_backbone(shapes), draws=program.draws
    )
  return dict(_PARAMS[key])


def stack(model, backbone):
  """Returns unrolled parameters of a model's backbone as scanned ones."""
  stacked = getattr(model.backbone, "stack", npz.stack)
  return trees.unflatten(stacked(trees.flatten(backbone)))


def batch():
  split = make_split(8, 1)
  return {"images": jnp.asarray(split.images), "labels": jnp.asarray(split.labels)}


def on_host(params):
  return jax.device_get(trees.flatten(params))


@pytest.mark.parametrize("name", NAMES)
def test_trains_alike_in_every_form(name, tmp_path):
  """Two steps: unrolled as two trials at once; and scanned, for some stored between."""
  form = form_of(name)
  config, program = program_of(name, **form)
  params = init_params(name, program)
  configs = [config, config.copy_and_resolve_references()]
  configs[1].optim.lr = 0.1
  stacked = population.stack_program(program)
  state = population.stack_state(configs, stacked, params)
  for _ in range(2):
    state, _ = stacked.train_step(state, batch())
  carried = trees.flatten(program.carried)
  before = on_host(state_lib.cast_frozen(params, program.mask, config))
  trials = [
    {n: leaf[i] if carried[n] else leaf for n, leaf in on_host(state.params).items()}
    for i in range(2)
  ]
  for after in trials:
    still = {n for n in before if np.array_equal(before[n], after[n])}
    # Frozen parameters stay bit for bit, and each trainable one moves.
    still -= {n for n in still if carried[n] and re.search(CANCELS, n)}
    assert still == {n for n in carried if not carried[n]} | STILL.get(name, set())

  scan = name not in NEEDS_UNROLLED
  form |= {"backbone__scan": scan, "backbone__remat": not form["backbone__remat"]}
  config, program = program_of(name, **form)
  if scan:
    params = {**params, "backbone": stack(program.model, params["backbone"])}
  state = create_state(config, program, params)
  state, _ = program.train_step(state, batch())
  if name in STORED:
    with Checkpointer(tmp_path, mask=program.mask, meta={}) as checkpointer:
      checkpointer.save(state, progress={}, force=True)
      checkpointer.wait()
      restored = checkpointer.restore(create_state(config, program, params))
    resumed = on_host(program.train_step(restored, batch())[0].params)
  after = on_host(program.train_step(state, batch())[0].params)
  for leaf, value in after.items() if name in STORED else ():
    assert np.asarray(value).tobytes() == np.asarray(resumed[leaf]).tobytes(), leaf
  # Alone, scanned, with the other `remat`: the same as the trial of its lr.
  expected = trees.unflatten(trials[0])
  if scan:
    expected["backbone"] = stack(program.model, expected["backbone"])
  for leaf, value in trees.flatten(expected).items():
    np.testing.assert_allclose(after[leaf], value, rtol=1e-3, atol=1e-5, err_msg=leaf)


@pytest.mark.parametrize(
  "name, changes",
  [
    ("partial", {"backbone__remat": True}),
    ("lora", {"backbone__scan": True}),
    ("vp:source", {}),
    ("ln_tune@convnext", {}),
  ],
)
def test_a_step_in_8_bits_is_that_of_a_plain_backbone_of_these_weights(name, changes):
  config, program = program_of(name, **changes, backbone__frozen_dtype="int8")
  plain = program_of(name, **changes)
  params = init_params(name, program)
  if config.backbone.scan:
    params = {**params, "backbone": stack(program.model, params["backbone"])}
  stored = state_lib.cast_frozen(params, program.mask, config)
  trainable, _ = trees.split(program.mask, program.mask)
  found = {n for n, x in trees.flatten(stored).items() if isinstance(x, Quantized)}
  kernels = {n for n in trees.flatten(params["backbone"]) if n.endswith("kernel")}
  # What trains stays in floats.
  assert found == {f"backbone/{n}" for n in kernels} - {
    n for n, trains in trainable.items() if trains
  }
  floats = trees.unflatten({n: np.asarray(x) for n, x in trees.flatten(stored).items()})
  after = []
  for each, weights in (((config, program), params), (plain, floats)):
    state, metrics = each[1].train_step(create_state(*each, weights), batch())
    moved, _ = trees.split(jax.device_get(state.params), program.mask)
    after.append({**moved, "loss": metrics["loss"], "norm": metrics["grad_norm"]})
  for leaf, value in after[1].items():
    np.testing.assert_allclose(after[0][leaf], value, 1e-4, 1e-6, err_msg=leaf)


@pytest.mark.parametrize("name", NAMES)
def test_no_image_sees_the_others_and_bfloat16_fits(name):
  _, program = program_of(name, **form_of(name))
  # Nothing is at its start, where many a method is the identity.
  params = init_params(name, program)
  rng = np.random.default_rng(2)
  params["prompter"] = jax.tree.map(
    lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype),
    params.get("prompter", {}),
  )
  params = {k: v for k, v in params.items() if v}
  images = rng.standard_normal((2, SIZE, SIZE, 3)).astype(np.float32)
  apply = jax.jit(program.model.apply)
  logits = apply({"params": params}, images)
  others = np.stack([images[0], -images[1]])
  other_logits = apply({"params": params}, others)
  np.testing.assert_array_equal(logits[0], other_logits[0])
  assert not np.array_equal(logits[1], other_logits[1])
  # The types of all that goes from block to block have to fit, too. And an exported
  # program takes any number of images: a symbol.
  (b,) = jax_export.symbolic_shape("b")
  images = jax.ShapeDtypeStruct((b, *images.shape[1:]), jnp.float32)
  unrolled = params["backbone"]
  for scan in {False, name not in NEEDS_UNROLLED}:
    config = config_of(name, backbone__scan=scan, backbone__dtype="bfloat16")
    model = create_model(**model_kwargs(config, CLASSES))
    if scan:
      params["backbone"] = stack(model, unrolled)
    shape = jax.eval_shape(
      lambda p, x, model=model: model.apply({"params": p}, x), params, images
    )
    assert shape.shape == (b, CLASSES) and shape.dtype == jnp.float32


# Train steps that cost more than 2.5 forward passes, and why.
DEARER = {
  # The frozen half of a pass has no gradient of weights; these train weights.
  "full": 3.1,
  "sidetune": 3.1,
}


@pytest.mark.parametrize("name", (*METHODS, *COMBINED))
def test_a_train_step_computes_no_gradient_of_frozen_weights(name):
  """S/16 at 64 px in 2 blocks: products dominate; counted, not compiled."""
  parts = name.split("+")
  fields = {
    part: {"prompt_length": 9}
    for part in parts
    if "prompt_length" in fields_lib.declared(METHODS[part])
  }
  model = create_model(
    "S/16",
    name,
    num_classes=10,
    image_size=64,
    backbone_kwargs={"depth": 2, "head_classes": 10 * (name in SOURCE_HEAD)},
    method_kwargs=fields if len(parts) > 1 else fields.get(name, {}),
  )
  shapes = state_lib.param_shapes(model)
  mask = trees.mask(shapes, model.prompter.trainable_patterns())
  trainable, frozen = trees.split(shapes, mask)
  size = model.input_size
  images = jax.ShapeDtypeStruct((4, size, size, 3), jnp.float32)

  def loss(trainable, frozen, images):
    params = trees.merge(trainable, frozen)
    rngs = {"dropout": jax.random.key(0)}
    return jnp.sum(model.apply({"params": params}, images, train=True, rngs=rngs) ** 2)

  def forward(params, images):
    return model.apply({"params": params}, images)

  step = jax.jit(jax.grad(loss)).trace(trainable, frozen, images)
  plain = jax.jit(forward).trace(shapes, images)
  ratio = flops.count(step.jaxpr) / flops.count(plain.jaxpr)
  assert ratio < DEARER.get(name, 2.5)

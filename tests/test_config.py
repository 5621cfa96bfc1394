"""The schema agrees with the methods, and bad values are named."""

import importlib.util
import json
import re

from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
import numpy as np
import pytest

from insvp_jax import config as config_lib
from insvp_jax import config_checks, config_variants, methods, trees
from insvp_jax.config import defaults
from insvp_jax.data import tasks
from insvp_jax.data.preprocess import PRESETS
from insvp_jax.methods.base import BackboneSpec
from insvp_jax.models import architectures
from insvp_jax.models.classifier import create_backbone
from insvp_jax.models.heads import HEAD_INITS
from insvp_jax.search import trials
from insvp_jax.train import optim

CONFIGS = (
  "ablation",
  "cifar100_lt",
  "fgvc",
  "folder",
  "hta",
  "methods",
  "pixels",
  "pretrain",
  "quickstart",
  "segment",
  "vtab",
)


def load(root, name, *args):
  path = root / "configs" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(f"config_{name}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*args)


@pytest.mark.parametrize("method", methods.METHODS)
def test_a_method_s_section_has_exactly_its_fields(method):
  fields = set(methods.method_fields(method))
  assert (method in config_lib.method_sections()) == bool(fields)
  if fields:
    assert set(defaults()[method]) == fields


def test_method_kwargs_are_what_is_set():
  config = defaults()
  assert config_lib.method_kwargs(config) == {"preset": "paper"}
  config.insvp.prompt_length = 3
  config.insvp.image_fusion = (0.5, 0.5)
  config.insvp.simam = False
  assert config_lib.method_kwargs(config) == {
    "preset": "paper",
    "prompt_length": 3,
    "image_fusion": (0.5, 0.5),
    "simam": False,
  }
  config.method = "linear"
  assert config_lib.method_kwargs(config) == {}


def test_backbone_kwargs_reach_the_vit():
  config = defaults()
  config.backbone.depth = 2
  config.backbone.pool = "gap"
  config.backbone.dtype = "bfloat16"
  vit = create_backbone("mu/4", 16, config_lib.backbone_kwargs(config))
  assert (vit.depth, vit.pool, vit.dtype) == (2, "gap", "bfloat16")


def test_the_backbone_s_section_has_every_field_of_every_backbone():
  config = defaults()
  config.backbone.update(width=8, depth=1, mlp_dim=8, num_heads=1, patch_size=4)
  config.backbone.update(pool="gap", gelu="exact", head_classes=5, mlp="swiglu")
  config.backbone.update(class_token=True, registers=2, layer_scale=True)
  config.backbone.update(pre_norm=True, fc_norm=True, norm_eps=1e-5, projection=4)
  config.backbone.update(depths=(2, 2), window=2)
  # The image's size has a key of its own.
  assert {*config_lib.backbone_kwargs(config), "image_size"} == set(
    architectures.FIELDS
  )


def test_format_keys_has_a_line_for_every_key_in_the_order_of_the_table():
  config = defaults()
  config.optim.lr = 0.25
  config.insvp.global_kernels = (5, 7)
  lines = config_lib.format_keys(config).splitlines()
  keys = [line.split(" = ")[0] for line in lines]
  names = trees.flatten(config.to_dict())
  assert sorted(keys) == sorted(f"config.{n.replace('/', '.')}" for n in names)
  assert keys[:2] == ["config.task", "config.method"]
  assert all(line.partition("  # ")[2] for line in lines)
  text = " ".join(" ".join(lines).split())
  assert "config.optim.lr = 0.25 # learning rate at the schedule's peak" in text
  assert (
    "config.insvp.global_kernels = (5, 7) # the two kernel sizes of the global "
    "prompter; None: (3, 3) (paper, tuned), (11, 25) (release)"
  ) in text
  assert "None: 'paper'" not in text  # nor does its own None mean anything
  with config.unlocked():
    config.mine = "x"
    del config.seed
  lines = config_lib.format_keys(config).splitlines()
  assert lines[-1].split("  # ")[1] == "of this config file alone"
  assert not any(line.startswith("config.seed ") for line in lines)


def test_the_defaults_are_valid_and_locked():
  config = defaults()
  config_checks.validate(config)
  with pytest.raises(KeyError, match='Did you mean "lr"'):
    config.optim["lrr"] = 1.0


@pytest.mark.parametrize(
  "key, value",
  [
    ("batch_size", -1),
    ("eval_batch_size", -1),
    ("log_every_steps", 0),
    ("total_epochs", -1.0),
    ("total_epochs", float("nan")),
    ("total_epochs", float("inf")),
    ("total_epochs", 0.0),
    ("total_steps", -1),
    ("image_size", -32),
    ("eval_every_epochs", -0.5),
    ("checkpoint_every_epochs", float("inf")),
    ("data.data_dir", "gs://bucket/datasets"),
    ("data.root", "s3://bucket/photos.zip"),
    ("data.lists", "~no_such_user_here/lists"),
    ("data.train_split", "test"),
    ("data.val_fraction", -0.1),
    ("data.test_fraction", 1.5),
    ("loss.label_smoothing", 1.0),
    ("loss.mixup_alpha", -0.1),
    ("loss.mix_prob", 1.1),
    ("backbone.dtype", "float16"),
    ("backbone.frozen_dtype", "int4"),
    ("backbone.init", "zeros"),
    ("optim.no_decay", ("(",)),
    ("optim.no_decay", (3,)),
    ("tune.lr", ("high",)),
    ("tune.lr", (-0.1,)),
    ("tune.lr", (float("nan"),)),
    ("tune.wd", (True,)),
    ("tune.seeds", (0.5,)),
    ("tune.seeds", (1, 1)),
    ("tune.methods", (1,)),
  ],
)
def test_a_bad_value_is_named_with_its_key(key, value):
  config = defaults()
  section, _, field = key.rpartition(".")
  (config[section] if section else config)[field] = value
  shown = value[0] if isinstance(value, tuple) else value
  with pytest.raises(ValueError) as raised:
    config_checks.validate(config)
  message = str(raised.value)
  assert f"config.{key}" in message and str(shown) in message
  assert re.search("expected|must be|twice", message) and "\n" not in message


NUMBERS = {
  key: default if isinstance(default, type) else type(default)
  for key, (default, _) in config_lib.keys().items()
  if default in (int, float) or type(default) in (int, float)
}
EXTREMES = st.one_of(
  st.integers(),
  st.sampled_from([2**n + k for n in (31, 32, 63, 64, 70, 20000) for k in (-1, 0, 1)]),
  st.integers(0, 300),
)


def set_key(config, key, value):
  section, _, field = key.rpartition(".")
  (config[section] if section else config)[field] = value


@settings(max_examples=400)
@given(key=st.sampled_from(sorted(NUMBERS)), number=EXTREMES, real=st.floats())
def test_a_number_is_refused_in_one_line_or_can_be_computed_with(key, number, real):
  config = defaults()
  is_int = NUMBERS[key] is int
  value = number if is_int else real
  set_key(config, key, value)
  try:
    config_checks.validate(config)
    optim.check_optim(config.optim)
    total, per_epoch = config_lib.num_steps(config, 1000)
    optim.create_schedule(config.optim, total_steps=total, steps_per_epoch=per_epoch)
    peak = optim.peak_lr(config.optim, config.batch_size or 1)
  except ValueError as error:
    message = str(error)
    assert key.rpartition(".")[2] in message and "\n" not in message
    assert len(message) < 300
    return
  assert json.loads(json.dumps(config_lib.to_dict(config), allow_nan=False))
  as_seed = key in ("seed", "data.split_seed")
  # Raises OverflowError, or warns, where the number does not fit.
  held = (np.uint32 if as_seed else np.int32 if is_int else np.float32)(value)
  assert held == value or not is_int
  assert bool(held) == bool(value)
  assert np.isfinite(np.float32(peak))


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70, 1 << 20000], ids=range(4))
def test_two_seeds_are_never_one_run(seed):
  config = defaults()
  for key, value in (
    ("seed", seed),
    ("data.split_seed", seed),
    ("tune.seeds", (seed,)),
  ):
    config = defaults()
    set_key(config, key, value)
    with pytest.raises(ValueError, match=f"config.{key} .*expected.*4294967295"):
      config_checks.validate(config)
    set_key(config, key, (2**32 - 1,) if key == "tune.seeds" else 2**32 - 1)
    config_checks.validate(config)
  for text in ("4294967296", "-1", "1" * 5000, "\u00b2"):
    with pytest.raises(ValueError, match="expected a whole number, 0 to 4294967295"):
      config_lib.select(defaults(), config_lib.parse_arg(f"seed={text}"))


@pytest.mark.parametrize(
  "key, value, expected",
  [
    ("seed", "1", "a whole number"),
    ("seed", True, "a whole number"),
    ("batch_size", 2.5, "a whole number"),
    ("optim.lr", "high", "a number"),
    ("tensorboard", 1, "True or False"),
    ("task", 3, "a text"),
    ("tune.lr", 0.1, "a tuple"),
    ("insvp.prompt_length", 0.5, "a whole number"),
    ("backbone.width", "wide", "a whole number"),
  ],
)
def test_a_value_of_another_type_is_named_in_a_config_made_from_scratch(
  key, value, expected
):
  made = ConfigDict(defaults().to_dict(), type_safe=False)
  config_checks.validate(made)
  set_key(made, key, value)
  with pytest.raises(ValueError, match=f"config.{key} is .*expected {expected}"):
    config_checks.validate(made)


@given(number=st.integers(1, 300), devices=st.integers(1, 12))
def test_an_automatic_batch_leaves_an_epoch_four_steps(number, devices):
  if number < devices:
    with pytest.raises(ValueError, match=f"{number} images, fewer than the {devices} "):
      config_lib.automatic_batch_size(number, devices)
    return
  size = config_lib.automatic_batch_size(number, devices)
  assert size % devices == 0 and size <= number
  assert size == devices or (size <= 32 and number // size >= 4)
  # The largest such.
  assert 2 * size > 32 or number // (2 * size) < 4


def test_only_own_images_have_an_automatic_batch(root):
  sizes = {name: load(root, name).batch_size for name in CONFIGS}
  automatic = {name for name, size in sizes.items() if size == 0}
  assert automatic == {"ablation", "folder", "quickstart", "segment"}
  config = load(root, "vtab")
  with pytest.raises(ValueError, match="only 18 images; lower it to at most 18"):
    config_lib.num_steps(config, 18)


def test_a_run_is_prolonged_where_the_lr_does_not_depend_on_its_length():
  config = defaults()
  config.optim.schedule, config.total_epochs = "constant", 10.0
  stored = config_lib.to_dict(config)

  def made(**changes):
    other = defaults()
    other.optim.schedule, other.total_epochs = "constant", 20.0
    for key, value in changes.items():
      set_key(other, key.replace("__", "."), value)
    return config_lib.to_dict(other)

  assert config_lib.prolongs(made(), stored)
  assert config_lib.prolongs(made(eval_batch_size=8), stored)
  assert config_lib.why_not_longer(made(), stored) == ""
  for other in (
    *(made(total_epochs=10.0), made(total_epochs=5.0), made(seed=1)),
    *(made(total_steps=10**6), made(optim__lr=0.5), made(optim__schedule="cosine")),
  ):
    assert not config_lib.prolongs(other, stored)
  cosine = {**stored, "optim": {**stored["optim"], "schedule": "cosine"}}
  why = config_lib.why_not_longer(made(optim__schedule="cosine"), cosine)
  assert "'cosine' ends with the run" in why and "optim.schedule=constant" in why
  assert not config_lib.prolongs(made(), {"total_epochs": 10.0})


def test_a_config_that_lacks_keys_is_told_where_to_start():
  config = defaults().copy_and_resolve_references()
  with config.unlocked():
    del config["seed"]
    del config.optim["lr"]
  with pytest.raises(ValueError, match="lacks optim.lr, seed; start it from .*default"):
    config_checks.validate(config)
  many = ConfigDict(defaults().to_dict(), type_safe=False)
  del many["optim"]
  many.data = 3
  with pytest.raises(ValueError, match=r"lacks (data\.\w+, ){4}data\.\w+ and \d+ more"):
    config_checks.validate(many)


@given(
  number=st.integers(1, 500),
  batch_size=st.integers(1, 100),
  epochs=st.floats(0.1, 20, allow_nan=False),
  steps=st.integers(0, 50),
)
def test_steps_come_from_epochs_unless_they_are_set(number, batch_size, epochs, steps):
  config = defaults()
  config.batch_size, config.total_epochs, config.total_steps = batch_size, epochs, steps
  if batch_size > number:
    with pytest.raises(ValueError, match=f"lower it to at most {number}"):
      config_lib.num_steps(config, number)
    return
  total, per_epoch = config_lib.num_steps(config, number)
  assert per_epoch * batch_size <= number < (per_epoch + 1) * batch_size
  if steps:
    assert total == steps
  else:
    assert total - 1 < epochs * per_epoch <= total


def test_a_config_survives_json():
  config = defaults()
  config.tune.lr = (0.1, 0.01)
  stored = json.loads(json.dumps(config_lib.to_dict(config)))
  assert stored == config_lib.to_dict(config)
  assert config_lib.to_dict(stored) == stored
  assert stored["tune"]["lr"] == [0.1, 0.01]
  assert stored["insvp"]["prompt_length"] is None
  assert set(stored) == set(config)
  assert config_lib.difference(config, stored) == ""


def test_difference_names_what_shapes_a_result_and_nothing_else():
  config = defaults()
  stored = config_lib.to_dict(config)
  config.tune.seeds = (1, 2)
  config.data.root = "elsewhere"
  config.log_every_steps = 7
  assert config_lib.difference(config, stored) == ""
  del stored["head_init"]  # a setting that is newer than the stored run
  stored["head_width"] = 397  # one that there is no more
  assert config_lib.difference(config, stored) == ""
  config.loss.mixup_alpha = 0.5
  assert config_lib.difference(config, stored) == (
    "config.loss.mixup_alpha is 0.5, was 0.0"
  )
  config.seed = 3
  assert config_lib.difference(config, stored) == (
    "config.loss.mixup_alpha is 0.5, was 0.0; config.seed is 3, was 0"
  )


def test_where_files_are_is_each_hosts_own():
  first, second = defaults(), defaults()
  first.data.root, first.backbone.weights = "/here", "/mnt/b16.npz"
  assert config_lib.shared_settings(first) == config_lib.shared_settings(second)
  second.log_every_steps = 7
  assert config_lib.shared_settings(first) != config_lib.shared_settings(second)


def test_a_workdir_is_text():
  config_checks.check_workdir("r\u00f6uns")
  # What bytes that are none become.
  with pytest.raises(ValueError, match=r"is no text in utf-8, expected .*C\.UTF-8"):
    config_checks.check_workdir("r\udcc3uns")


@pytest.mark.parametrize("value", ["10", "0:3", "5:4", "a:b", "-1:2", "1:2:3", "10:"])
def test_profile_wants_a_range_of_steps(value):
  config = defaults()
  config.profile = value
  with pytest.raises(
    ValueError, match=f"config.profile is '{value}', expected .*10:15"
  ):
    config_checks.validate(config)
  config.profile = "10:15"
  config_checks.validate(config)
  assert config_lib.profile_steps(config) == (10, 15)
  assert config_lib.profile_steps(defaults()) is None


def test_parse_arg():
  found = config_lib.parse_arg("", task="cifar100")
  assert found == dict.fromkeys(config_lib.ARGS, "") | {"task": "cifar100"}
  assert config_lib.parse_arg("svhn,seed=1")["task"] == "svhn"
  values = config_lib.parse_arg("b=2,a=x=y", a="0", b="1", c="3")
  assert values.items() >= {"a": "x=y", "b": "2", "c": "3"}.items()
  for arg in ("tsk=svhn", "=svhn"):
    with pytest.raises(ValueError, match=f"'{arg}' after the colon.*task=..."):
      config_lib.parse_arg(arg, task="cifar100")
  with pytest.raises(ValueError, match="Did you mean 'task'"):
    config_lib.parse_arg("tsk=svhn", task="cifar100")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_takes_the_same_arguments(root, name):
  task = {"fgvc": "cub", "hta": "svhn"}.get(name, "svhn")
  arg = f"{task},method=linear,root=photos,seed=7,backbone=boxed"
  config = load(root, name, f"lr,{arg}" if name == "ablation" else arg)
  prefix = f"{name}_" if name in ("fgvc", "hta") else ""
  assert config.task == prefix + task
  assert {v.method for v in config_variants.variants_of(config)} == {"linear"}
  assert config.data.root == "photos"
  assert config.seed == 7 and set(config.tune.seeds) <= {7}
  assert (config.backbone.name, config.image_size) == ("boxed", 0)
  assert load(root, name).to_dict() == load(root, name, "").to_dict()
  with pytest.raises(ValueError, match="unknown method 'linaer'"):
    load(root, name, "method=linaer")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shipped_config_is_valid(root, name):
  config = load(root, name)
  config_checks.validate(config)
  assert config.is_locked
  assert trees.flatten(config.to_dict()).keys() == (
    trees.flatten(defaults().to_dict()).keys()
  )
  sources = {*tasks.TASKS, "folder", "segment_folder", "digits", "cifar10_npz"}
  assert config.task in sources
  assert config.data.preset in {*PRESETS, ""}
  assert config.head_init in HEAD_INITS
  optim.check_optim(config.optim)
  vit = create_backbone(
    config.backbone.name, config.image_size, config_lib.backbone_kwargs(config)
  )
  sizes = (vit.width, vit.depth, vit.mlp_dim, vit.num_heads)
  spec = BackboneSpec(*sizes, vit.patch_size, vit.image_size)
  for variant in config_variants.variants_of(config):
    kwargs = config_lib.method_kwargs(variant.config(config))
    methods.create_method(variant.method, spec, **kwargs)


ABLATIONS = {
  **{"presets": 9, "table5": 9, "fig7_length": 5, "fig7_depth": 5, "fig7_beta": 9},
  **{"lr": 4, "warmup": 4, "epochs": 4, "wd": 5, "dropout": 4},
  **{"location": 9, "depth": 9, "pool": 4, "length": 6, "scale": 5, "shots": 5},
}


@pytest.mark.parametrize("name", ABLATIONS)
@pytest.mark.parametrize("backbone", ["boxed", "vit_b16_i21k"])
def test_the_rows_of_an_ablation_can_be_trained(root, name, backbone):
  config = load(root, "ablation", f"{name},backbone={backbone}")
  config_checks.validate(config)
  variants = config_variants.variants_of(config)
  assert len(variants) == ABLATIONS[name]
  vit = create_backbone(backbone, 0, {})
  for variant in variants:
    row = variant.config(config)
    kwargs = config_lib.method_kwargs(row)
    methods.create_method(variant.method, vit.spec, **kwargs)
    optim.create_schedule(row.optim, total_steps=10**4, steps_per_epoch=100)
  # No two rows are the same.
  rows = [v.config(config).to_json() for v in variants]
  assert len(set(rows)) == len(rows)
  if name in ("depth", "fig7_depth"):
    depths = {row[2][0][1] for row in config.tune.variants}
    assert depths == ({1, 3, 6, 9, 12} if vit.depth == 12 else {1, 2, 3, 5, 6})


def test_an_ablation_keeps_to_a_method_and_an_unknown_one_is_one_line(root):
  config = load(root, "ablation", "location,method=vpt_deep,task=svhn")
  assert config.task == "svhn"
  assert [label for label, _, _ in config.tune.variants] == [
    "vpt_deep prepend",
    "vpt_deep add",
    "vpt_deep add-1",
  ]
  with pytest.raises(ValueError, match="table5 is an ablation of linear, insvp, "):
    load(root, "ablation", "table5,method=lora")
  with pytest.raises(ValueError, match="unknown ablation 'tabel5'; .*table5, fig7_len"):
    load(root, "ablation", "tabel5,task=digits")


def test_the_docs_have_all_ablations(root):
  lines = (root / "docs" / "training.md").read_text().splitlines()
  rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", "\n".join(lines), re.M))
  path = root / "configs" / "ablation.py"
  spec = importlib.util.spec_from_file_location("ablation", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  assert rows == {name: doc for name, (_, doc) in module.ABLATIONS.items()}
  assert list(rows) == list(ABLATIONS)


@pytest.mark.parametrize(
  "key, value, expected",
  [
    ("resize", "longer", "'shorter' or 'none'"),
    ("scales", (), "some numbers in"),
    ("scales", (1.0, 0.0), "some numbers in"),
    ("train_scales", (1.0,), "2 numbers in"),
    ("train_scales", (2.0, 0.5), "the least factor first"),
    ("aux_blocks", (1, 2.5), "numbers of blocks"),
    ("max_share", 1.5, r"in \[0, 1\]"),
  ],
)
def test_what_segmentation_cannot_be_is_named(key, value, expected):
  config = defaults()
  config.segment[key] = value
  with pytest.raises(ValueError, match=f"config.segment.{key} .*expected {expected}"):
    config_checks.validate(config)


def test_segmentation_is_published_on_ade20k_alone(root):
  own, published = load(root, "segment", "root=x"), load(root, "segment", "ade20k")
  assert own.task == published.task == "segment_folder"
  assert (own.data.reduce_zero_label, published.data.reduce_zero_label) == (False, True)
  assert (published.image_size, published.total_steps) == (512, 160_000)
  assert (own.segment.photometric, published.segment.photometric) == (False, True)
  # mmsegmentation's: the head from 1e-2 to 1e-4 by a power of 0.9.
  schedule = optim.create_schedule(
    published.optim, total_steps=160_000, steps_per_epoch=1263
  )
  lrs = [published.optim.head_lr * float(schedule(s)) for s in (0, 80_000, 160_000)]
  assert lrs == pytest.approx([1e-2, 9.9e-3 * 0.5**0.9 + 1e-4, 1e-4])


def test_these_are_all_shipped_configs(root):
  assert sorted(p.stem for p in (root / "configs").glob("*.py")) == sorted(CONFIGS)


@pytest.mark.parametrize("method", ["vp", "ilm_vp", "autovp"])
@pytest.mark.parametrize("backbone", ["augreg_b16_i21k", "boxed"])
def test_the_pixel_methods_as_published_and_as_ours(root, method, backbone):
  args = f"method={method},backbone={backbone}"
  for options in ("", ",published=no", ",search=yes"):
    config = load(root, "pixels", args + options)
    config_checks.validate(config)
    optim.create_schedule(config.optim, total_steps=10**4, steps_per_epoch=100)
    is_ours = options == ",published=no"
    assert (config.optim.wd, config.batch_size) == (0.0, 128)
    assert bool(config.tune.lr) == bool(config.tune.seeds) == is_ours
    expected = {"vp": (40.0, 1000.0)}.get(method, (config.optim.lr, 200.0))
    assert is_ours or (config.optim.lr, config.total_epochs) == expected
    vit = create_backbone(
      config.backbone.name, config.image_size, config_lib.backbone_kwargs(config)
    )
    points = trials.points(trials.grid_of(config, default=False))
    searched = method == "autovp" and options == ",search=yes"
    assert len(points) == (18 if searched else len(config.tune.lr) or 1)
    for point in points:
      kwargs = config_lib.method_kwargs(trials.at(config, **point))
      created = methods.create_method(method, vit.spec, 10, **kwargs)
      assert created.reads_source_head() == (method != "vp" or not is_ours)
  with pytest.raises(ValueError, match="published is 'maybe', expected yes or no"):
    load(root, "pixels", "published=maybe")


def test_vtab_takes_a_task_or_a_group(root):
  assert load(root, "vtab").task == "cifar100"
  assert load(root, "vtab", "task=svhn,method=linear").task == "svhn"
  assert load(root, "vtab", "task=svhn,method=linear").method == "linear"
  assert tasks.GROUPS[load(root, "vtab", "task=all").task] == tuple(VTAB)
  assert load(root, "vtab", "task=natural").task in tasks.GROUPS


VTAB = [name for name, task in tasks.TASKS.items() if task.benchmark == "vtab"]


@pytest.mark.parametrize("name", tasks.TASKS)
def test_every_task_has_a_config(root, name):
  benchmark, _, short = name.partition("_")
  if tasks.TASKS[name].benchmark == "vtab":
    config = load(root, "vtab", f"task={name}")
  elif benchmark == "cifar100":
    config = load(root, "cifar100_lt", f"imbalance={short.removeprefix('lt')}")
  else:
    config = load(root, benchmark, f"task={short}")
  assert config.task == name
  # Their choice of training images is one that the task has.
  tasks.TASKS[name].subset(config.data.subset)


@pytest.mark.parametrize("name", tasks.GROUPS["hta"])
def test_the_released_recipe_of_each_hta_task_is_valid(root, name):
  short = name.removeprefix("hta_")
  config = load(root, "hta", f"task={short},subset=insvp_release")
  config_checks.validate(config)
  assert config.insvp.preset == "release" and config.seed == 3407
  assert not any(config.tune[key] for key in ("methods", "lr", "wd", "seeds"))
  assert tasks.TASKS[name].subset(config.data.subset).retrain is False
  with pytest.raises(ValueError, match="task is 'all'.*cifar100"):
    load(root, "hta", "task=all,subset=insvp_release")

"""The whole configuration with its defaults.

A file in `configs/` calls `defaults()` and changes values; every key can then be
overridden on the command line as `--config.section.key=value`. A value of None
means "what the method, the backbone or its release says". `config_checks` says which
values are right.
"""

from collections.abc import Mapping
import json
import math
import re
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from insvp_jax import trees

METHOD_SECTIONS = ("insvp", "vpt_shallow", "vpt_deep")
# What may change between a run and its resumption; all else shapes the result.
MAY_CHANGE = (
  r"(tune|plan)/.*|eval_batch_size|(log|eval|checkpoint)_every_.*|tensorboard|multihost|"
  r"prompt_images|profile|keep_checkpoints|"
  r"data/(root|cache_dir|data_dir|lists)|backbone/(weights|remat|fsdp)"
)
# What may differ between the processes of one run: where a host has its files.
PER_HOST = r"data/(root|cache_dir|data_dir|lists)|backbone/weights"


def defaults() -> ConfigDict:
  """Returns the complete, locked configuration."""
  config = ConfigDict()
  config.task = "digits"
  config.method = "insvp"
  config.seed = 0
  config.batch_size = 64
  config.eval_batch_size = 256
  config.total_epochs = 100.0
  config.total_steps = 0  # 0: from total_epochs
  config.image_size = 0  # 0: the backbone's own
  config.head_init = "torch"
  # 0: as many columns as the task has classes. More: so that the tasks of a suite share
  # what is compiled; those without a class take no part in anything.
  config.head_width = 0
  # Where nothing before the head trains, compute features once instead of each step.
  config.cache_features = True
  # Steps taken in one call, where the training data are on the device; 1: each step is
  # a program of its own; 0: automatic. Calls of 2 and of 200 steps give the same bits.
  config.steps_per_call = 0
  config.backbone = _backbone()
  config.insvp = _insvp()
  config.vpt_shallow = _vpt()
  config.vpt_deep = _vpt()
  config.vpt_deep.prompted_blocks = placeholder(int)
  config.data = _data()
  config.optim = _optim()
  config.loss = _loss()
  config.tune = _tune()
  config.plan = _plan()
  config.log_every_steps = 50
  config.eval_every_epochs = 0.0  # 0: at the end only
  config.checkpoint_every_epochs = 0.0  # 0: at the end only
  config.keep_checkpoints = 2  # the newest ones; with 1 a damaged one is the end
  config.tensorboard = True
  config.prompt_images = 0  # how many test images to draw InsVP's prompts for
  config.profile = ""  # "10:15": a trace of these steps, into <workdir>/profile
  config.multihost = placeholder(bool)  # None: where a cluster is detected
  return config.lock()


def published() -> ConfigDict:
  """Returns the defaults with what the papers' protocols share.

  ViT-B/16 pre-trained on ImageNet-21k at 224 px, 100 epochs in batches of 64, of which
  10 warm up, and a grid of lr and wd.
  """
  config = defaults()
  config.backbone.name = "vit_b16_i21k"
  config.image_size = 224
  config.batch_size = 64
  config.total_epochs = 100.0
  config.optim.warmup_epochs = 10.0
  config.tune.lr = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
  config.tune.wd = (1e-4, 1e-2)
  return config


def _backbone() -> ConfigDict:
  section = ConfigDict()
  section.name = "boxed"  # a variant ("B/16") or a release ("vit_b16_i21k")
  section.weights = ""  # "": the release's; a path or name; "random"
  section.init = "default"  # of random weights: "default" or "mimetic"
  for field in ("width", "depth", "mlp_dim", "num_heads", "patch_size"):
    section[field] = placeholder(int)
  for field in ("pool", "gelu"):
    section[field] = placeholder(str)
  section.dtype = "float32"
  section.remat = False
  section.scan = False
  section.fused_attention = False  # True: cuDNN's, on NVIDIA GPUs in bfloat16
  section.skip_unread = True  # False: compute tokens that the pool does not read
  section.frozen_dtype = "float32"
  section.fsdp = 1  # over how many devices frozen weights are split; set scan too
  return section


def _insvp() -> ConfigDict:
  section = ConfigDict()
  section.preset = "paper"
  for field in ("use_patch", "use_global", "use_common", "use_specific"):
    section[field] = placeholder(bool)
  for field in ("train_specific", "simam"):
    section[field] = placeholder(bool)
  for field in ("prompt_length", "prompted_blocks", "patch_hidden", "global_hidden"):
    section[field] = placeholder(int)
  for field in ("global_kernels", "global_dilations", "specific_kernels"):
    section[field] = placeholder(tuple)
  for field in ("image_fusion", "feature_fusion"):
    section[field] = placeholder(tuple)
  for field in ("specific_activation", "specific_input", "prompt_init", "conv"):
    section[field] = placeholder(str)
  for field in ("dropout", "prompt_dropout"):
    section[field] = placeholder(float)
  return section


def _vpt() -> ConfigDict:
  section = ConfigDict()
  section.prompt_length = placeholder(int)
  section.project = placeholder(int)
  section.dropout = placeholder(float)
  return section


def _data() -> ConfigDict:
  section = ConfigDict()
  section.root = ""
  section.preset = "vtab"
  section.train_split = "train"  # or "train_val"
  section.val_fraction = 0.1
  section.test_fraction = 0.2
  section.split_seed = 0
  section.skip_corrupt = False
  section.cache_dir = ""  # of decoded images; "": the default place, "off": none
  section.data_dir = ""  # "": TFDS's default
  section.subset = ""  # which training images; "": the task's first choice
  section.lists = ""  # folder of VPT-style train.json, val.json, test.json
  section.resident_mb = 1024  # splits above stay in their files and are streamed
  return section


def _optim() -> ConfigDict:
  section = ConfigDict()
  section.name = "adamw"
  section.lr = 1e-3
  section.wd = 1e-4
  section.b1 = 0.9
  section.b2 = 0.999
  section.eps = 1e-8
  section.momentum = 0.9
  section.nesterov = False
  section.schedule = "cosine"
  section.warmup_epochs = 0.0
  section.warmup_steps = 0
  section.end_lr_factor = 0.0
  section.grad_clip_norm = 0.0
  section.accumulate_steps = 1
  section.no_decay = ()
  section.lr_scale_by_batch = 0
  return section


def _loss() -> ConfigDict:
  section = ConfigDict()
  section.label_smoothing = 0.0
  section.mixup_alpha = 0.0
  section.cutmix_alpha = 0.0
  section.mix_prob = 0.5
  section.mix_switch_prob = 0.5
  return section


def _tune() -> ConfigDict:
  section = ConfigDict()
  section.methods = ()  # (): config.method alone
  section.lr = ()  # (): no search; one run with config.optim
  section.wd = ()
  section.grid = ConfigDict()  # further numbers, of the methods that have them
  for number in ("dropout", "prompt_dropout", "image_fusion", "feature_fusion"):
    section.grid[number] = ()
  section.seeds = ()  # (): config.seed alone
  section.select = "val"  # what chooses; there is no other
  section.population = 0  # trials that train together; 0: what the memory holds
  return section


def _plan() -> ConfigDict:
  section = ConfigDict()  # of --plan alone; 0: from the task
  section.num_classes = 0
  section.num_train = 0
  return section


def method_kwargs(config: ConfigDict) -> dict[str, Any]:
  """Returns the section of `config.method` without its unset (None) fields."""
  if config.method not in METHOD_SECTIONS:
    return {}
  return {k: v for k, v in config[config.method].items() if v is not None}


def backbone_kwargs(config: ConfigDict) -> dict[str, Any]:
  """Returns the ViT fields that the config sets."""
  section = config.backbone
  fields = ("width", "depth", "mlp_dim", "num_heads", "patch_size", "pool", "gelu")
  fields += ("dtype", "remat", "scan", "skip_unread", "fused_attention")
  return {f: section[f] for f in fields if section[f] is not None}


def profile_steps(config: ConfigDict) -> tuple[int, int] | None:
  """Returns the first and the last step to be profiled; None for none.

  Raises:
    ValueError: `config.profile` is no range of steps.
  """
  if not config.profile:
    return None
  found = re.fullmatch(r"(\d+):(\d+)", config.profile)
  first, last = map(int, found.groups()) if found else (0, 0)
  if not 1 <= first <= last:
    raise ValueError(
      f"config.profile is {config.profile!r}, expected the first and the last step to "
      "be recorded, counted from 1, e.g. '10:15'."
    )
  return first, last


def num_steps(config: ConfigDict, num_examples: int) -> tuple[int, int]:
  """Returns (total steps, steps per epoch); a remainder of an epoch is dropped."""
  steps_per_epoch = num_examples // config.batch_size
  if steps_per_epoch == 0:
    raise ValueError(
      f"config.batch_size is {config.batch_size}, but the training split has only "
      f"{num_examples} images; lower it to at most {num_examples}."
    )
  total = config.total_steps or math.ceil(config.total_epochs * steps_per_epoch)
  return total, steps_per_epoch


def to_dict(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
  """Returns the config as plain JSON values (tuples become lists)."""
  if isinstance(config, ConfigDict):
    config = config.to_dict()
  return json.loads(json.dumps(config))


def difference(
  config: ConfigDict | Mapping[str, Any], stored: Mapping[str, Any]
) -> str:
  """Returns the settings that shape a run's result and are not as stored.

  Args:
    config: of the run to be made.
    stored: of one that was made, from `to_dict`.

  Returns:
    "config.optim.lr is 0.1, was 0.01; config.seed is 1, was 0", or "" where there is
    none.
  """
  before = trees.flatten(stored)
  found = []
  for name, value in trees.flatten(to_dict(config)).items():
    # A setting that is newer than the stored run had no say in it.
    was = before.get(name, value)
    if value != was and not re.fullmatch(MAY_CHANGE, name):
      found.append(f"config.{name.replace('/', '.')} is {value!r}, was {was!r}")
  return "; ".join(found)


def shared_settings(config: ConfigDict) -> dict[str, Any]:
  """Returns the settings that all processes of a run must have alike."""
  flat = trees.flatten(to_dict(config))
  return trees.unflatten(
    {name: v for name, v in flat.items() if not re.fullmatch(PER_HOST, name)}
  )


def parse_arg(arg: str, **known: str) -> dict[str, str]:
  """Returns the "name=value,..." after the colon of `--config=file.py:...`.

  Args:
    arg: the text after the colon.
    **known: the names that a config takes, with their defaults.

  Raises:
    ValueError: a name that the config does not take, or no "=".
  """
  values = dict(known)
  for part in filter(None, arg.split(",")):
    name, equals, value = part.partition("=")
    if not equals or name not in known:
      raise ValueError(
        f"{part!r} after the colon of --config is not one of "
        f"{', '.join(f'{k}=...' for k in known)}.{trees.did_you_mean(name, known)}"
      )
    values[name] = value
  return values

"""The whole configuration: every key, its default and what it is.

A file in `configs/` calls `defaults()` and changes values; every key can then be
overridden on the command line as `--config.section.key=value`, and `--print_config`
prints them all. A value of None means "what the method, the backbone or its release
says". `config_checks` says which values are right.
"""

from collections.abc import Collection, Mapping
import json
import math
import os
import re
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from insvp_jax import trees
from insvp_jax.methods import METHODS, fields, parts_of

# (default, documentation) by key. A type is a None that takes values of that type. The
# methods' sections and `tune.grid` follow from what the methods declare.
_KEYS: dict[str, tuple[Any, str]] = {
  "task": (
    "digits",
    "a task or group of data/tasks.py, digits, folder, segment_folder or cifar10_npz",
  ),
  "method": ("insvp", f"{', '.join(METHODS)}; or several, joined by +"),
  "seed": (0, "seed of initialisation, batches, augmentation and dropout"),
  "batch_size": (64, "training images of a step, over all devices; 0: automatic"),
  # Of parts: other draws of dropout than of the whole batch, and other last bits.
  "microbatch_size": (0, "images of a step computed at once; 0: automatic"),
  "eval_batch_size": (0, "images of a step of evaluation; 0: automatic"),
  "total_epochs": (100.0, "passes over the training images"),
  "total_steps": (0, "train steps; 0: from total_epochs"),
  "image_size": (0, "pixels per side; 0: the backbone's own"),
  "head_init": ("torch", "initialisation of the head: zeros, torch or vpt"),
  "cache_features": (
    True,
    "compute features and routes once, where they do not change",
  ),
  # Calls of 2 and of 200 steps give the same bits; with 1 a step is its own program.
  "steps_per_call": (0, "steps of a call, with data on the device; 0: automatic"),
  "log_every_steps": (50, "train steps from one line of metrics to the next"),
  "eval_every_epochs": (0.0, "epochs between evaluations on val; 0: at the end only"),
  "checkpoint_every_epochs": (0.0, "epochs between checkpoints; 0: at the end only"),
  # With 1 a damaged one is the end.
  "keep_checkpoints": (2, "how many of the newest checkpoints are kept"),
  "tensorboard": (True, "write TensorBoard files beside metrics.jsonl"),
  "wandb": ("", "a project of Weights & Biases, or entity/project; empty: none"),
  "prompt_images": (0, "test images to draw InsVP's prompts for"),
  "profile": ("", 'steps to be recorded in <workdir>/profile, e.g. "10:15"'),
  "multihost": (bool, "join other processes; None: where a cluster is detected"),
  # None is what the backbone's variant or release says.
  "backbone.name": (
    "boxed",
    "a variant (B/16, swin_b), a release, a file, timm/... or hf-hub:...",
  ),
  "backbone.weights": ("", "a path, a name, or random; empty: the release's"),
  "backbone.init": ("default", "how random weights are drawn: default or mimetic"),
  "backbone.width": (int, "token width d; of the first stage"),
  "backbone.depth": (int, "number of blocks l"),
  "backbone.depths": (tuple, "blocks of each stage, of Swin, ConvNeXt and ResNet"),
  "backbone.mlp_dim": (int, "hidden width of the MLP"),
  "backbone.num_heads": (int, "attention heads; of the first stage"),
  "backbone.patch_size": (int, "pixels per side of a patch"),
  "backbone.window": (int, "tokens per side of a window, of Swin"),
  "backbone.pool": (str, "what becomes the feature: tok, gap or map"),
  "backbone.gelu": (str, "form of the activation: tanh, exact or quick"),
  "backbone.mlp": (str, "gelu, or swiglu: a gated MLP"),
  "backbone.class_token": (
    bool,
    "whether there is a class token; None: if pooled",
  ),
  "backbone.registers": (int, "further tokens without a position"),
  "backbone.layer_scale": (bool, "keep LayerScale; None: where its branch is trained"),
  "backbone.pre_norm": (bool, "normalise the tokens before the first block"),
  "backbone.fc_norm": (bool, "normalise the feature in place of the tokens"),
  "backbone.norm_eps": (float, "epsilon of the norms"),
  "backbone.projection": (int, "width of a last layer, as CLIP's; 0: none"),
  "backbone.head_classes": (
    int,
    "classes of the head that the backbone was trained with, for methods that read it",
  ),
  "backbone.dtype": ("float32", "type of the computation: float32 or bfloat16"),
  "backbone.remat": (False, "recompute blocks in the backward pass: saves memory"),
  "backbone.scan": (False, "compile one block for all: saves compile time"),
  "backbone.fused_attention": (False, "attend by cuDNN: NVIDIA GPUs, in bfloat16"),
  "backbone.skip_unread": (True, "do not compute tokens that the pool does not read"),
  "backbone.frozen_dtype": (
    "float32",
    "type of frozen weights: float32, bfloat16 or int8",
  ),
  "backbone.fsdp": (1, "devices that frozen weights are split over; set scan too"),
  # Where the images come from and how they become inputs.
  "data.root": ("", "folder or .zip of the images; empty: from TFDS"),
  "data.preset": (
    "",
    "pixels: vtab, vpt, insvp_release, cifar, modern, imagenet, clip or siglip; empty: "
    "as the backbone's",
  ),
  "data.train_split": ("train", "the split that trains: train or train_val"),
  "data.val_fraction": (0.1, "share of a folder's train for val, if it has no val"),
  "data.test_fraction": (0.2, "share of a folder's train for test, if it has no test"),
  "data.split_seed": (0, "seed of the splits that are drawn, not published"),
  "data.skip_corrupt": (False, "leave unreadable images of a folder out"),
  "data.max_pixels": (89_478_485, "pixels of the largest image that is decoded"),
  "data.max_file_mb": (512, "MiB of the largest image file that is read"),
  "data.max_16bit": (0, "what is white in 16-bit images, e.g. 4095; 0: 65535"),
  "data.cache_dir": ("", "folder of decoded images; empty: the default; off: none"),
  "data.data_dir": ("", "where TFDS has its data sets; empty: its default"),
  "data.subset": ("", "which training images; empty: the task's first choice"),
  "data.shots": (0, "training images of each class, drawn by split_seed; 0: all"),
  "data.fraction": (1.0, "share of each class's training images, drawn by split_seed"),
  "data.lists": ("", "folder of VPT-style train.json, val.json and test.json"),
  "data.duplicates": ("warn", "pictures in two splits or classes: warn, drop or error"),
  "data.splits_json": ("", "a run's splits.json, in place of splits that are drawn"),
  "data.classes": ("", "file that names a mask's classes: .txt, .csv or .json"),
  "data.ignore_label": (255, "value of a mask's pixels that do not count; -1: none"),
  "data.reduce_zero_label": (False, "0 of a mask does not count, and 1 is the first"),
  "data.labels": ("", "CSV of paths below root and labels; empty: folders are classes"),
  "data.image_column": ("", "the column of paths, or of images; empty: found"),
  "data.label_column": ("", "the column of labels; empty: found"),
  "data.split_column": ("", "the column of train, val or test; empty: found, if any"),
  "data.ordered": (False, "the classes are grades: tell the quadratic kappa, too"),
  "data.sampling": ("uniform", "an epoch shows all images, or balanced: classes alike"),
  "data.resident_mb": (1024, "MiB; larger splits stay in their files and are streamed"),
  # The optimizer of the trainable parameters, and its schedule.
  "optim.name": ("adamw", "adamw or sgd"),
  "optim.lr": (1e-3, "learning rate at the schedule's peak"),
  "optim.head_lr": (0.0, "the head's own learning rate at the peak; 0: optim.lr"),
  "optim.wd": (1e-4, "weight decay"),
  "optim.b1": (0.9, "AdamW's decay of the mean of gradients"),
  "optim.b2": (0.999, "AdamW's decay of the mean of squared gradients"),
  "optim.eps": (1e-8, "AdamW's term in the denominator"),
  "optim.momentum": (0.9, "SGD's momentum"),
  "optim.nesterov": (False, "SGD with Nesterov's momentum"),
  "optim.schedule": ("cosine", "constant, cosine[_epochwise], multistep, polynomial"),
  "optim.warmup_epochs": (0.0, "epochs of linear warm-up; or set warmup_steps"),
  "optim.warmup_steps": (0, "train steps of linear warm-up"),
  "optim.end_lr_factor": (0.0, "the last lr of cosine and polynomial, per peak lr"),
  "optim.power": (0.9, "of the polynomial schedule"),
  "optim.grad_clip_norm": (0.0, "highest global norm of the gradient; 0: any"),
  "optim.accumulate_steps": (1, "train steps whose mean gradient makes one update"),
  "optim.no_decay": ((), "regular expressions over parameters without weight decay"),
  "optim.lr_scale_by_batch": (0, "multiply lr by images per update / this; 0: do not"),
  # Targets and the mixing of images.
  "loss.label_smoothing": (0.0, "share of a target that is spread over all classes"),
  "loss.class_weights": (False, "weigh the loss so that all classes count alike"),
  "loss.mixup_alpha": (0.0, "alpha of mixup's Beta distribution; 0: no mixup"),
  "loss.cutmix_alpha": (0.0, "alpha of cutmix's Beta distribution; 0: no cutmix"),
  "loss.mix_prob": (0.5, "probability that a batch is mixed at all"),
  "loss.mix_switch_prob": (0.5, "probability of cutmix where mixup is on too"),
  # Segmentation: the head, how it is trained, and how images of any size are covered.
  "segment.channels": (256, "channels of the convolutions of SETR's head"),
  "segment.aux_blocks": (tuple, "blocks that auxiliary heads see; None: as SETR's"),
  "segment.aux_weight": (0.4, "weight of the loss of each auxiliary head"),
  "segment.resize": (
    "shorter",
    "shorter: an image's shorter side becomes image_size; none: images as they are",
  ),
  "segment.train_scales": ((0.5, 2.0), "least and greatest factor of scale jitter"),
  "segment.max_share": (0.75, "most that a class may have of a training crop"),
  "segment.flip": (True, "mirror half of the training crops"),
  "segment.photometric": (False, "change brightness, contrast and colours of crops"),
  "segment.stride": (0, "pixels between windows of evaluation; 0: 2/3 of image_size"),
  "segment.scales": ((1.0,), "factors of an image's sides in evaluation"),
  "segment.flips": (False, "evaluate images mirrored, too"),
  "segment.batch_size": (8, "windows of a step of evaluation, over all devices"),
  # The search: which values are tried, and what is trained with the chosen ones.
  "tune.methods": ((), "methods side by side; empty: method alone"),
  "tune.variants": (
    (),
    "rows in place of methods: (label, method, ((key, value), ...)) each",
  ),
  "tune.lr": ((), "learning rates to try; empty: see --mode"),
  "tune.wd": ((), "weight decays to try; empty: see --mode"),
  "tune.fields": (
    (),
    "fields of methods to try, e.g. (('autovp.mapping', ('full', 'frequency')),)",
  ),
  "tune.seeds": ((), "seeds of the final runs; empty: seed alone"),
  "tune.select": ("val", "the split that chooses; there is no other"),
  "tune.population": (0, "trials that train together; 0: what the memory holds"),
  # What --plan cannot know without the data.
  "plan.num_classes": (0, "classes, for --plan alone; 0: the task's"),
  "plan.num_train": (0, "training images, for --plan alone; 0: the task's"),
}
# What frozen weights may be stored as; "int8" is of kernels, see `models.quantized`.
FROZEN_DTYPES = ("float32", "bfloat16", "int8")
# The largest of steps, sizes and counts, which are int32 on the devices.
MAX_INT = 2**31 - 1
# Two seeds are two runs: all of a seed is used, and it has 32 bits.
MAX_SEED = 2**32 - 1
LARGEST_AUTOMATIC_BATCH = 32
# The keys of the section backbone that are fields of a backbone.
_BACKBONE_FIELDS = (
  *("width", "depth", "mlp_dim", "num_heads", "patch_size", "pool", "gelu"),
  *("mlp", "class_token", "registers", "layer_scale", "pre_norm", "fc_norm"),
  *("norm_eps", "projection"),
  *("dtype", "remat", "scan", "skip_unread", "fused_attention", "head_classes"),
  *("depths", "window"),
)
# What may change between a run and its resumption; all else shapes the result. Of
# another microbatch_size dropout draws otherwise, as on another kind of device.
MAY_CHANGE = (
  r"(tune|plan)/.*|(eval_|micro)batch_size|segment/(stride|scales|flips|batch_size)|"
  r"(log|eval|checkpoint)_every_.*|tensorboard|multihost|"
  r"wandb|prompt_images|profile|keep_checkpoints|"
  r"data/(max_pixels|max_file_mb|ordered|classes)|"
  r"data/(root|labels|(image|label|split)_column|cache_dir|data_dir|lists|splits_json)|"
  r"backbone/(weights|remat|fsdp)"
)
# What may differ between the processes of one run: where a host has its files.
PER_HOST = (
  r"data/(root|labels|cache_dir|data_dir|lists|splits_json|classes)|backbone/weights"
)


def method_sections() -> tuple[str, ...]:
  """Returns the methods that have fields, and so a section of that name."""
  return tuple(n for n, method in METHODS.items() if fields.declared(method))


def _method_keys() -> dict[str, tuple[Any, str]]:
  """Returns the keys that follow from the methods, in the form of `_KEYS`."""
  keys: dict[str, tuple[Any, str]] = {}
  for section in method_sections():
    types = fields.value_types(METHODS[section])
    for name, field in fields.declared(METHODS[section]).items():
      # The preset says what None means, so it is never None itself.
      default = field.default if name == fields.PRESET else types[name]
      doc = field.doc if name == fields.PRESET else field.doc_line()
      keys[f"{section}.{name}"] = (default, doc)
  for method in METHODS.values():
    for name in method.HPARAMS:
      keys[f"tune.grid.{name}"] = ((), f"values of a method's {name} to try")
    for name in method.MASKS:
      doc = f"percents of each row of {name} to try to prune; None: see --mode"
      keys[f"tune.prune.{name}"] = (tuple, doc)
  return keys


def keys() -> dict[str, tuple[Any, str]]:
  """Returns (default, documentation) of every key; a type for a None of that type."""
  return {**_KEYS, **_method_keys()}


def defaults() -> ConfigDict:
  """Returns the complete, locked configuration."""
  return complete(ConfigDict())


def complete(config: ConfigDict) -> ConfigDict:
  """Adds the keys that a config lacks, such as those of a method of the user's own.

  Returns:
    The config, locked.
  """
  with config.unlocked():
    for key, (default, _) in keys().items():
      *path, name = key.split(".")
      section = config
      for part in path:
        if part not in section:
          section[part] = ConfigDict()
        section = section[part]
      if name not in section:
        section[name] = placeholder(default) if isinstance(default, type) else default
  return config.lock()


def format_keys(config: ConfigDict) -> str:
  """Returns a line for each key of a config: its value and what it is."""
  values = trees.flatten(config.to_dict())
  values = {name.replace("/", "."): value for name, value in values.items()}
  docs = {key: doc for key, (_, doc) in keys().items()}
  # In the order of the table; what a config file has added comes last.
  names = [key for key in docs if key in values]
  names += [name for name in values if name not in docs]
  lines = []
  for name in names:
    doc = docs.get(name, "of this config file alone")
    lines.append(f"{f'config.{name} = {values[name]!r}':<44}  # {doc}")
  return "\n".join(lines)


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


def method_kwargs(config: ConfigDict) -> dict[str, Any]:
  """Returns the section of `config.method` without its unset (None) fields.

  Of several methods it is {method: its fields}.
  """
  parts = {
    part: {k: v for k, v in config.get(part, {}).items() if v is not None}
    for part in parts_of(config.method)
  }
  return parts if len(parts) > 1 else parts[config.method]


def backbone_kwargs(config: ConfigDict) -> dict[str, Any]:
  """Returns the backbone's fields that the config sets."""
  section = config.backbone
  return {f: section[f] for f in _BACKBONE_FIELDS if section[f] is not None}


def profile_steps(config: ConfigDict) -> tuple[int, int] | None:
  """Returns the first and the last step to be profiled; None for none.

  Raises:
    ValueError: `config.profile` is no range of steps.
  """
  if not config.profile:
    return None
  match = re.fullmatch(r"([0-9]{1,10}):([0-9]{1,10})", config.profile)
  first, last = map(int, match.groups()) if match else (0, 0)
  if not 1 <= first <= last:
    raise ValueError(
      f"config.profile is {config.profile!r}, expected the first and the last step to "
      "be recorded, counted from 1, e.g. '10:15'."
    )
  return first, last


def automatic_batch_size(num_examples: int, num_devices: int = 1) -> int:
  """Returns the batch size that `batch_size = 0` stands for.

  It is 32, or what gives an epoch at least 4 steps where there are fewer than 128
  images: the largest power of two that does. Several devices share each batch evenly:
  there it is a power of two for each of them, at least one image.

  Digits, linear, 20 epochs, lr 0.01, three draws of 10, 20 and 40 images: 41, 49 and
  60% with four steps an epoch, 28, 37 and 47% with one.

  Args:
    num_examples: training images, n.
    num_devices: that a batch is split over.

  Raises:
    ValueError: there are fewer images than devices.
  """
  if num_examples < num_devices:
    raise ValueError(
      f"the training split has {num_examples} images, fewer than the {num_devices} "
      "devices that share each batch. Show the run fewer devices, e.g. by "
      "CUDA_VISIBLE_DEVICES=0, or add images."
    )
  size = num_devices
  while 2 * size <= min(LARGEST_AUTOMATIC_BATCH, num_examples // 4):
    size *= 2
  return size


def num_steps(config: ConfigDict, num_examples: int) -> tuple[int, int]:
  """Returns (total steps, steps per epoch); a remainder of an epoch is dropped.

  Raises:
    ValueError: a batch is larger than the split, or the steps cannot be counted.
  """
  batch_size = config.batch_size or automatic_batch_size(num_examples)
  steps_per_epoch = num_examples // batch_size
  if steps_per_epoch == 0:
    raise ValueError(
      f"config.batch_size is {batch_size}, but the training split has only "
      f"{num_examples} images; lower it to at most {num_examples}, or set it to 0, "
      f"which is {automatic_batch_size(num_examples)} here."
    )
  total = config.total_steps or math.ceil(config.total_epochs * steps_per_epoch)
  if total > MAX_INT:
    raise ValueError(
      f"config.total_epochs is {config.total_epochs:g}, which is {total:.3g} steps, "
      f"expected at most {MAX_INT}."
    )
  return total, steps_per_epoch


def to_dict(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
  """Returns the config as plain JSON values (tuples become lists)."""
  if isinstance(config, ConfigDict):
    config = config.to_dict()
  return json.loads(json.dumps(config))


def stored(config: ConfigDict) -> dict[str, Any]:
  """Returns `to_dict` with whole paths: a run may be read again from elsewhere."""
  values = to_dict(config)
  for name in ("root", "labels", "data_dir", "lists", "splits_json", "classes"):
    path = values["data"][name]
    if path and "://" not in path:
      values["data"][name] = os.path.abspath(os.path.expanduser(path))
  return values


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
  changes = []
  for name, value in trees.flatten(to_dict(config)).items():
    # A setting that is newer than the stored run had no say in it.
    was = before.get(name, value)
    if value != was and not re.fullmatch(MAY_CHANGE, name):
      changes.append(f"config.{name.replace('/', '.')} is {value!r}, was {was!r}")
  return "; ".join(changes)


# How long a run is.
_LENGTH = ("total_epochs", "total_steps")


def prolongs(config: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
  """Returns whether a run is a stored one, but longer.

  With a constant lr every step is then the same one, so that the run can go on where it
  ended. Other schedules end with the run: a longer one differs from the first step on.

  Args:
    config: of the run to be made, from `to_dict`.
    stored: of the one that was made.
  """
  if not _is_longer(config, stored) or config["optim"]["schedule"] != "constant":
    return False
  return not difference({**config, **{k: stored[k] for k in _LENGTH}}, stored)


def why_not_longer(config: Mapping[str, Any], stored: Mapping[str, Any]) -> str:
  """Returns why a run cannot be prolonged; "" where that is not what is asked for."""
  schedule = config["optim"]["schedule"]
  if not _is_longer(config, stored) or schedule == "constant":
    return ""
  return (
    f"the lr's schedule {schedule!r} ends with the run, so a longer run is another one "
    "from its first step (with optim.schedule=constant it could be prolonged)"
  )


def _is_longer(config: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
  lengths = [(c.get("total_steps"), c.get("total_epochs")) for c in (config, stored)]
  if any(None in length for length in lengths):
    return False
  (steps, epochs), (steps_before, epochs_before) = lengths
  if steps and steps_before:
    return steps > steps_before
  return not steps and not steps_before and epochs > epochs_before


def shared_settings(config: ConfigDict) -> dict[str, Any]:
  """Returns the settings that all processes of a run must have alike."""
  flat = trees.flatten(to_dict(config))
  return trees.unflatten(
    {name: v for name, v in flat.items() if not re.fullmatch(PER_HOST, name)}
  )


# What every config takes after the colon of --config, "" where it is not given.
ARGS = ("task", "method", "root", "seed", "backbone")


def parse_arg(arg: str, **more: str) -> dict[str, str]:
  """Returns what stands after the colon of `--config=vtab:svhn,method=insvp`.

  Args:
    arg: "name=value,..."; a first part without "=" is the task.
    **more: names that this config takes besides `ARGS`, or other defaults of these.

  Raises:
    ValueError: a name that the config does not take.
  """
  values = dict.fromkeys(ARGS, "") | more
  for i, part in enumerate(filter(None, arg.split(","))):
    name, equals, value = part.partition("=")
    if i == 0 and not equals:
      name, value = "task", part
    elif not equals or name not in values:
      raise ValueError(
        f"{part!r} after the colon of --config is not one of "
        f"{', '.join(f'{k}=...' for k in values)}.{trees.did_you_mean(name, values)}"
      )
    values[name] = value
  return values


def select(config: ConfigDict, arg: Mapping[str, str]) -> ConfigDict:
  """Sets method, root, seed and backbone as a config's argument says; returns it.

  A config that compares several methods, or trains with several seeds, keeps to the one
  that is given. A backbone comes with the image size that it was trained at.

  Args:
    config: with its own values, the task among them.
    arg: from `parse_arg`.

  Raises:
    ValueError: an unknown method, or a seed that is no whole number.
  """
  if arg["method"]:
    parts_of(arg["method"])
    config.method = arg["method"]
    config.tune.methods = (arg["method"],) if config.tune.methods else ()
  if arg["root"]:
    config.data.root = arg["root"]
  if arg["seed"]:
    if not re.fullmatch(r"[0-9]{1,10}", arg["seed"]) or int(arg["seed"]) > MAX_SEED:
      raise ValueError(
        f"seed is {arg['seed']!r}, expected a whole number, 0 to {MAX_SEED}."
      )
    config.seed = int(arg["seed"])
    config.tune.seeds = (config.seed,) if config.tune.seeds else ()
  if arg["backbone"]:
    config.backbone.name = arg["backbone"]
    config.image_size = 0
  return config


# {key: the list of `tune` that stands in its place in a search}.
_LISTS = {"method": "methods", "seed": "seeds", "optim.lr": "lr", "optim.wd": "wd"}


def apply_overrides(config: ConfigDict, keys: Collection[str], tunes: bool) -> None:
  """Lets a key of the command line hold where a search would not have looked at it.

  A config that compares several methods trains the one that `--config.method=x` names;
  so do the seed, lr and wd.

  Args:
    config: with the overrides applied; changed in place.
    keys: that were overridden, such as "optim.lr".
    tunes: whether there is a search even where the lists of `config.tune` are empty.

  Raises:
    ValueError: both a key and its list were overridden.
  """
  for key, name in _LISTS.items():
    if key not in keys:
      continue
    if f"tune.{name}" in keys:
      if config.tune[name]:
        raise ValueError(
          f"both --config.{key} and --config.tune.{name} were given; leave one out."
        )
      continue
    section, _, field = key.rpartition(".")
    value = (config[section] if section else config)[field]
    if config.tune[name] or (tunes and name in ("lr", "wd")):
      config.tune[name] = (value,)
  # What is no pair is named by `config_checks`, later.
  pairs = [pair for pair in config.tune.fields if isinstance(pair, tuple) and pair]
  if overridden := [name for name, *_ in pairs if name in keys]:
    if "tune.fields" in keys:
      raise ValueError(
        f"both --config.{overridden[0]} and a list of its values in "
        "--config.tune.fields were given; leave one out."
      )
    rest = [pair for pair in pairs if pair[0] not in overridden]
    config.tune.fields = tuple(rest)

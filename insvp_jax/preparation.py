"""What several runs on one task and backbone share: data, weights, the program."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from ml_collections import ConfigDict

from insvp_jax import config as config_lib
from insvp_jax import partition
from insvp_jax import program as program_lib
from insvp_jax.data import TaskData, load_data
from insvp_jax.data.preprocess import get_preset
from insvp_jax.models.classifier import create_backbone
from insvp_jax.program import Program


@dataclasses.dataclass(frozen=True)
class Prepared:
  """What several runs on one task and backbone share.

  Attributes:
    data: the decoded task.
    weights: the backbone's parameters; None for random ones.
    backbone: the backbone's identity, as stored with each run.
    program: the compiled program.
  """

  data: TaskData
  weights: Mapping[str, Any] | None
  backbone: Mapping[str, Any]
  program: Program


def prepare(
  config: ConfigDict, like: Prepared | None = None, numbers: tuple[str, ...] = ()
) -> Prepared:
  """Reads data and weights and builds the program; trains nothing.

  Args:
    config: the whole configuration.
    like: a preparation for the same task and backbone, whose data and weights are
      used again (another method, another training split).
    numbers: the method's fields that shall be data; see `create_program`.

  Raises:
    ValueError, FileNotFoundError: bad input; see the message.
  """
  config_lib.validate(config)
  get_preset(config.data.preset)
  mesh = partition.create_mesh(fsdp=config.backbone.fsdp)
  partition.check_batch_size(config.batch_size, mesh)
  backbone = create_backbone(
    config.backbone.name, config.image_size, config_lib.backbone_kwargs(config)
  )
  data = like.data if like else load_data(config.task, config.data, backbone.image_size)
  split = config.data.train_split
  if split not in data.splits:
    raise ValueError(
      f"the task {data.name!r} has no split {split!r}, only "
      f"{', '.join(data.splits)}; set config.data.train_split to one of them."
    )
  program = program_lib.create_program(
    config, data.num_classes, len(data.splits[split]), mesh, numbers
  )
  if like:
    return Prepared(data, like.weights, like.backbone, program)
  weights, identity = program_lib.load_weights(config, program.model)
  return Prepared(data, weights, identity, program)

"""What several runs on one task and backbone share: data, weights, the program."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from jaxtyping import Array
from ml_collections import ConfigDict

from insvp_jax import config as config_lib
from insvp_jax import config_checks
from insvp_jax.data import TaskData, load_data
from insvp_jax.data.preprocess import get_preset
from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.models.classifier import create_backbone
from insvp_jax.train import evaluate, parameters
from insvp_jax.train import program as program_lib
from insvp_jax.train.features import FeatureCache, eval_batches
from insvp_jax.train.program import Program


@dataclasses.dataclass(frozen=True)
class Prepared:
  """What several runs on one task and backbone share.

  Attributes:
    data: the decoded task.
    weights: the backbone's parameters; None for random ones.
    backbone: the backbone's identity, as stored with each run.
    program: the compiled program.
    cache: features of the splits, where they are constant.
  """

  data: TaskData
  weights: Mapping[str, Any] | None
  backbone: Mapping[str, Any]
  program: Program
  cache: FeatureCache = dataclasses.field(default_factory=FeatureCache)

  def features(
    self, config: ConfigDict, split: str, params: Mapping[str, Any]
  ) -> dict[str, Array] | None:
    """Returns a split's features and labels; None where they are not cached.

    Args:
      config: of the run, or of any of a population that shares the backbone.
      split: its name.
      params: whose "backbone" is read.
    """
    seed = config.seed if self.weights is None else None
    return self.cache.arrays(
      config, self.program, self.data.splits[split], params["backbone"], seed
    )

  def evaluate(
    self, config: ConfigDict, split: str, params: Mapping[str, Any]
  ) -> dict[str, float | int]:
    """Returns accuracy and loss on one split; see `evaluate.evaluate`."""
    arrays = self.features(config, split, params)
    batches = eval_batches(config, self.program, self.data.splits[split], arrays)
    numbers = program_lib.numbers_of(config, self.program)
    return evaluate.evaluate(
      lambda params, batch: self.program.eval_step(params, batch, numbers),
      params,
      batches,
    )


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
  config_checks.validate(config)
  get_preset(config.data.preset)
  mesh = mesh_lib.create_mesh(fsdp=config.backbone.fsdp)
  mesh_lib.check_batch_size(config.batch_size, mesh)
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
    return Prepared(data, like.weights, like.backbone, program, like.cache)
  weights, identity = parameters.load_weights(config, program.model)
  return Prepared(data, weights, identity, program)

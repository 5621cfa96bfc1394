"""What comes before the first train step: programs and modules are counted, no seconds.

A program costs tens of milliseconds even where its compiled form is read from a cache,
and an operation outside of `jax.jit` is a program of its own.
"""

import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_training
from tiny_training import prepare, tiny_config

from insvp_jax import trees
from insvp_jax.data import resident
from insvp_jax.distributed import mesh as mesh_lib
from insvp_jax.logs.writers import Writers
from insvp_jax.search import outlook
from insvp_jax.train import program as program_lib
from insvp_jax.train import state as state_lib
from insvp_jax.train import steps, trainer

# In the order in which they are needed; the last is the learning rate, as it is logged.
PROGRAMS = ("draw", "new_state", "multi_step", "schedule")
# What the first step does not need.
LATE = (
  *("PIL", "gradio", "huggingface_hub", "matplotlib", "onnx", "pandas", "safetensors"),
  *("scipy", "sklearn", "tensorboard", "tensorboardX", "tensorflow", "torch", "wandb"),
)


@pytest.fixture
def compiled(caplog):
  """Returns what gives the names of the programs compiled since it was called last."""
  # Of programs that other tests made.
  tiny_training.PROGRAMS.clear()

  def names() -> list[str]:
    texts = [record.getMessage() for record in caplog.records]
    caplog.clear()
    found = (re.match(r"Compiling (?:jit\()?([^ )]+)", text) for text in texts)
    return [match[1] for match in found if match]

  with caplog.at_level("WARNING", logger="jax"), jax.log_compiles():
    yield names


class FirstStep(Exception):
  pass


def test_before_the_first_step_each_program_is_compiled_once(
  tmp_path, monkeypatch, compiled
):
  def stop(*args, **kwargs):
    raise FirstStep

  monkeypatch.setattr(Writers, "train", stop)
  config = tiny_config("vpt_shallow")
  prepared = prepare(config)
  with pytest.raises(FirstStep):
    trainer.train(config, tmp_path, prepared=prepared)
  names = compiled()
  # Functions that are jitted where they are defined may have been compiled before.
  assert names == [name for name in PROGRAMS if name in names]
  assert {"draw", "new_state", "multi_step", "schedule"} <= set(names)


def test_the_next_seed_traces_and_compiles_nothing(compiled):
  config = tiny_config("linear")
  prepared = prepare(config)
  first = prepared.first_params(config)
  assert compiled() == ["draw"]
  config.seed = 1
  assert prepared.first_params(config)["head"].keys() == first["head"].keys()
  assert compiled() == []


def test_a_step_is_traced_once_for_all_that_it_is_part_of(monkeypatch):
  traced, create = [], steps.create_train_step

  def counted(*args, **kwargs):
    train_step = create(*args, **kwargs)

    def count_and_step(state, batch):
      traced.append(batch)
      return train_step(state, batch)

    return count_and_step

  monkeypatch.setattr(steps, "create_train_step", counted)
  config = tiny_config("vpt_shallow")
  prepared = prepare(config)
  program, split = prepared.program, prepared.data.splits["train"]
  outlook.flops_of(config, program, len(split))
  state = program_lib.abstract_state(config, program)
  arrays = resident.put_split(split, mesh_lib.batch_sharding(program.mesh))
  program.multi_step.trace(state, arrays, np.uint32(0), np.int32(1))
  assert len(traced) == 1


def test_programs_of_one_model_share_its_draws():
  program = prepare(tiny_config("vpt_shallow", backbone__depth=1)).program

  def draws(total_epochs, num_classes):
    config = tiny_config("vpt_shallow", backbone__depth=1, total_epochs=total_epochs)
    create = program_lib.create_program
    return create(config, num_classes, 24, program.mesh, like=program).draws

  assert draws(5.0, 3) is program.draws
  assert draws(2.0, 4) is not program.draws


def test_draws_are_those_of_all_optimizations_to_the_bit():
  # All kinds that are drawn: prompts are uniform, as the head is.
  model = prepare(tiny_config("linear", backbone__depth=1)).program.model
  name = "jax_disable_most_optimizations"
  before = jax.config.read(name)
  jax.config.update(name, False)
  try:
    ours = state_lib.Draws(model).params(seed=5)
    images = np.zeros((1, model.input_size, model.input_size, 3), np.float32)
    plain = jax.jit(model.init)(jax.random.key(5), images)["params"]
  finally:
    jax.config.update(name, before)
  assert trees.digest(ours) == trees.digest(jax.device_get(plain))


def test_a_start_imports_what_it_needs_without_looking_for_garbage(root, tmp_path):
  code = (
    "import gc, sys\n"
    "from insvp_jax import main\n"
    # In place of the training, when all that it needs has been imported.
    "main._train_or_tune = lambda *_: print(\n"
    f"  [name for name in {LATE} if name in sys.modules],\n"
    "  gc.isenabled(), gc.get_freeze_count() > 100_000,\n"
    "  gc.get_stats()[2]['collections'],\n"
    ")\n"
    f"main.run(['insvp', '--config=quickstart', '--workdir={tmp_path}'])"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=root, capture_output=True, text=True
  )
  assert done.stdout == "[] True True 0\n", done.stderr

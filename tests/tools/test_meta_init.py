"""A border learnt over tasks: Reptile's steps, the tool, and who starts from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import (
  SIZE,
  make_data,
  make_split,
  tiny_config,
  write_images,
)

from insvp_jax.data import TaskData
from insvp_jax.methods import BackboneSpec, create_method
from insvp_jax.methods.base import Apply
from insvp_jax.methods.ops import border as border_lib
from insvp_jax.tools import meta_init
from insvp_jax.train import losses, reptile, trainer

# None of this is about devices, and for one all compiles sooner.
pytestmark = pytest.mark.usefixtures("one_device")

CONFIG = """
from insvp_jax import config as config_lib

def get_config(arg=""):
  config = config_lib.defaults()
  config.task, config.data.root = "folder", arg
  config.backbone.name, config.backbone.weights = "mu/4", "random"
  config.backbone.width = config.backbone.mlp_dim = 16
  config.backbone.depth, config.backbone.num_heads = 1, 2
  config.image_size, config.batch_size, config.eval_batch_size = 16, 8, 8
  config.data.cache_dir = "off"
  config.dam_vp.distance_threshold, config.dam_vp.max_clusters = 4.6, 4
  return config
"""
CHANGED = {"distance_threshold": 4.6, "max_clusters": 4}


def test_the_common_border_moves_towards_the_mean_of_all(monkeypatch):
  """Of two tasks with several clusters, against a loop over them."""
  splits = [{"train": make_split(16, seed)} for seed in range(2)]
  tasks = [TaskData(f"task{i}", ("a", "b", "c"), s) for i, s in enumerate(splits)]
  given, opened, seen = iter(tasks), [], []
  monkeypatch.setattr(trainer, "load_data", lambda *_: next(given))
  original = reptile._open_task

  def open_task(config, prepared, params, *more):
    opened.append((prepared.program.model, jax.device_get(params)))
    return original(config, prepared, params, *more)

  monkeypatch.setattr(reptile, "_open_task", open_task)
  # One batch of all images: each of two epochs is one step.
  config = tiny_config("linear", batch_size=16, backbone__depth=1)
  config.dam_vp.update(CHANGED)
  found = reptile.learn_border(
    [config, config],
    **{"epochs": 2, "lr": 0.8, "head_lr": 0.2, "outer_lr": 0.3, "inner_steps": 2},
    on_epoch=lambda epoch, loss: seen.append((epoch, loss)),
  )
  model, first = opened[0]
  start = {n: first["prompter"][n][0] for n in border_lib.SIDES}

  @jax.jit
  @jax.value_and_grad
  def loss(trained, params, images, labels):
    prompter = {**params["prompter"], **trained["prompter"]}
    whole = {**params, "prompter": prompter, "head": trained["head"]}
    logits = model.apply({"params": whole}, images)
    return jnp.mean(losses.cross_entropy(logits, losses.targets(labels, 3)))

  changes, values = [], []
  for data, (_, params) in zip(tasks, opened, strict=True):
    split = data.splits["train"]
    images = split.images / np.float32(127.5) - 1
    borders = {n: np.stack([x] * 4) for n, x in start.items()}
    trained = {"prompter": borders, "head": params["head"]}
    for step in range(2):
      # On the host, where a difference is not a program of its own.
      value, grads = jax.device_get(loss(trained, params, images, split.labels))
      values += [value] if step == 0 else []
      # Half of 0.8, by the cosine, which is 0 in the second epoch.
      rates = {"prompter": 0.4, "head": 0.2}
      trained = {
        part: jax.tree.map(lambda p, g, r=r: p - r * g, trained[part], grads[part])
        for part, r in rates.items()
      }
    num = int(params["prompter"]["num_clusters"])
    changes += [
      {n: trained["prompter"][n][i] - start[n] for n in start} for i in range(num)
    ]
  assert len(changes) > 2
  assert [epoch for epoch, _ in seen] == [1, 2]
  assert seen[0][1] == pytest.approx(np.mean(values), rel=1e-4)
  for name, leaf in found.items():
    mean = np.mean([change[name] for change in changes], axis=0)
    assert np.abs(mean).max() > 1e-4
    np.testing.assert_allclose(leaf - start[name], 0.3 * mean, rtol=2e-3, atol=1e-6)


def test_two_folders_make_a_border_that_others_start_from(tmp_path, capsys):
  config = tmp_path / "tiny.py"
  config.write_text(CONFIG)
  roots = [write_images(tmp_path / name, ("train", "val")) for name in "ab"]
  output = tmp_path / "new" / "meta.npz"
  arguments = [f"{config}:{root}" for root in roots]
  assert meta_init.main([*arguments, f"--output={output}", "--epochs=2"]) == 0
  said = capsys.readouterr().out.splitlines()
  steps = [line.split(":")[0] for line in said[:2]]
  assert steps == ["epoch 1 of 2", "epoch 2 of 2"]
  assert said[2] == f"{output}: a border learnt over 2 tasks"
  border = border_lib.read(str(output), SIZE, 4)
  assert {n: x.shape for n, x in border.items()} == border_lib.shapes(SIZE, 4)

  spec = BackboneSpec(8, 1, 16, 1, patch_size=4, image_size=SIZE)
  images = np.eye(3, SIZE * SIZE * 3, dtype=np.float32).reshape(3, SIZE, SIZE, 3)
  batch = {"images": images, "mask": np.ones(3)}
  apply = Apply(lambda p, x, a=None: (x.reshape(3, -1)[:, :8], None), None, None)

  def start(name, **fields):
    method = create_method(name, spec, 3, meta=str(output), **fields)
    shapes = {n: (2, *x.shape) for n, x in border.items()}
    own = {n: np.ones(s, np.float32) for n, s in shapes.items()}
    assert method.prepares()
    return method.prepare({"prompter": own}, lambda n: iter([batch]), apply)["prompter"]

  of_vp = start("vp")
  of_dam_vp = start("dam_vp", max_clusters=2, distance_threshold=9.0)
  assert of_dam_vp["num_clusters"] == 1
  for name, leaf in border.items():
    np.testing.assert_array_equal(of_vp[name], leaf)
    np.testing.assert_array_equal(of_dam_vp[name], [leaf, 0 * leaf])

  with pytest.raises(ValueError, match=r"'up' is \[4, 16, 3\], expected \[3, 16, 3\]"):
    start("vp", prompt_size=3)
  with pytest.raises(ValueError, match="leave one of them out"):
    start("vp", location="fixed_patch")
  np.savez(output, up=np.zeros(3))
  with pytest.raises(ValueError, match="meta.npz has no border of `insvp meta_init`"):
    start("vp")


@pytest.mark.parametrize(
  "arguments, line",
  [
    (["{a}", "--output=x.txt"], "--output is x.txt, expected a path ending in .npz"),
    (["nowhere", "--output=x.npz"], "there is no config file nowhere"),
    (["{a}", "--output=x.npz", "--epochs=0"], "epochs is 0, expected at least 1"),
    (["{a}", "--output=x.npz", "--lr=0"], "lr is 0.0, expected a number above 0"),
  ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, line):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "tiny.py").write_text(CONFIG)
  config = f"{tmp_path}/tiny.py:{tmp_path}"
  assert meta_init.main([a.format(a=config) for a in arguments]) == 2
  error = capsys.readouterr().err
  assert line in error and error.count("\n") == 1


def test_tasks_of_two_sizes_are_refused(monkeypatch):
  monkeypatch.setattr(trainer, "load_data", lambda *_: make_data())
  configs = [tiny_config("linear") for _ in range(2)]
  configs[1].dam_vp.prompt_size = 3
  with pytest.raises(ValueError, match="another backbone, image size or prompt_size"):
    reptile.learn_border(configs, epochs=1)

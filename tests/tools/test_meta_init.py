"""A border learnt over tasks: Reptile's steps, the tool, and who starts from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import (
  SIZE,
  make_data,
  make_split,
  prepare,
  tiny_config,
  write_images,
)

from insvp_jax.data import TaskData
from insvp_jax.methods.ops import border as border_lib
from insvp_jax.tools import meta_init
from insvp_jax.train import losses, reptile, trainer

CONFIG = """
from insvp_jax import config as config_lib

def get_config(arg=""):
  config = config_lib.defaults()
  config.task, config.data.root = "folder", arg
  config.backbone.name, config.backbone.weights = "mu/4", "random"
  config.backbone.width = config.backbone.mlp_dim = 16
  config.backbone.depth, config.backbone.num_heads = 2, 2
  config.image_size, config.batch_size, config.eval_batch_size = 16, 8, 8
  config.data.cache_dir = "off"
  config.dam_vp.distance_threshold, config.dam_vp.max_clusters = 4.6, 4
  return config
"""
CHANGED = {"distance_threshold": 4.6, "max_clusters": 4}


def test_the_common_border_moves_towards_the_mean_of_all(monkeypatch):
  """Of two tasks with several clusters, against a loop over them."""
  sizes = {"train": 16}
  tasks = [
    TaskData(f"task{i}", ("a", "b", "c"), {"train": make_split(n, i)})
    for i in range(2)
    for n in sizes.values()
  ]
  given = iter(tasks)
  monkeypatch.setattr(trainer, "load_data", lambda *_: next(given))
  # One batch of all images: each of two epochs is one step.
  config = tiny_config("linear", batch_size=16)
  config.dam_vp.update(CHANGED)
  seen = []
  found = reptile.learn_border(
    [config, config],
    **{"epochs": 2, "lr": 0.8, "head_lr": 0.2, "outer_lr": 0.3, "inner_steps": 2},
    on_epoch=lambda epoch, loss: seen.append((epoch, loss)),
  )
  config = tiny_config("dam_vp", batch_size=16)
  config.dam_vp.update(CHANGED)
  changes, values = [], []
  for data in tasks:
    own = prepare(config, data)
    params = own.prepare_params(config, own.first_params(config))
    model, split = own.program.model, data.splits["train"]
    images = jnp.asarray(split.images) / 127.5 - 1
    targets = losses.targets(jnp.asarray(split.labels), 3)
    start = {n: params["prompter"][n][0] for n in border_lib.SIDES}
    num = int(params["prompter"]["num_clusters"])
    trained = {
      "prompter": {n: jnp.stack([x] * 4) for n, x in start.items()},
      "head": params["head"],
    }

    @jax.jit
    @jax.value_and_grad
    def loss(trained, params=params, model=model, images=images, targets=targets):
      prompter = {**params["prompter"], **trained["prompter"]}
      whole = {**params, "prompter": prompter, "head": trained["head"]}
      return jnp.mean(
        losses.cross_entropy(model.apply({"params": whole}, images), targets)
      )

    for step in range(2):
      value, grads = loss(trained)
      values += [value] if step == 0 else []
      # Half of 0.8, by the cosine, which is 0 in the second epoch.
      rates = {"prompter": 0.4, "head": 0.2}
      trained = {
        part: jax.tree.map(lambda p, g, r=r: p - r * g, trained[part], grads[part])
        for part, r in rates.items()
      }
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
  assert [line.split(":")[0] for line in said[:2]] == [
    f"epoch {i} of 2" for i in (1, 2)
  ]
  assert said[2] == f"{output}: a border learnt over 2 tasks"
  border = border_lib.read(str(output), SIZE, 4)
  assert {n: x.shape for n, x in border.items()} == border_lib.shapes(SIZE, 4)

  for method in ("dam_vp", "vp"):
    own = tiny_config(method)
    own[method].meta = str(output)
    prepared = prepare(own, make_data())
    params = prepared.prepare_params(own, prepared.first_params(own))
    for name, leaf in border.items():
      first = params["prompter"][name]
      first = first[0] if method == "dam_vp" else first
      np.testing.assert_array_equal(first, leaf)

  own.vp.prompt_size = 3
  prepared = prepare(own, make_data())
  with pytest.raises(ValueError, match=r"'up' is \[4, 16, 3\], expected \[3, 16, 3\]"):
    prepared.prepare_params(own, prepared.first_params(own))
  np.savez(output, up=np.zeros(3))
  with pytest.raises(ValueError, match="meta.npz has no border of `insvp meta_init`"):
    border_lib.read(str(output), SIZE, 4)


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

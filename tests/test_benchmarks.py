"""The benchmarks run; what they measure is theirs to say."""

import dataclasses
import functools
import importlib.util
import json
import os
from pathlib import Path
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
from markdown_table import cells
import numpy as np
import pytest
from tiny_runs import METHOD_KWARGS, make_params, make_run
from tiny_training import CLASSES, SIZE, write_images

from benchmarks import (
  ceilings,
  checkpoint,
  epoch,
  prompt_effects,
  step,
  turns,
  yardstick_client,
)
from benchmarks.contestant import Contestant, create_config
from benchmarks.interventions import Programs
from benchmarks.parts import PARTS
from insvp_jax import trees
from insvp_jax.config import defaults
from insvp_jax.data import load_data, preprocess
from insvp_jax.models.classifier import create_backbone, create_model
from insvp_jax.run import load_run
from insvp_jax.train import trainer

# None of this is about devices, and for one all compiles sooner.
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def benchmark(root):
  """Loads a benchmark by its name, each once."""

  @functools.cache
  def load(name):
    path = root / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

  return load


def test_gradient_economy(benchmark):
  module = benchmark("gradient_economy")
  forward, multiple, of_plain = module.ratio("boxed", "linear", batch_size=2)
  # 65 tokens' worth of a 0.8 M parameter ViT, and nothing but a head on top.
  assert 80 < forward < 160
  assert multiple == pytest.approx(1, abs=0.02)
  # Its head reads the mean of all tokens, so there is none to leave out.
  assert of_plain == pytest.approx(1, abs=0.02)


def test_gradient_economy_shows_every_method_and_preset(benchmark, monkeypatch, capsys):
  module = benchmark("gradient_economy")
  monkeypatch.setattr(module, "ratio", lambda *_: (1234.5, 2.125, 3.0))
  monkeypatch.setattr(sys, "argv", ["gradient_economy"])
  module.main()
  titles, *rows = cells(capsys.readouterr().out)
  assert titles[0] == "boxed" and "train step / forward" in titles
  assert [row[0] for row in rows] == [*module.METHODS, "insvp release"]
  assert rows[0][1:] == ["1,234", "2.12", "3.00"]
  monkeypatch.setattr(sys, "argv", ["gradient_economy", "--methods=linear,lora"])
  module.main()
  assert [row[0] for row in cells(capsys.readouterr().out)[1:]] == ["linear", "lora"]
  monkeypatch.undo()
  argv = ["gradient_economy", "--methods=loar"]
  monkeypatch.setattr(sys, "argv", argv)
  with pytest.raises(SystemExit):
    module.main()
  assert "loar on boxed: unknown method 'loar'" in capsys.readouterr().err


def test_mask_scores_are_compared_with_those_in_float64(benchmark, monkeypatch, capsys):
  module = benchmark("mask_scores")

  def tiny():
    config = defaults()
    config.backbone.name, config.backbone.weights = "mu/4", "random"
    config.image_size, config.tensorboard = SIZE, False
    return config

  monkeypatch.setattr(module, "defaults", tiny)
  monkeypatch.setattr(sys, "argv", ["mask_scores", "--epochs=0.05", "--images=50"])
  module.main()
  out = capsys.readouterr().out
  titles, *rows = cells(out[out.index("| score of") :])
  assert titles[1:] == ["largest"] + [
    f"{dtype}, {what}" for dtype in module.TYPES[1:] for what in ("error", "moved")
  ]
  assert [row[0] for row in rows] == list(module.NAMES)
  for row in rows:
    float32, bfloat16 = (float(row[i].rstrip("%")) for i in (2, 4))
    assert float(row[1]) > 0 and 0 < float32 < bfloat16


def test_segmentation_trains_each_method(benchmark, monkeypatch, tmp_path, capsys):
  module, picture = benchmark("segmentation"), tmp_path / "found.png"
  monkeypatch.setattr(module, "SPLITS", {"train": 8, "val": 1, "test": 1})
  # Each image of the picture has a size, and so programs, of its own.
  monkeypatch.setattr(module, "_SHOWN", 1)
  flags = ["--methods=linear", "--steps=2", f"--picture={picture}"]
  monkeypatch.setattr(sys, "argv", ["segmentation", *flags])
  module.main()
  titles, row = cells(capsys.readouterr().out)
  assert titles[3:] == [f"{name}, %" for name in module.CLASSES]
  assert row[:2] == ["linear", "89,100"] and 0 <= float(row[2]) < 100
  assert picture.stat().st_size > 0


@functools.cache
def plain_flops(module):
  return module.plain_forward_flops("B/16", 8)


def train_step_over_plain_forward(module, preset, conv, compiled):
  model = module.create_model(
    "B/16", num_classes=10, method_kwargs={"preset": preset, "conv": conv}
  )
  assert model.backbone.image_size == 224
  step = module.train_step_flops(model, 8, compiled=compiled)
  return step / plain_flops(module)


MOST_FLOPS = {"paper": 2.05, "release": 2.4}


@pytest.mark.parametrize("preset", MOST_FLOPS)
@pytest.mark.parametrize("conv", ["fft", "blocks"])
def test_flops_of_a_train_step_at_full_size(benchmark, preset, conv):
  module = benchmark("gradient_economy")
  share = train_step_over_plain_forward(module, preset, conv, compiled=False)
  # Forward and backward, of which the last block needs little.
  assert 1.85 < share <= MOST_FLOPS[preset]


@pytest.mark.slow
@pytest.mark.parametrize("preset", MOST_FLOPS)
def test_compiled_flops_of_a_train_step_at_full_size(benchmark, preset):
  module = benchmark("gradient_economy")
  share = train_step_over_plain_forward(module, preset, "auto", compiled=True)
  assert 1.85 < share <= MOST_FLOPS[preset]


def test_attention(benchmark, monkeypatch, capsys):
  module = benchmark("attention")
  monkeypatch.setattr(module, "ROUNDS", 1)
  monkeypatch.setattr(module, "SHAPE", (2, 5, 2, 4))
  module.main()
  assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
    "forward",
    "gradient",
  ]


def test_startup_measures_an_import_without_tensorflow(benchmark):
  module = benchmark("startup")
  assert 0 < module.import_spent(module.ROOT).wall


def test_startup_runs_to_the_first_step_of_a_task_of_other_classes(
  benchmark, monkeypatch, tmp_path, capsys
):
  module = benchmark("startup")
  monkeypatch.setattr(module, "NUM_IMAGES", {"train": 40, "val": 20, "test": 20})
  real, given = module.first_step_spent, []

  def spied(root, workdir, cache, *flags):
    given.append((cache, flags))
    # One of them all is enough: the dearest to get right.
    if len(given) != 3:
      return module.Spent(float(len(given)), 2.0)
    cache = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    tiny = ("backbone.name=mu/4", "backbone.weights=random", f"image_size={SIZE}")
    flags = (*flags, *(f"--config.{each}" for each in tiny))
    return real(root, workdir, cache, *flags)

  monkeypatch.setattr(module, "first_step_spent", spied)
  json_path = tmp_path / "startup.json"
  flags = ["--rounds=1", f"--against={module.ROOT}", f"--json={json_path}"]
  monkeypatch.setattr(sys, "argv", ["startup", *flags])
  module.main()
  titles, *rows = cells(capsys.readouterr().out)
  found = json.loads(json_path.read_text())
  assert titles[:2] == ["start-up, medians of 1 rounds", "seconds"]
  assert [row[0] for row in rows] == list(found["here"]) == list(found["there"])
  assert rows[2][1:] == ["2", "2", "5", "2", "1.00"]
  assert found["here"]["the same again"] == [[2.0, 2.0]]
  wall, processor = found["here"]["another task"][0]
  assert wall > 0.1 and processor > 0.1
  # Each checkout fills a cache of its own.
  assert len({cache for cache, _ in given}) == 2
  tasks = [(), (), ("--config.task=folder",)]
  assert [flags[:1] for _, flags in given] == 2 * tasks
  monkeypatch.setattr(sys, "argv", ["startup", f"--against={tmp_path}"])
  with pytest.raises(SystemExit):
    module.main()
  assert "expected a checkout of this project" in capsys.readouterr().err


def test_tune_compares_trials_together_with_one_by_one(benchmark, monkeypatch):
  module = benchmark("tune")
  digits = load_data("digits", defaults().data, 32)
  few = {"train": digits.splits["train"].take(np.arange(40))}
  digits = dataclasses.replace(digits, splits=few)
  # All images go through the backbone, once for each way.
  monkeypatch.setattr(trainer, "load_data", lambda *_: digits)
  found = module.compare("linear", "boxed", number=2, steps=1, rounds=1, num_val=8)
  assert set(found["seconds"]) == {"one by one", "at once", "in turn"}
  assert min(found["speed_up"].values()) > 0 and "one by one" not in found["speed_up"]
  assert found["automatic_chunk"] == 2 and found["mib_of_a_member"] > 0
  titles, row = cells(module.table([found], "2 trials"))
  shown = dict(zip(titles, row, strict=True))
  assert (shown["2 trials"], shown["automatic"]) == ("linear", "2")
  assert shown["in turn, speed-up"] == f"{found['speed_up']['in turn']:.2f}"


def test_input_compares_the_stream_with_tf_data(benchmark, monkeypatch):
  pytest.importorskip("tensorflow_datasets")
  module = benchmark("input")
  monkeypatch.setattr(module, "ROUNDS", 1)
  found = module.throughput(70)
  assert set(found["images_per_second"]) == {"tf.data", "stream", "stream, shuffled"}
  assert found["ratio"]["tf.data"] == 1 and found["images"] == 70


def test_evaluating_a_large_split_does_not_hold_it_in_memory(root, tmp_path):
  pytest.importorskip("tensorflow_datasets")
  command = [sys.executable, "-m", "benchmarks.input", "--memory", "--images=2500"]
  subprocess.run([*command, f"--json={tmp_path / 'm'}"], cwd=root, check=True)
  found = json.loads((tmp_path / "m").read_text())
  assert found["MiB of the split in memory"] == pytest.approx(359, abs=1)
  # A few batches of 37 MiB, and TensorFlow's own threads and buffers.
  assert found["MiB above"] < 208


@pytest.mark.parametrize(
  ("loop", "dtype"), [(0, "float32"), (2, "float32"), (0, "bfloat16")]
)
def test_convolutions(benchmark, monkeypatch, capsys, loop, dtype):
  module = benchmark("convolutions")
  layer = module.Layer("tiny", 6, 2, 1, 3, 1, "xk")
  monkeypatch.setattr(module, "LAYERS", (layer, module.LAYERS[0]))
  flags = ["--batch_size=1", "--rounds=1", f"--loop={loop}", "--layers=tiny"]
  flags.append(f"--dtype={dtype}")
  monkeypatch.setattr(sys, "argv", ["convolutions", *flags])
  module.main()
  printed = capsys.readouterr().out
  assert f"batch 1, {dtype}, ms" in printed
  titles, row = cells(printed)
  assert titles == ["convolution", *module.FORMS, "auto"]
  assert row[0] == "tiny" and row[-1] in module.FORMS
  assert min(map(float, row[1:-1])) >= 0


TINY = ["--backbone=mu/4", "--image_size=16", "--batch_size=4", "--num_classes=5"]


def vit_flops(vit, num_classes):
  """By hand: the matrix products of one image's forward pass, every token read."""
  patches, d = (vit.image_size // vit.patch_size) ** 2, vit.width
  n = patches + (vit.pool == "tok")
  block = 2 * n * (4 * d**2 + 2 * d * vit.mlp_dim) + 2 * 2 * n**2 * d
  embedding = 2 * patches * 3 * vit.patch_size**2 * d
  return embedding + vit.depth * block + 2 * d * num_classes


def test_step_measures_every_mode_and_method(tmp_path, capsys):
  arguments = ["--rounds=1", "--turn_seconds=0", f"--json={tmp_path / 's'}"]
  # Of one method each mode but one, of two that one: each pair is several programs.
  one = ["--methods=linear", "--modes=eval,predict", "--frozen_dtypes=int8"]
  step.main([*TINY, *arguments, *one])
  one = json.loads((tmp_path / "s").read_text())["steps"]
  in_parts = ["--methods=insvp,linear", "--modes=train", "--microbatch_sizes=2"]
  step.main([*TINY, *arguments, *in_parts])
  both = json.loads((tmp_path / "s").read_text())["steps"]
  assert set(one) == {"eval", "predict"} == set(step.MODES) - {"train"}
  insvp, linear = ("insvp 2 at once", "linear 2 at once")
  assert set(both) == {"train"} and set(both["train"]) == {insvp, linear}
  for mode, rows in [*one.items(), *both.items()]:
    for row in rows.values():
      assert row["memory_mib"] > 0 and row["seconds"] > 0
      # What is timed apart and the rest are the whole.
      assert sum(row["parts"].values()) == pytest.approx(row["seconds"])
      known = PARTS if mode == "train" else PARTS[:3]
      assert tuple(row["parts"]) == known
  flops = {mode: rows["linear int8"]["flops"] for mode, rows in one.items()}
  flops["train"] = both["train"][linear]["flops"]
  # The gradient of the head is one more product of its size; its input needs none.
  assert flops["train"] - flops["eval"] == 4 * 2 * 32 * 5
  assert flops["eval"] == flops["predict"]
  assert both["train"][insvp]["flops"] > 1.8 * flops["eval"]
  rows = cells(step.table(both))
  assert [row[0] for row in rows] == ["step", f"train {insvp}", f"train {linear}"]
  assert capsys.readouterr().out.endswith(step.table(both))


def test_needed_flops_are_those_of_a_hand_count():
  config = create_config("linear", backbone="boxed", batch_size=4, dtype="float32")
  contestant = Contestant(config, num_classes=7)
  vit = contestant.program.model.backbone
  assert vit.pool == "gap"  # every token is read
  assert contestant.needed_flops("eval") == 4 * vit_flops(vit, 7)
  assert contestant.trainable == 128 * 7 + 7


def test_step_refuses_what_it_does_not_know(capsys):
  wrong = ("--methods=insvq", "--modes=tarin", "--dtype=float8", "--frozen_dtypes=int4")
  for argument in wrong:
    with pytest.raises(SystemExit):
      step.main([argument])
    assert "known: " in capsys.readouterr().err
  with pytest.raises(SystemExit):
    step.main(["--microbatch_sizes=8,few"])
  assert "'8,few', expected whole numbers, such as 32,8" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    step.main(["--batch_size=8", "--microbatch_sizes=4,3"])
  assert "parts of 3 do not divide a batch of 8" in capsys.readouterr().err


def test_turns_go_there_and_back():
  called = []

  def timed(name):
    return lambda times: called.append((name, times)) or 0.4 * times

  seconds = turns.alternate({"a": timed("a"), "b": timed("b")}, rounds=3)
  # Twice each beforehand; 0.2 seconds are filled by one call.
  assert [name for name, _ in called] == [*"aabb", *"ab", *"ba", *"ab"]
  assert {times for _, times in called} == {1}
  assert turns.medians(seconds) == {"a": 0.4, "b": 0.4}
  assert turns.ratio({"a": [2, 9, 4], "b": [1, 3, 1]}, "a", "b") == 3


def test_ceilings_of_a_block():
  vit = create_backbone("mu/4", 16)
  found = ceilings.measure(vit, 2, ("float32", "bfloat16"), rounds=1, copy_mib=1)
  assert set(found["products"]) == {"float32", "bfloat16"}
  rates = found["products"]["float32"]
  assert found["gflops"]["float32"] == max(rates.values()) > 0
  titles, *rows = cells(ceilings.describe(found))
  assert titles == ["GFLOP/s", *rates, "ceiling"]
  assert [row[0] for row in rows] == ["float32", "bfloat16"]
  assert found["copy_gb_s"] > 0 and "GB/s" in ceilings.describe(found).splitlines()[-1]
  b16 = ceilings.products(create_backbone("B/16"), 8)
  assert b16["MLP, in"] == ((8 * 197, 768), (768, 3072))
  assert b16["scores"] == ((96, 197, 64), (96, 64, 197))


@pytest.fixture
def torch_python():
  """An interpreter with torch and timm: this one, or INSVP_TORCH_PYTHON."""
  python = os.environ.get("INSVP_TORCH_PYTHON", sys.executable)
  if reason := yardstick_client.missing(python):
    pytest.skip(reason)
  return python


@pytest.mark.parametrize("preset, pool", [("paper", "tok"), ("release", "gap")])
def test_the_yardstick_computes_what_we_compute(torch_python, preset, pool):
  sizes = {"width": 32, "depth": 2, "mlp_dim": 64, "num_heads": 2, "pool": pool}
  fields = {"preset": preset, "prompt_length": 3, "global_kernels": (5, 3)}
  model = create_model(
    "mu/4",
    num_classes=5,
    image_size=16,
    backbone_kwargs=sizes,
    method_kwargs=fields,
    head_init="torch",
  )
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (3, 16, 16, 3), np.uint8)
  images = preprocess.normalise(preprocess.PRESETS["vtab"], jnp.asarray(pixels))
  params = jax.jit(model.init)(jax.random.key(0), images)["params"]
  # Biases and the class token start at zero: here each value counts.
  params = jax.tree.map(
    lambda p: p + 0.1 * rng.standard_normal(p.shape, np.float32), params
  )
  ours = model.apply({"params": params}, images)
  mask = trees.flatten(trees.mask(params, model.prompter.trainable_patterns()))
  flat = trees.flatten(params)
  with yardstick_client.Client(
    torch_python, model, batch_size=2, specific_every_block=preset == "release"
  ) as client:
    theirs = client.logits(params, pixels)
    assert client.seconds("train", 1) > 0 and client.seconds("eval", 1) > 0
    assert client.info["trainable"] == sum(flat[n].size for n in flat if mask[n])
  np.testing.assert_allclose(theirs, ours, atol=2e-5)


def test_without_torch_the_yardstick_says_what_to_do(capsys, tmp_path):
  with pytest.raises(SystemExit):
    step.main(["--yardstick", f"--torch_python={tmp_path / 'python'}"])
  assert "cannot be started" in capsys.readouterr().err
  plain = tmp_path / "plain"
  plain.write_text("#!/bin/sh\nexit 1\n")
  plain.chmod(0o755)
  assert "benchmarks/requirements.txt" in yardstick_client.missing(str(plain))


def test_the_yardstick_is_for_insvp():
  with pytest.raises(ValueError, match="InsVP"):
    yardstick_client.settings(create_model("mu/4", "linear", num_classes=2))


def test_epoch_times_a_run_from_its_start_to_its_result(tmp_path, capsys):
  sizes = ["--train_images=12", "--test_images=6", "--num_classes=3"]
  (found,) = epoch.main(
    [*TINY[:3], *sizes, "--method=linear", "--epochs=2", "--runs=1"]
    + [f"--json={tmp_path / 'e'}", "--", "--config.tensorboard=False"]
  )
  assert found["steps"] == 2 * 12 // 4 and found["test_images"] == 6
  assert found["to_first_step"] + found["to_result"] == pytest.approx(found["total"])
  assert json.loads((tmp_path / "e").read_text()) == [found]
  said = capsys.readouterr()
  titles, row = cells(said.out)
  assert said.out.endswith(epoch.table([found])) and "run 1 of 1" in said.err
  assert row[0] == "cold" and titles[-2:] == ["ms a step", "images/s"]
  # Its steps see features from a cache, and no images.
  assert found["images_per_second"] is None and float(row[-2]) > 0 and row[-1] == ""


def test_epoch_shows_the_rate_where_there_is_one():
  spent = {"to_first_step": 19.6, "to_result": 31.94, "total": 51.54}
  known = {**spent, "step": 0.375, "images_per_second": 1171.0}
  unknown = {**spent, "step": None, "images_per_second": None}
  _, first, second = cells(epoch.table([known, unknown]))
  assert first == ["cold", "19.6", "31.9", "51.5", "375.0", "1,171.0"]
  assert second == ["warm", "19.6", "31.9", "51.5", "", ""]


def test_checkpoint_weighs_the_items():
  config = create_config(
    "vpt_deep", backbone="mu/4", batch_size=4, dtype="float32", image_size=16
  )
  contestant = Contestant(config, num_classes=5)
  found = checkpoint.measure(contestant, rounds=1, steps=1)
  trained = 4 * contestant.trainable
  assert trained < found["bytes"]["adapter"] < trained + 10_000
  assert found["bytes"]["optimizer"] > 2 * trained
  assert 0 < found["blocking"] <= found["complete"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """A folder of images, and what a run on them stores of it."""
  config = defaults()
  config.data.root = str(write_images(tmp_path_factory.mktemp("photos")))
  config.data.cache_dir, config.batch_size = "off", 8
  data = load_data("folder", config.data, SIZE)
  meta = {
    "class_names": list(CLASSES),
    "config": {**config.to_dict(), "task": "folder"},
    "data_sha256": data.digest(("train", "val", "test")),
  }
  return data, meta


def test_prompt_effects_of_two_runs(photos, tmp_path, capsys):
  data, meta = photos
  runs = {}
  for method in ("insvp", "vpt_deep"):
    (tmp_path / method).mkdir()
    stored = {"meta": meta, "backbone_kwargs": {"depth": 1}}
    runs[method] = make_run(tmp_path / method, method, **stored)[0]
  flags = [f"--run={workdir}" for workdir in runs.values()]
  output = tmp_path / "output"
  assert prompt_effects.main([*flags, "--batches=2", f"--output={output}"]) == 0
  said = capsys.readouterr().out.strip().split("\n\n")
  insvp, vpt = json.loads((output / "prompt_effects.json").read_text())["runs"]
  assert (output / "prompt_effects.png").stat().st_size > 0

  # What the run itself computes of its val split.
  val, run = data.splits["val"], load_run(runs["insvp"])
  right = run.predict(val.images).argmax(-1) == val.labels
  scores = insvp["interventions"]
  assert set(scores) == {"specific", "image"} and insvp["images"] == len(val)
  for score in scores.values():
    assert score["as is"]["accuracy"] == right.mean()
    assert 0 < score["varies"] < 1
    assert len({score[change]["loss"] for change in prompt_effects.CHANGES}) == 4

  end = insvp["features"]["end"]
  inputs = run.preprocess(val.images)
  prompts, inputs = (
    x.reshape(len(val), -1) for x in (run.prompted(val.images) - inputs, inputs)
  )
  energy = np.linalg.norm(prompts, axis=1) / np.linalg.norm(inputs, axis=1)
  assert end["prompt / image"] == pytest.approx(energy.mean(), abs=1e-4)
  start = insvp["features"]["start"]
  # The prompts of the seed are smaller than those that the run was given.
  assert start["prompt / image"] < end["prompt / image"]
  assert end["cosine, image prompt"] < start["cosine, image prompt"] < 1
  parts = {"patch_prompter", "global_prompter", "common_prompt", "specific_prompter"}
  for stage in ("start", "end"):
    for norms in insvp["gradients"][stage].values():
      assert set(norms) == {*parts, "head"}
      assert all(0 < norm["ratio"] <= 1 for norm in norms.values())
  # A token that is learnt moves by the lr; one that is made, by its whole network.
  steps = insvp["steps"]["start"]
  assert steps["common prompts"]["moved"] == prompt_effects.STEP_LR
  assert steps["specific prompt"]["moved"] > 2 * prompt_effects.STEP_LR
  assert set(steps) == {"common prompts", "specific prompt", "image prompt"}
  # The start stands before the end in each table.
  sizes = [insvp["steps"][stage]["image prompt"]["size"] for stage in ("start", "end")]
  (row,) = (line for line in said[2].splitlines() if "insvp, image prompt" in line)
  assert re.findall(r"of (\S+)", row) == [f"{size:.2g}" for size in sizes]
  # Others have what they have.
  assert vpt["interventions"] == {} and "prompt / image" not in vpt["features"]["end"]
  assert set(vpt["gradients"]["end"]["off"]) == {"common_prompt", "head"}
  features, interventions, moved, *gradients = map(cells, said)
  assert len(moved) == 5
  assert [row[1] for row in features[1:]][2:] == ["-", "-"]
  assert len(interventions) == 3 and len(gradients) == 2


def test_attention_and_gradients_of_a_prompted_model():
  kwargs = {"num_classes": 3, "image_size": SIZE}
  fields = METHOD_KWARGS["insvp"]
  model = create_model("mu/4", **kwargs, method_kwargs=fields)
  # As many as a batch of the runs above, which have the same programs.
  inputs = np.random.default_rng(0).normal(size=(8, SIZE, SIZE, 3)).astype(np.float32)
  # Queries that are zero attend to all alike.
  flat = trees.flatten(make_params(model))
  flat = {name: 0 * leaf if "/query/" in name else leaf for name, leaf in flat.items()}
  params, programs = trees.unflatten(flat), Programs(model)
  prompts = programs.prompts(params, inputs)
  found = programs.prompted(params, inputs, prompts)
  tokens, prompt_tokens = 17, 2
  np.testing.assert_allclose(found["entropy"], np.log(tokens + prompt_tokens), 1e-5)
  np.testing.assert_allclose(found["share"], prompt_tokens / (tokens + prompt_tokens))
  plain = programs.plain(params, inputs)
  np.testing.assert_allclose(plain["entropy"], np.log(tokens), 1e-5)
  assert not plain["share"].any()

  # Prompts that are removed count nothing in the fusion.
  removed = programs.prompted(params, inputs, jax.tree.map(np.zeros_like, prompts))
  fields = {**fields, "image_fusion": (0.0, 0.0), "feature_fusion": (0.5, 0.0)}
  without = create_model("mu/4", **kwargs, method_kwargs=fields)
  expected = jax.jit(without.apply)({"params": params}, inputs)
  np.testing.assert_allclose(removed["logits"], expected, atol=1e-4)
  assert np.abs(found["logits"] - expected).max() > 1e-2

  split = trees.split(params, trees.mask(params, model.prompter.trainable_patterns()))
  labels, rates = np.array([0, 1, 2, 2] * 2, np.int32), programs.dropout_rates()
  grads = {
    name: programs.gradient(*split, (inputs, labels), jax.random.key(0), values)
    for name, values in (("on", rates), ("off", dict.fromkeys(rates, 0.0)))
  }
  # By hand, of the logits without dropout.
  errors = np.asarray(jax.nn.softmax(found["logits"])) - np.eye(3)[labels]
  np.testing.assert_allclose(grads["off"]["head/bias"], errors.mean(0), atol=1e-6)
  assert np.abs(grads["on"]["head/bias"] - errors.mean(0)).max() > 1e-4


def test_a_prompt_that_is_zero_moves_all_the_same():
  row = {"image prompt": {"moved": 0.002, "size": 0.0}}
  end = {"image prompt": {"moved": 0.002, "size": 0.01}}
  table = prompt_effects.steps_table(
    [{"run": "r", "steps": {"start": row, "end": end}}]
  )
  assert cells(table)[1][1:] == ["0.002 of 0", "0.002 of 0.01 = 20.0%"]


def test_prompt_effects_refuses_what_it_would_mislead_about(photos, tmp_path):
  _, meta = photos
  for name in ("vpt_deep", "bias"):
    (tmp_path / name).mkdir()
  config = {**meta["config"], "data": {"train_split": "train_val"}}
  on_val = make_run(tmp_path / "vpt_deep", "vpt_deep", meta={**meta, "config": config})[
    0
  ]
  with pytest.raises(SystemExit, match="trained on train_val, so that val says"):
    prompt_effects.main([f"--run={on_val}"])
  tuned = make_run(tmp_path / "bias", "bias", meta={**meta, "method": "bias"})[0]
  with pytest.raises(SystemExit, match="bias trains the backbone"):
    prompt_effects.main([f"--run={tuned}"])


def test_curves_of_the_losses_by_step(tmp_path, capsys):
  lines = [
    {"step": 1, "loss": 3.0},
    {"step": 2, "loss": 2.0},
    {"step": 2, "val_loss": 2.25, "val_accuracy": 0.5},
    {"step": 4, "val_loss": 2.0, "val_accuracy": 0.75},
    {"step": 5, "val_accuracy": 0.75},
  ]
  for name, kept in (("some", lines), ("none", lines[:2])):
    (tmp_path / name).mkdir()
    text = "".join(f"{json.dumps(line)}\n" for line in kept)
    (tmp_path / name / "metrics.jsonl").write_text(text)
  flags = [f"--run={tmp_path / name}" for name in ("some", "none")]
  flags += ["--curves", f"--output={tmp_path / 'output'}"]
  assert prompt_effects.main(flags) == 0
  some, none = capsys.readouterr().out.strip().split("\n\n")
  assert cells(some)[1:] == [
    ["2", "2.500", "2.250", "50.0"],
    ["4", "-", "2.000", "75.0"],
  ]
  assert "no validation loss by step" in none and none.count("\n") == 0
  names = sorted(path.name for path in (tmp_path / "output").iterdir())
  assert names == ["curves.json", "curves.png"]
  assert prompt_effects.main([f"--run={tmp_path}/nowhere", "--curves"]) == 2

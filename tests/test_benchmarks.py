"""The benchmarks run; what they measure is theirs to say."""

import importlib.util
import json
import subprocess
import sys

import pytest


@pytest.fixture
def benchmark(root):
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


def train_step_over_plain_forward(module, preset, conv, compiled):
  model = module.create_model(
    "B/16", num_classes=10, method_kwargs={"preset": preset, "conv": conv}
  )
  assert model.backbone.image_size == 224
  step = module.train_step_flops(model, 8, compiled=compiled)
  return step / module.plain_forward_flops("B/16", 8)


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
  assert 0 < benchmark("startup").import_seconds()


def test_tune_compares_trials_together_with_one_by_one(benchmark):
  found = benchmark("tune").compare("linear", "boxed", number=2, steps=1, rounds=1)
  assert found["speed_up"] > 0 and set(found["seconds"]) == {"one by one", "together"}
  assert found["automatic_chunk"] == 2 and found["mib_of_a_member"] > 0


def test_input_compares_the_stream_with_tf_data(benchmark, monkeypatch):
  pytest.importorskip("tensorflow_datasets")
  module = benchmark("input")
  monkeypatch.setattr(module, "ROUNDS", 1)
  found = module.throughput(70)
  assert set(found["images_per_second"]) == {"tf.data", "stream", "stream, shuffled"}
  assert found["ratio"]["tf.data"] == 1 and found["images"] == 70


def test_evaluating_a_large_split_does_not_hold_it_in_memory(root, tmp_path):
  pytest.importorskip("tensorflow_datasets")
  command = [sys.executable, "-m", "benchmarks.input", "--memory", "--images=6000"]
  subprocess.run([*command, f"--json={tmp_path / 'm'}"], cwd=root, check=True)
  found = json.loads((tmp_path / "m").read_text())
  assert found["MiB of the split in memory"] == pytest.approx(861, abs=1)
  # A few batches of 37 MiB, and TensorFlow's own threads and buffers.
  assert found["MiB above"] < 500


def test_convolutions(benchmark):
  module = benchmark("convolutions")
  layer = module.Layer("tiny", 6, 2, 1, 3, 1, "k")
  assert set(module.measure(layer, batch_size=1, rounds=1)) == set(module.FORMS)

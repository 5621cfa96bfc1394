"""configs/vtab.py from TFRecords to the table, on a tiny backbone."""

import importlib.util
import json

import pytest
from tfds_fixtures import prepare_cifar

from insvp_jax.search import tune

# None of this is about devices, and for one all compiles sooner.
pytestmark = pytest.mark.usefixtures("one_device")


def load_config(root, name, *args):
  spec = importlib.util.spec_from_file_location(name, root / "configs" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*args)


def test_cifar100_goes_through_the_whole_protocol(root, tmp_path, capsys):
  pytest.importorskip("tensorflow_datasets")
  config = load_config(root, "vtab", "task=cifar100")
  config.data.data_dir = str(prepare_cifar(tmp_path / "tfds"))
  config.data.cache_dir = "off"
  config.method = "linear"
  config.image_size = 8
  config.backbone.name, config.backbone.weights = "mu/4", "random"
  config.batch_size = 200
  config.total_epochs = 1.0
  config.optim.warmup_epochs = 0.0
  config.tune.lr, config.tune.wd, config.tune.seeds = (1e-3, 1e-2), (1e-4,), (42,)
  summary = tune.run(config, tmp_path / "run")["linear"]
  # 800 images choose, 1,000 train, every test image counts.
  lines = (tmp_path / "run/linear/trials.jsonl").read_text().splitlines()
  tried = [json.loads(line) for line in lines]
  steps = (tmp_path / "run/linear/search/metrics.jsonl").read_text().splitlines()
  final = json.loads((tmp_path / "run/linear/seed42/result.json").read_text())
  assert [trial["lr"] for trial in tried] == [1e-3, 1e-2]
  assert json.loads(steps[-1])["step"] == 4
  assert not any("test" in name for trial in tried for name in trial)
  assert (final["train_split"], final["steps"]) == ("train_val", 5)
  assert final["val_accuracy"] is None
  assert final["num_test_examples"] == 12
  assert final["test_accuracy"] == summary["mean"]
  assert final["preset"] == "vtab" and final["task"] == "cifar100"
  assert summary["lr"] in (1e-3, 1e-2)
  assert "cifar100" in capsys.readouterr().out


def test_an_unknown_part_after_the_colon_is_named(root):
  with pytest.raises(ValueError, match=r"'tsk=svhn'.*Did you mean 'task'"):
    load_config(root, "vtab", "tsk=svhn")

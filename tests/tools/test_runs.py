"""Which run a tool takes: --best of a folder, by val accuracy and by nothing else."""

import json
import shutil

import pytest
from tiny_runs import make_run

from insvp_jax.tools import export, runs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  return make_run(tmp_path_factory.mktemp("run"), "linear")[0]


@pytest.fixture
def search(made, tmp_path):
  """Copies a run to a name below a folder, with a result; returns the folder."""

  def add(name, result, **changes):
    workdir = shutil.copytree(made, tmp_path / "runs" / name)
    (workdir / "result.json").write_text(json.dumps(result))
    (workdir / "checkpoints" / "1" / "checksums.json").unlink()
    meta = workdir / "checkpoints" / "1" / "meta" / "metadata"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | changes))
    return tmp_path / "runs"

  return add


def test_the_best_is_that_of_val_and_the_first_of_equals(search):
  search("a/seed0", {"val_accuracy": 0.7, "test_accuracy": 0.99})
  search("b/deep/seed1", {"val_accuracy": 0.8, "test_accuracy": 0.1})
  folder = search("c", {"val_accuracy": None, "test_accuracy": 1.0})
  best, lines = runs.best_run(folder)
  assert best == folder / "b/deep/seed1"
  assert lines == [
    f"the best of 2 runs by val accuracy, 80.00%, is {best}",
    f"1 of 3 runs in {folder} have no val accuracy, as they have not finished, or were "
    "trained on val, too",
  ]
  search("z", {"val_accuracy": 0.8}, data_sha256="other")
  best, lines = runs.best_run(folder)
  assert best == folder / "b/deep/seed1"
  assert lines[1] == f"as good, and later by name: {folder / 'z'}"
  assert lines[3] == "note: they were not trained and validated on the same images"


def test_the_best_of_segmenters_is_that_of_their_metric(search):
  search("a", {"metric": "miou", "val_miou": 0.4, "val_accuracy": 0.9})
  folder = search("b", {"metric": "miou", "val_miou": 0.5})
  assert runs.best_run(folder)[0] == folder / "b"


def test_a_run_alone_is_its_own_best(made, tmp_path):
  (made / "result.json").write_text('{"val_accuracy": 0.5}')
  assert runs.best_run(made)[0] == made
  # `load_run` says what these are.
  for path in (tmp_path / "nowhere", made / "checkpoints" / "1", "hf-hub:user/name"):
    assert [str(runs.best_run(path)[0]), runs.best_run(path)[1]] == [str(path), []]


@pytest.mark.filterwarnings("ignore:the checkpoint .* has no checksums")
def test_a_tool_takes_the_best_and_says_which(search, tmp_path, capsys):
  search("a", {"val_accuracy": 0.7})
  folder = search("b", {"val_accuracy": 0.8})
  flags = [f"--run={folder}", f"--output={tmp_path / 'x.npz'}"]
  assert export.main([*flags, "--best"]) == 0
  assert f"insvp_jax: the best of 2 runs by val accuracy, 80.00%, is {folder}/b\n" in (
    capsys.readouterr().err
  )
  # Without the flag they are listed.
  assert export.main(flags) == 2
  first, *others, last = capsys.readouterr().err.splitlines()
  assert "holds 2 runs: give one of them" in first
  assert others[0].endswith("/a: insects, linear, val accuracy 70.00%")
  assert last == "  or pass --best: the one with the highest val accuracy"


@pytest.mark.parametrize(
  ("results", "changes", "message"),
  [
    ([{"test_accuracy": 1.0}, {"val_accuracy": "0.9"}], {}, "but 2 of 2 runs in"),
    ([{"val_accuracy": 0.5}] * 2, {"task": "digits"}, "have different tasks: give a"),
    (
      [{"val_accuracy": 0.5}] * 2,
      {"class_names": ["x", "y", "z"]},
      "different classes",
    ),
  ],
)
def test_what_has_no_best_is_one_line(search, capsys, results, changes, message):
  search("a", results[0])
  folder = search("b", results[1], **changes)
  assert export.main([f"--run={folder}", "--best", "--output=x.npz"]) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1

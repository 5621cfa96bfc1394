"""The profile of a step: what an operation is of, and that its time is found."""

import json

from markdown_table import cells

from benchmarks import profile_step


def named(*names: str) -> str:
  """The metadata of an operation as XLA writes it."""
  return 'metadata={op_name="' + "/".join(["jit(s)", *names]) + '"}'


MODEL, BACKWARD = "PromptedClassifier", "transpose(jvp(PromptedClassifier))"
EXP = named("encoderblock_3", "MultiHeadDotProductAttention_0", "exp")
DOT = named(BACKWARD, "encoderblock_11", "MlpBlock_0", "Dense_0", "dot_general")
HLO = f"""HloModule jit_step

%fused.1 (a: f32[2], b: f32[2]) -> f32[2] {{
  %a = f32[2]{{0}} parameter(0)
  %b = f32[2]{{0}} parameter(1)
  %exp.1 = f32[2]{{0}} exponential(%a), {EXP}
  ROOT %add.1 = f32[2]{{0}} add(%exp.1, %b), {named(MODEL, "add")}
}}

%fused.2 (a.1: f32[2,3]) -> f32[3,2] {{
  %a.1 = f32[2,3]{{1,0}} parameter(0)
  ROOT %transpose.1 = f32[3,2]{{1,0}} transpose(%a.1), dimensions={{1,0}}
}}

%body (t: (s32[], f32[2])) -> (s32[], f32[2]) {{
  %t = (s32[], f32[2]{{0}}) parameter(0)
  ROOT %dot.1 = (s32[], f32[2]{{0}}) dot(%t, %t), {DOT}
}}

ENTRY %main (x: f32[2]) -> f32[2] {{
  %x = f32[2]{{0}} parameter(0)
  %mixed.1 = f32[2]{{0}} fusion(%x, %x), calls=%fused.1, {named(MODEL, "add")}
  %copy.1 = f32[3,2]{{1,0}} fusion(%x), kind=kLoop, calls=%fused.2
  %while.1 = (s32[], f32[2]{{0}}) while(%x), condition=%cond, body=%body
  %adam.1 = f32[2]{{0}} multiply(%x, %x), {named("mul")}
  ROOT %sum.1 = f32[2]{{0}} add(%x, %x), {named(MODEL, "encoderblock_1", "add")}
}}
"""


def test_operations_are_of_the_kind_of_what_is_in_them():
  found = profile_step.operations(HLO)
  assert {name: found[name].kind for name in found if name not in "xt"} == {
    "mixed.1": "softmax",
    "copy.1": "copies",
    "adam.1": "optimizer",
    "sum.1": "sums and biases",
    # Of a loop only what it calls counts.
    "dot.1": "products",
  }
  # Blocks are not told apart, the passes are.
  assert found["dot.1"].layer == "MlpBlock_0/Dense_0/dot_general, backward"
  assert found["sum.1"].layer == "PromptedClassifier/encoderblock/add"


def test_a_profile_has_every_kind_of_a_train_step(tmp_path, capsys):
  # The program of a test of benchmarks.step, compiled once for both.
  flags = ["--backbone=mu/4", "--image_size=16", "--batch_size=4", "--num_classes=5"]
  flags += ["--methods=insvp"]
  flags += ["--steps=2", "--slowest=3", f"--json={tmp_path / 'profile'}"]
  profile_step.main(flags)
  found = json.loads((tmp_path / "profile").read_text())["insvp"]
  kinds = [*profile_step.KINDS, profile_step.COPIES, profile_step.REST]
  # On the several devices of these tests convolutions are products.
  assert set(kinds) - set(found["kinds"]) == {"spectra"}
  assert all(seconds > 0 for seconds in found["kinds"].values())
  times = [seconds for seconds, _, _ in found["operations"]]
  assert times == sorted(times, reverse=True)
  out = capsys.readouterr().out
  titles, *rows = cells(out[: out.index("\ninsvp\n")])
  assert titles == ["", "insvp"]
  whole = ["ms", "page faults", "of it in the system"]
  assert [row[0] for row in rows] == [*whole, *kinds, profile_step.IDLE]
  titles, *rows = cells(out[out.index("\ninsvp\n") :])
  assert titles == ["ms", "kind", "layer"] and len(rows) == 3

"""What a run says of itself."""

from tiny_training import make_data, tiny_config

from insvp_jax.distributed import mesh
from insvp_jax.train import report
from insvp_jax.train.program import create_program


def make_program(config):
  data = make_data()
  return create_program(config, data.num_classes, 24, mesh.create_mesh())


def test_three_rows_say_what_trains_and_the_table_names_every_leaf():
  config = tiny_config("insvp", backbone__frozen_dtype="bfloat16")
  program = make_program(config)
  titles, *rows = report.param_summary(config, program).splitlines()
  assert titles.split() == ["insvp", "parameters", "share", "bytes"]
  kinds = ["backbone, frozen", "prompter, trainable", "head, trainable"]
  assert [row[: len(kind)] for row, kind in zip(rows, kinds, strict=True)] == kinds
  count, _, size, unit = rows[0].split()[2:]
  # bfloat16 takes two bytes.
  nbytes = 2 * int(count.replace(",", ""))
  assert f"{size} {unit}" == report.bytes_text(nbytes)
  table = report.param_table(config, program)
  trainable, frozen = table.split("frozen\n")
  assert "head/kernel" in trainable and "bfloat16" in frozen
  assert "backbone" not in trainable and "backbone/embedding/kernel" in frozen


def test_pixels_of_another_range_than_the_backbone_s_are_said():
  config = tiny_config("linear", backbone__weights="boxed")
  program, data = make_program(config), make_data()
  for preset, count in (("vtab", 0), ("vpt", 1)):
    config.data.preset = preset
    lines = report.shared_text(config, program, data, "").splitlines()
    notes = [line for line in lines if line.startswith("note: the backbone was tr")]
    assert len(notes) == count
  assert "mean [0.5, 0.5, 0.5]" in notes[0] and "mean [0.485, 0.456, 0.406]" in notes[0]


def test_a_part_that_trains_in_part_has_two_rows():
  config = tiny_config("bias")
  rows = report.param_summary(config, make_program(config)).splitlines()[1:]
  assert [row.split("  ")[0] for row in rows] == [
    "backbone, trainable",
    "backbone, frozen",
    "head, trainable",
  ]

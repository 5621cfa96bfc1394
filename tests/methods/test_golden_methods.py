"""Every method against the outputs and gradients of its published code.

Each file is computed by `golden_cases.compute`, with the public model and the backbone
from a file; the files of other kinds (pixels, label mappings, Swin) are left out there.
"""

from pathlib import Path

from golden_cases import compute, family_of
import numpy as np
import pytest

# Of the largest absolute value.
OUTPUT_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
# One of the 602,112 values before this file's ReLU is 5e-8, less than rounding: it is
# passed or stopped as XLA orders the sums, and the gradients of the convolution before
# move by 1.1e-3 of their largest. So they do in fully optimised programs, too.
KINKED = {
  ("insvp_release_simam", f"grad/global_prompter/Conv_0/{leaf}")
  for leaf in ("kernel", "bias")
}
KINK_TOLERANCE = 2e-3
# Of files whose methods are elsewhere or not there yet.
OTHERS = ()
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
FILES = sorted(
  str(path.relative_to(SHARED).with_suffix(""))
  for path in SHARED.rglob("*.npz")
  if not path.stem.startswith(OTHERS)
)


def tolerance_of(name, file=""):
  if (file, name) in KINKED:
    return KINK_TOLERANCE
  is_gradient = name.startswith(("grad/", "score/"))
  return GRADIENT_TOLERANCE if is_gradient else OUTPUT_TOLERANCE


def inputs_of(file):
  """Returns the names of what a file gives, beside what it pins."""
  drawn = {"labels", "config", "token_mask", "piece_mask", "mapping", "resize"}
  drawn |= {"images", "shapes"}
  if file["config"].get("method") == "ilm_label_mapping":
    drawn |= {name for name in file if name.endswith("/counts")}
  drawn |= {name for name in file if name.endswith(("/predictions", "/labels"))}
  return drawn | {
    name for name in file if name.startswith("level_") and "labels" in name
  }


@pytest.mark.parametrize("name", FILES or [None])
def test_the_published_outputs_and_gradients(golden, recipe, name):
  file = golden(name)
  results = compute(file, recipe)
  # Nothing that the file pins is left out, and nothing else is claimed.
  assert set(results) == set(file) - inputs_of(file)
  zeros = {f"grad/{leaf}" for leaf in file["config"].get("zero_gradients", ())}
  for key, value in results.items():
    expected = np.asarray(file[key])
    assert value.shape == expected.shape, key
    if expected.dtype.kind in "iu":
      np.testing.assert_array_equal(value, expected, err_msg=key)
      continue
    error = np.max(np.abs(value - expected))
    if key in zeros:
      # Rounding noise of what is zero.
      assert error < 1e-6, f"{key}: {error:.2e}"
    else:
      error /= np.max(np.abs(expected))
      assert error < tolerance_of(key, name), f"{key}: relative error {error:.2e}"


def test_no_file_is_left_out(shared_dir):
  assert shared_dir == SHARED.parent
  assert len([name for name in FILES if name.startswith("methods/")]) == 47


def test_a_file_of_no_family_is_named():
  with pytest.raises(KeyError, match="no family of golden files for 'nothing'"):
    family_of({"method": "nothing"})


@pytest.mark.parametrize("conv", ["plain", "fft", "blocks"])
def test_every_form_of_insvp_s_convolutions(golden, recipe, conv):
  """The form that is chosen by itself is that of the test above."""
  file = golden("insvp_release")
  results = compute(file, recipe, conv=conv)
  for key, value in results.items():
    error = np.max(np.abs(value - file[key])) / np.max(np.abs(file[key]))
    assert error < tolerance_of(key), f"{key}: relative error {error:.2e}"

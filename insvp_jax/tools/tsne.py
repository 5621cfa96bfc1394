"""Vectors of images as points in the plane, by t-SNE.

vectors = tsne.vectors(run, images, "specific")
points = tsne.tsne(vectors, seed=0)  # [n, 2]
"""

from typing import Any

from jaxtyping import Float, Float32
import numpy as np

from insvp_jax.run import Run

# What of an image a vector may be.
VECTORS = ("features", "specific")
# Fewer points than these have no neighbourhoods.
MIN_POINTS = 5
# scikit-learn's own; van der Maaten and Hinton use 5 to 50.
PERPLEXITY = 30.0


def vectors(run: Run, images: Any, what: str = "features") -> Float[np.ndarray, "n d"]:
  """Returns a vector for each image.

  Args:
    run: from `load_run`.
    images: as for `Run.predict`.
    what: "features", what the head sees; or "specific", InsVP's specific prompts p^s of
      an image, one after the other, of a backbone with stages those of the last one.

  Raises:
    ValueError: the run's method makes no specific prompts, or there is no such vector.
  """
  if what not in VECTORS:
    raise ValueError(f"vectors is {what!r}, expected one of {', '.join(VECTORS)}.")
  if what == "features":
    return run.features(images)
  prompts = run.prompts(images)
  names = sorted(
    (name for name in prompts if name.split("_")[0] == "specific"),
    # "specific", or "specific_0" and so on.
    key=lambda name: int(name.partition("_")[2] or 0),
  )
  if not names:
    raise ValueError(
      f"the method {run.meta.get('method')!r} makes no specific prompts, which differ "
      "from image to image; a run of 'insvp' does. Features (vectors=features) are "
      "there of any run."
    )
  tokens = prompts[names[-1]]
  return tokens.reshape(len(tokens), -1)


def tsne(
  vectors: Float[np.ndarray, "n d"],
  *,
  seed: int = 0,
  perplexity: float | int | None = None,
) -> Float32[np.ndarray, "n 2"]:
  """Returns a point for each vector; neighbours stay neighbours, distances do not.

  Starts from the first two principal components, so that the same vectors and seed give
  the same points. The axes have no unit.

  Args:
    vectors: the vectors.
    seed: of the optimization.
    perplexity: how many neighbours count; None is 30, or a third of the others if that
      is less.

  Raises:
    ValueError: there are too few vectors, or all are the same, or one is not finite, or
      a perplexity that is not below their number.

  Source: van der Maaten and Hinton 2008, "Visualizing Data using t-SNE"; the
  implementation is scikit-learn's.
  """
  # Slow to import.
  from sklearn.manifold import TSNE
  from threadpoolctl import threadpool_limits

  vectors = np.asarray(vectors, np.float32)
  number = len(vectors)
  if number < MIN_POINTS:
    raise ValueError(
      f"t-SNE of {number} images, expected at least {MIN_POINTS}: it places an image "
      "by its neighbours."
    )
  if not np.isfinite(vectors).all():
    raise ValueError(
      "a vector for t-SNE is not finite: the run has diverged; train it with a smaller "
      "lr."
    )
  if np.ptp(vectors, axis=0).max() == 0:
    raise ValueError("the vectors of all images are the same; there is nothing to see.")
  if perplexity is None:
    perplexity = min(PERPLEXITY, (number - 1) / 3)
  if not 0 < perplexity < number:
    raise ValueError(
      f"perplexity is {perplexity}, expected a number above 0 and below {number}, the "
      "number of images."
    )
  # The start is scaled to its own spread; vectors of tiny numbers would be lost in it.
  vectors = (vectors - vectors.mean(axis=0)) / vectors.std()
  # The seed draws how the components are found; points hardly depend on it.
  found = TSNE(2, perplexity=perplexity, init="pca", random_state=seed, n_jobs=1)
  # Each of its many steps is so small that threads mostly wait for one another.
  with threadpool_limits(1):
    return found.fit_transform(vectors).astype(np.float32)

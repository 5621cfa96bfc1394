"""DAM-VP: a border of pixels for each cluster of images.

Source: Huang et al. 2023, "Diversity-Aware Meta Visual Prompting", and its published
code.

Once, before the first step: the plain backbone's features f of at most 1,000 training
images are clustered (agglomerative, average linkage, cut at a distance); the mean of
each cluster is its prototype. In training and after it an image x gets the border of
the nearest one:

  c(x) = argmin_i |f(x) - prototype_i|,    x' = x + border_c(x)

Two forms. "trained": a linear head trains beside the borders. "neurons": nothing but
the borders trains; the k logits are channels of the feature, the k that vary most over
512 images of noise.

Parameters: 12 k (S - k) for each cluster, 69,840 with the published width of 30 pixels
at 224 px. How many clusters there are is known only with the data, so that there is
room for `max_clusters`; what is left over is zero, reached by no image, and not counted
in a run's result. Prototypes do not train.

The published distances belong each to one backbone: 10 to a ViT-B of ImageNet-21k
behind its dense layer and tanh, which this package (as VPT and InsVP) leaves out; 31 to
a ViT-B of ImageNet-1k. Features of other backbones are farther apart or nearer: 31
makes one cluster of all, or each image its own. So the default is the mean distance of
the images. The code takes the first images of a shuffled epoch, and augments them; here
they come from everywhere in the split, as in evaluation.

The code means to train with momentum 0.9 and the head with an lr of its own, 0.1. By a
misspelt key it has no momentum, and its schedule gives the head the borders' lr. Here
momentum is `optim.momentum`, and the lr of a head `optim.head_lr`; the published slips
are `optim.momentum=0` and `optim.head_lr=0`.
"""

from collections.abc import Mapping
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int
import numpy as np

from insvp_jax.methods import checks
from insvp_jax.methods.base import BackboneSpec, Method
from insvp_jax.methods.fields import field
from insvp_jax.methods.ops import border

# Training images that are clustered, at most.
MOST_IMAGES = 1000
# Images of noise that tell which neurons are active, and how many make a batch.
_NUM_NOISE, _NOISE_BATCH = 512, 64


def cluster(
  features: Float[np.ndarray, "n d"], threshold: float | None, most: int
) -> Int[np.ndarray, "n"]:
  """Returns the cluster of each feature, from 0 on.

  Args:
    features: of at least two images.
    threshold: the distance at which clusters are no longer joined; None for the mean
      distance of two images.
    most: clusters; where the distance leaves more, they are joined until as many are
      left.
  """
  # Slow to import.
  from sklearn.cluster import AgglomerativeClustering
  from sklearn.metrics import pairwise_distances

  if threshold is None:
    num = len(features)
    threshold = pairwise_distances(features).sum(dtype=float) / (num * (num - 1))

  def labels(**cut: Any) -> np.ndarray:
    return AgglomerativeClustering(linkage="average", **cut).fit_predict(features)

  found = labels(n_clusters=None, distance_threshold=threshold)
  if found.max() < most:
    return found
  return labels(n_clusters=most)


class Neurons(nn.Module):
  """The head that is none: the logits are the feature's channels."""

  num_classes: int

  def __call__(
    self, features: Float[Array, "b d"], *, train: bool = False
  ) -> Float[Array, "b d"]:
    """Returns the features in float32; the method takes those of k channels."""
    del train
    return features.astype(jnp.float32)


class DAMVP(Method):
  """Adds the prompt of its cluster to the pixels of each image."""

  prompt_size: int | None = field(
    border.default_size,
    "pixels k of the borders' width; None: 30, or a quarter of the side of smaller "
    "images",
    check=checks.positive_int,
  )
  max_clusters: int = field(
    16,
    "clusters at most; where the distance leaves more, they are joined until as many "
    "are left",
    check=checks.positive_int,
  )
  distance_threshold: float | int | None = field(
    None,
    "distance of features at which clusters are no longer joined, as the published 31 "
    "for a ViT-B of ImageNet-1k; None: the mean distance of two images",
    check=checks.not_negative,
  )
  classifier: str = field(
    "trained",
    "trained (a linear head) or neurons (the feature's most active channels)",
    check=checks.one_of("trained", "neurons"),
  )
  meta: str = field(
    "",
    "an .npz file of `insvp meta_init` with the border that all start from; empty: one "
    "from N(0, 1)",
    check=checks.path,
  )

  @classmethod
  def resolve(cls, spec: BackboneSpec, values: Mapping[str, Any]) -> dict[str, Any]:
    resolved = super().resolve(spec, values)
    border.check_size(spec, resolved["prompt_size"])
    return resolved

  def __post_init__(self) -> None:
    """Checks that there are as many neurons as classes."""
    super().__post_init__()
    if self._has_neurons() and self.num_classes > self.spec.width:
      raise ValueError(
        f"classifier is 'neurons', of which the backbone's feature has "
        f"{self.spec.width}, but there are {self.num_classes} classes; expected "
        "'trained'."
      )

  @nn.nowrap
  def _has_neurons(self) -> bool:
    return self.classifier == "neurons"

  @nn.nowrap
  def _shapes(self) -> dict[str, tuple[int, ...]]:
    return border.shapes(self.spec.image_size, self.prompt_size)

  def setup(self) -> None:
    """Creates a border for each of K clusters, all alike, and prototypes [K, d]."""
    num, normal = self.max_clusters, nn.initializers.normal(1.0)

    def alike(key: Array, shape: tuple[int, ...]) -> Array:
      return jnp.tile(normal(key, shape), (num, 1, 1, 1))

    self.leaves = {n: self.param(n, alike, s) for n, s in self._shapes().items()}
    self.prototypes = self.param("prototypes", normal, (num, self.spec.width))
    self.num_clusters = self.param("num_clusters", lambda _: jnp.int32(num))
    if self._has_neurons():
      first = jnp.arange(self.num_classes, dtype=jnp.int32)
      self.neurons = self.param("neurons", lambda _: first)

  def route(self, feature: Float[Array, "b d"]) -> Int[Array, "b"]:
    """Returns the cluster with the nearest prototype."""
    # Differences, not |f|^2 - 2 f p + |p|^2, in which they would cancel.
    differences = feature[:, None].astype(jnp.float32) - self.prototypes
    distances = jnp.sum(jnp.square(differences), axis=-1)
    is_spare = jnp.arange(self.max_clusters) >= self.num_clusters
    return jnp.argmin(jnp.where(is_spare, jnp.inf, distances), axis=-1)

  def _borders(self, route: Int[Array, "b"]) -> Float[Array, "b h w c"]:
    # Products with ones and zeros: the gradient of a selection would add the images of
    # a cluster in any order.
    chosen = jax.nn.one_hot(route, self.max_clusters, dtype=jnp.float32)
    leaves = {
      name: jnp.einsum(
        "bk,k...->b...", chosen, leaf, precision=jax.lax.Precision.HIGHEST
      )
      for name, leaf in self.leaves.items()
    }
    return border.image(leaves)

  def prompt_image(self, images, *, route, train=False):
    del train
    return images + self._borders(route).astype(images.dtype)

  def prompts(
    self, images: Float[Array, "b h w c"], *, route: Int[Array, "b"]
  ) -> dict[str, Array]:
    """Returns {"image": [b, h, w, 3]}, the border of each image's cluster."""
    del images
    return {"image": self._borders(route)}

  @nn.nowrap
  def head(self, linear: nn.Module) -> Any:
    return Neurons(self.num_classes) if self._has_neurons() else linear

  def adapt_logits(self, logits, *, train=False):
    del train
    return logits[:, self.neurons] if self._has_neurons() else logits

  @nn.nowrap
  def claims(self) -> frozenset[str]:
    # Where a head trains it is anyone's.
    return super().claims() - (frozenset() if self._has_neurons() else {"head"})

  @nn.nowrap
  def prepare(self, params, batches, apply):
    """Returns the parameters, with prototypes, and what follows from their number."""

    def features(images: Any) -> Float32[np.ndarray, "b d"]:
      return np.asarray(apply.backbone(params, images)[0], np.float32)

    rows = [
      features(batch["images"])[np.asarray(batch["mask"]) > 0]
      for batch in batches(MOST_IMAGES)
    ]
    clustered = np.concatenate(rows)
    if len(clustered) < 2:
      raise ValueError(
        f"there is {len(clustered)} training image, but dam_vp clusters them: give at "
        "least 2."
      )
    labels = cluster(clustered, self.distance_threshold, self.max_clusters)
    num = labels.max() + 1
    prototypes = np.zeros((self.max_clusters, self.spec.width), np.float32)
    for i in range(num):
      prototypes[i] = clustered[labels == i].mean(axis=0, dtype=np.float64)
    own = {
      **params["prompter"],
      "prototypes": prototypes,
      "num_clusters": np.int32(num),
    }
    side, size = self.spec.image_size, self.prompt_size
    start = border.read(self.meta, side, size) if self.meta else {}
    is_used = (np.arange(self.max_clusters) < num)[:, None, None, None]
    for name in border.SIDES:
      leaf = np.asarray(jax.device_get(own[name]))
      # Zeros take no room where they are stored.
      own[name] = np.where(is_used, start.get(name, leaf), np.float32(0))
    if self._has_neurons():
      own["neurons"] = self._most_active(features)
    return {**params, "prompter": own}

  @nn.nowrap
  def _most_active(self, features: Any) -> Int[np.ndarray, "k"]:
    """Returns the channels that vary most over images of noise, ascending."""
    rng, side = np.random.default_rng(0), self.spec.image_size
    shape = (_NOISE_BATCH, side, side, 3)
    rows = [
      features(rng.standard_normal(shape, np.float32))
      for _ in range(_NUM_NOISE // _NOISE_BATCH)
    ]
    spread = np.std(np.concatenate(rows), axis=0, dtype=np.float64)
    order = np.argsort(-spread, kind="stable")
    return np.sort(order[: self.num_classes]).astype(np.int32)

  @nn.nowrap
  def spare_params(self, params: Mapping[str, Any]) -> int:
    """Returns the parameters of borders beyond the number of clusters."""
    of_one = sum(math.prod(shape) for shape in self._shapes().values())
    num = int(jax.device_get(params["num_clusters"]))
    return (self.max_clusters - num) * of_one

  @nn.nowrap
  def trainable_patterns(self) -> tuple[str, ...]:
    """Returns the patterns of the borders and, where one trains, the head."""
    head = () if self._has_neurons() else ("head/.*",)
    return (f"prompter/({'|'.join(border.SIDES)})", *head)

"""Pretrained weights: found, downloaded, read, checked and written."""

from insvp_jax.models.weights.downloads import (
  atomic_file,
  file_digest,
  hub_folder,
  resolve,
)
from insvp_jax.models.weights.load import load_backbone, save_backbone
from insvp_jax.models.weights.published import (
  architecture_of,
  are_sizes_known,
  backbone_fields,
  is_file_name,
  is_remote,
  pixels_of,
)
from insvp_jax.models.weights.releases import RELEASES, Release
from insvp_jax.models.weights.report import LoadReport

__all__ = [
  "RELEASES",
  "LoadReport",
  "Release",
  "architecture_of",
  "are_sizes_known",
  "atomic_file",
  "file_digest",
  "hub_folder",
  "is_file_name",
  "is_remote",
  "load_backbone",
  "pixels_of",
  "resolve",
  "save_backbone",
  "backbone_fields",
]

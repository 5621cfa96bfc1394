"""Backbones, heads and the classifier that joins them with a method."""

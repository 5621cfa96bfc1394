"""Pretrained weights: found, downloaded, read, checked and written."""

"""Devices and processes: meshes, shardings, locks, signals."""

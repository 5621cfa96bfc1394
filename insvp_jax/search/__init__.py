"""Searches over hyper-parameters, groups of tasks, and their tables."""

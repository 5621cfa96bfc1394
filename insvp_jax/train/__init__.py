"""Training: one run, from a config to a result."""

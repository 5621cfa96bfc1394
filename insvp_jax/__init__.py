"""insvp_jax: instance visual prompting of frozen Vision Transformers in JAX."""

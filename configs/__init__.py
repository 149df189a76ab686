"""Configurations; in a wheel, and after `pip install -e .`, also worldr1_jax.configs."""

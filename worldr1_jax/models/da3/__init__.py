"""Depth Anything 3: depth, cameras and Gaussians of a video."""

from worldr1_jax.models.da3.config import Config
from worldr1_jax.models.da3.model import DA3, load, save

__all__ = ["DA3", "Config", "load", "save"]

"""Models that sample videos: loaded (wan.py), compiled on the mesh (stages.py), used
(generate.py)."""

"""Layers that networks share: products, norms, rotations, attention, LoRA."""

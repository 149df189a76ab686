"""Wan2.1: the DiT (dit.py), its VAE (vae.py), and LoRA files for it."""

"""3D Gaussians to pictures: render.py (start here), over tiles, by a kernel, or exactly."""

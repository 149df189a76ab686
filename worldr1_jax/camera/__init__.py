"""Camera: words -> movements -> path -> flow -> noise that moves with the camera.

In flow order: `commands` (text to names), `trajectory` (names to camtoworld), `flow` (two poses
to pixel motion), `noise_warp` (pixel motion to Gaussian noise, and its injection into latents).
"""

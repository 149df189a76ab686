"""The nano world: its scenes, captions and shipped weights, small enough for two CPU cores."""

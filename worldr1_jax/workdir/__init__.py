"""What a run leaves: checkpoints and metrics."""

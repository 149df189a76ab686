"""Learning from rewards: advantage.py, loss.py, update.py (train_step: start here)."""

"""Learning from rewards: advantage.py, grpo.py, update.py (train_step: start here)."""

"""Held-out prompts before and after; scores of video files; intervals and pictures."""

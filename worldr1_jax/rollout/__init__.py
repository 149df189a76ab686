"""Sampling of videos by the policy: schedule.py, sde.py (one step of Euler's method or of an SDE),
unipc.py (one step of UniPC), sample.py (the scan)."""

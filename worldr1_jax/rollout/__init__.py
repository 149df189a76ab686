"""Sampling of videos by the policy: schedule.py, sde.py (one step), sample.py (the scan)."""

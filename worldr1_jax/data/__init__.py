"""Prompt files (`prompts`), our own prompts (`world_prompts`), whose turn it is (`phases`), and
batches of prompts (`loader`)."""

"""Prompt files (`prompts`), whose turn it is (`phases`), and batches of prompts (`loader`)."""

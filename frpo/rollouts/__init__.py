"""Sampling the completions of a batch of prompts."""

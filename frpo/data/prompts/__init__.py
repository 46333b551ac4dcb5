"""Prompts to answer: their sources, their encoding, and the DataModule of policy optimisation."""

"""Suites of prompts and scores, their intervals, and agreement with human labels."""

"""Scoring completions: rules, reward models, judges, answers, and their composition and routing by task."""

"""Judged responses, in pairs or with labels, and the DataModule of reward models."""

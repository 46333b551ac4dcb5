"""The memory of a run, traced on tensors without data."""

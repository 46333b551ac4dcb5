"""Training a reward model from preference pairs or labelled responses."""

"""Grids of runs that resume: train, fine-tune, measure."""

"""Answers to imitate: their sources and layouts, and the DataModule of supervised fine-tuning."""

"""Tuned lenses: fitting, evaluation and files. Uses `rows` and `support`."""

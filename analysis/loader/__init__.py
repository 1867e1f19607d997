"""Batches of rows for training: shuffled, divided, resumable. Uses `rows` and `support`."""

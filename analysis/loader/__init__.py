"""Batches of rows for training: shuffled, divided over ranks and workers, resumable. Uses `rows` and `support`."""

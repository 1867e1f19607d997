"""Scores of attention heads, from stored patterns or from queries and keys. Uses `support`."""

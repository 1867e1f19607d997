"""Activation patching and its linear estimate, for one pair of examples at a time. Uses `replay` and below."""

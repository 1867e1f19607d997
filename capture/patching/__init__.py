"""Activation patching and its linear estimate over sites, positions and heads. Uses `replay` and below."""

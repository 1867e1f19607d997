"""Sweeps of patching and attribution, and induction heads. Uses `replay` and below."""

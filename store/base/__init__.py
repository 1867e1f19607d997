"""Errors, the canonical JSON behind every digest, and the checks of untrusted input. Uses no other folder."""

"""Tiny models of every kind, and the sweep that tries the library on them."""

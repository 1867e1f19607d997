"""Tiny models of every kind, and the sweep that tries the library on them."""

from tests.models.tiny import ODD, SPLIT, TINY

__all__ = ["ODD", "SPLIT", "TINY"]

"""Tests with several workers, and what they share."""

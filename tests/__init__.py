"""Tests, by room. Run from the repository root; packages, so that they can share what they build."""

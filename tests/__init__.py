"""Tests, in the folders of the rooms. Run them from the repository root: they are packages and share code."""

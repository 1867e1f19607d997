"""Tests of residua.capture."""

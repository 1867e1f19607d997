"""Tests of residua.analysis."""

"""Tests of residua.store."""

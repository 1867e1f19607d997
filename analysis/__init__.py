"""Offline analysis of archives, without the model."""

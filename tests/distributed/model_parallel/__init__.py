"""Replicas that several ranks hold together: captures, recorders, killed ranks."""

"""Stored rows back into a model: `replay` is the public story, `engine` runs the passes. Uses `edits` and below.

`start` decides which blocks are skipped, `notes` says how a run differs from the capture, `metrics` measures logits.
"""

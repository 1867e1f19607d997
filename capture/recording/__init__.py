"""From a running model to an archive: `record` for a plan's batches, `Recorder` for the user's own loop.

Uses `replay` and below.
"""

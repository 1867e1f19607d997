"""From a running model to an archive: `record` for a plan's batches, `Recorder` for a loop of the user's own.

Uses `replay` and below.
"""

"""Opening an archive: arrays, rows, texts, the summary and verification.

Needs no torch and no model. Uses `examples`.
"""

"""Reading an archive: its arrays, rows, examples and texts, a summary in numbers, and verification.

Needs no torch and no model. Uses `examples`.
"""

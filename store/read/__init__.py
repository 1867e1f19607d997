"""Reading an archive: its arrays, rows, examples and texts, and a summary in numbers.

Needs no torch and no model. Uses `examples`.
"""

"""Tuned lenses: training from an archive, evaluation on held-out rows, files, and the LM head that decodes them.

`lens` is the entry. Uses `rows` and `support`.
"""

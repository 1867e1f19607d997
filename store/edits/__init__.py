"""Edits as data: what an edit is, its parser, the files and archives that it takes values from, overlays.

Needs no torch, except to read a lens. Uses `selection`.
"""

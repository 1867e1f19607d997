"""Edits as data: what an edit is, its parser, its vectors, the rows it selects, overlays. Uses `read`."""

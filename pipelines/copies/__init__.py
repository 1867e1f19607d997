"""Rows of archives written again: a subset, several joined, and rows in the files of other programs.

Uses `analysis.rows` and `store`; needs no model.
"""

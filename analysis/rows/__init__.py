"""Rows of an archive as blocks, matrices, Dask arrays and tables, their columns, and the held-out split.

Uses `support`.
"""

"""The example table, one line an example in Parquet, and the schedule of batches that follows from it.

Uses `format`.
"""

"""The example table (Parquet, one line for each example), and the schedule of batches that follows from it.

Uses `format`.
"""

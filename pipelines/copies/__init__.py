"""Parts of an archive elsewhere: a subset as an archive of its own, and rows in the files of other programs.

Uses `analysis.rows` and `store`; needs no model.
"""

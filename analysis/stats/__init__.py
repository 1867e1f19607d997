"""Statistics of sites: moments, outliers, and the rows that lie furthest along a direction.

Uses `rows` and `support`.
"""

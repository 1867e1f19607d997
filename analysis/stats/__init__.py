"""Statistics of sites: moments, outliers, principal components, and the rows that lie furthest along a direction.

Uses `rows` and `support`.
"""

"""Linear probes of the rows: what they predict, controls, ridge and logistic regression, and their files.

Uses `rows` and `support`.
"""

"""Edits applied to tensors: `prepare` turns an edit, which is data, into a change of the rows at each site.

`kinds` holds one function for each kind of edit, `action` the types between them. Uses `identity` and below.
"""

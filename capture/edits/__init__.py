"""Edits applied to tensors: from an edit as data to what happens at a site. Uses `identity` and below."""

"""Which process holds what of a model and its tensors: proved layouts, gathering, local shards, full parameters.

Uses `buffers` and below.
"""

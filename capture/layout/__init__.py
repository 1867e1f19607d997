"""Which process holds which part of a tensor: proved layouts, gathering, local shards, parameters.

Uses `buffers` and below.
"""

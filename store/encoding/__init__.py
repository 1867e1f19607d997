"""From values to the bytes of a shard and back: dtypes, codecs, lossy arithmetic, shard files.

Uses `storage` and `base`.
"""

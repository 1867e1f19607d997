"""The archive's own records and how they are written: plan, site names, metadata, shards, commits, sidecar files.

Uses `encoding`, `storage` and `base`.
"""

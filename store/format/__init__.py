"""The archive's own records, and who writes them: plan, site names, array metadata, commits, sidecar files.

Uses `encoding`.
"""

"""What follows from complete shards: sealing an archive with its packed index, what was lost, and files lost since.

Uses `format` and what is below it.
"""

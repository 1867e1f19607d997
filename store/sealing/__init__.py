"""What happens to complete shards: sealing an archive with its packed index, and finding shards that lost files since.

Uses `format` and what is below it.
"""

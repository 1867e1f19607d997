"""Which worker does which shards: membership and heartbeats, worker groups, work queues, ownership of sites.

Uses `runtime` only.
"""

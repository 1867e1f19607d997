"""Which worker does which shards: membership of the worker group, the work queue and claims on it. Uses `runtime`."""

"""Does the archive hold what it held when it was written? Every file is read again, by threads or on a Dask cluster.

Damage is reported, and raises nothing.
"""

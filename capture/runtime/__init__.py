"""What torch is at run time: devices, streams, wrappers around models, process groups, pipeline schedules.

Uses `store` only.
"""

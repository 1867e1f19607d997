"""What torch, transformers and accelerate are at run time: devices, streams, wrappers, process groups, collectives.

Also pipeline schedules, and `compat`: every private name of these libraries that the project uses. Uses `store` only.
"""

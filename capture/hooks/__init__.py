"""Read and replace tensors at sites while the model runs: hooks on modules, attention functions, parts that run again.

`hooks` adds them and removes them again. Uses `scheduling` and below.
"""

"""Read and replace the tensors of a model while it runs, forward and backward, in any layout over processes.

Uses `layout` and below.
"""

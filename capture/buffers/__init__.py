"""From tensors on a device to rows in host memory: host buffers, copies from devices, the row index.

Uses `sites` and below.
"""

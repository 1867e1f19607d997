"""From tensors on a device to rows in host memory: offload, host buffers, the row index. Uses `sites` and below."""

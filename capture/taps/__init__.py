"""Reading and replacing full tensors while a model runs, forward and backward. Uses `layout` and below."""

"""Rows back into the model: starting at a layer, edits, gradients, generation, metrics. Uses `edits` and below."""

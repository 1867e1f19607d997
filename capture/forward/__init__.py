"""Forward passes over the batches of a plan: padded inputs, microbatches, the arguments of the model.

Uses `taps` and below.
"""

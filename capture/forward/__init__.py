"""Running the batches of a plan: padded inputs and the forward passes over them. Uses `taps` and below."""

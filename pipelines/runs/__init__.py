"""`residua.run` and `residua.replay`: runs of a model over few examples, and their views. Uses `capture` and below."""

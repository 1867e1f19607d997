"""What the sweep checks of a model, by what the model takes: tokens, pairs, images, or a call of any kind."""

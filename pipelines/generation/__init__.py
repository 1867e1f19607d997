"""Text that a model generates, as examples of a capture: prompts continued batch by batch, and kept as they come."""

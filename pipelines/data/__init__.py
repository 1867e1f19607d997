"""From a dataset to examples: sources, tokens, windows and positions. Uses the rooms only."""

"""From a dataset to examples: settings, sources, tokens, windows and positions. Uses `capture` and `store`."""

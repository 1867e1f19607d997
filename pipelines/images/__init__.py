"""From a dataset with images to examples: opened without trust, kept on disk until their batch, patch by patch."""

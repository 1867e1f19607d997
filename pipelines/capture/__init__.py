"""From a model and a dataset to an archive: `capture` tells the story, `reproduce` checks it. Uses `jobs` and below."""

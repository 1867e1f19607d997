"""From a model and a dataset to an archive: plan, capture, resume, reproduce. Uses `jobs` and below."""

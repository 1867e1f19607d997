"""What a job runs with: settings, and models and tokenizers loaded by name. Uses `data`, `capture` and `store`."""

"""From a running model to rows: sites, hooks, staging and the recorder."""

"""From a running model to rows: sites, hooks, host buffers and the recorder."""

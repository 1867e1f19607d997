"""Jobs that find circuits: patching and attribution sweeps, induction heads. Uses `replay` and below."""

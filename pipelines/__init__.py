"""One thin job each, and the command line."""

"""What lies on disk: plan, format, codecs, shards, commits and the archive. Imports no torch."""

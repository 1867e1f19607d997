"""Real servers on loopback: files over HTTP with faults on demand, and S3."""

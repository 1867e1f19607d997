"""Access to bytes: durable files, locks, checksums, and writing past the page cache. Uses `base`."""

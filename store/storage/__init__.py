"""The one door to bytes: durable files, locks, checksums, writing past the page cache. Uses `base`."""

"""Which model this is: fingerprint, provenance, LM head, and the sidecar files that an archive keeps about it.

Uses `forward` and below.
"""

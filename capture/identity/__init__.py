"""Which model this is: fingerprint, provenance, LM head, tokenizer, and the files that keep them.

Uses `forward` and below.
"""

"""Archives that travel: copied to and from buckets, web servers and the Hub.

Uses `read` and below.
"""

"""What one run of a block shows: its modules, what it adds to the residual stream, and its mixture of experts.

Uses `hooks` and below.
"""

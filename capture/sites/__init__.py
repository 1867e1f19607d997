"""From a site's name to a module of the model: architectures, hooks, attention, measured shapes.

Uses `scheduling` and below.
"""

"""From a site's name to a module of the model: architectures, hooks, attention, shape probing, the reference model.

`names_to_modules` is where a site's name becomes a module. Uses `scheduling` and below.
"""

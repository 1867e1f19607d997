"""Which sites a model has, and which module each is: the table of architectures, discovery, the reference model.

`names_to_modules` is where a site's name becomes a module. Uses `blocks` and below.
"""

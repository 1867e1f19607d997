"""A static page of an archive: sites, examples coloured by what their rows measure, directions, lenses and heads.

It uses the statistics, lenses, probes and attention weights of the other folders, and no model.
"""

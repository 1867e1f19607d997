"""Selecting rows, tokens and examples: conditions, number lists, keys of edits and position rules, with one evaluator.

Needs no torch and no dask. Uses `read`.
"""

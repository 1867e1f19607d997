"""Selecting rows, tokens and examples: one grammar for every text form, one evaluator for every condition.

Needs no torch and no dask. Uses `read`.
"""

"""Whole archives through the model again: tables, archives of what follows, fidelity. Uses `capture` and below."""

"""Replays of archives: tables of what edits change, archives of what follows, fidelity. Uses `capture` and below."""

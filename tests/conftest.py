"""Settings of all tests."""

from hypothesis import settings

# No deadlines, since machines are shared; the same examples on every run, since a flake is a broken test.
settings.register_profile("residua", deadline=None, derandomize=True)
settings.load_profile("residua")

"""Settings of all tests."""

from hypothesis import settings

# No deadlines, because machines are shared. The same examples on every run: a test must not fail at random.
settings.register_profile("residua", deadline=None, derandomize=True)
settings.load_profile("residua")

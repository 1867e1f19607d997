"""Settings of all tests."""

import pytest
from hypothesis import settings

# No deadlines, because machines are shared. The same examples on every run: a test must not fail at random.
settings.register_profile("residua", deadline=None, derandomize=True)
settings.load_profile("residua")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that have slow tests, so that no process is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)

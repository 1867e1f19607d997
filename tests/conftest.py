"""Settings of all tests, and what many share: the process that forks, and the S3 server."""

import gc
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import settings

from tests.forking import ForkedWorkers
from tests.servers.s3 import S3Server, serving_s3

# No deadlines, because machines are shared. The same examples on every run: a test must not fail at random.
settings.register_profile("residua", deadline=None, derandomize=True)
settings.load_profile("residua")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that have slow tests, so that no process is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Import everything without garbage collections, and spare later ones these million objects: they stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serving_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def forked_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedWorkers]:
    with closing(ForkedWorkers(tmp_path_factory.mktemp("logs"))) as process:
        yield process

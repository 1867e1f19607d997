"""The process that forks workers, shared by all tests here."""

from collections.abc import Iterator

import pytest

from tests.distributed.workers.forked_workers import ForkedWorkers


@pytest.fixture(scope="session")
def forked_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedWorkers]:
    process = ForkedWorkers(tmp_path_factory.mktemp("logs"))
    try:
        yield process
    finally:
        process.close()

"""One process that forks workers, for all tests here."""

from collections.abc import Iterator

import pytest

from tests.distributed.gang import Gang


@pytest.fixture(scope="session")
def gang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gang]:
    process = Gang(tmp_path_factory.mktemp("logs"))
    try:
        yield process
    finally:
        process.close()

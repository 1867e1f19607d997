"""One process that forks captures, for all tests here."""

from collections.abc import Iterator

import pytest

from tests.pipelines.forking import Forks, forking


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with forking(tmp_path_factory.mktemp("logs")) as process:
        yield process

"""Fixtures for all tests here: a process that forks captures, and tokens and a model for small captures."""

from collections.abc import Iterator

import pytest
from transformers import PreTrainedModel

from tests.models.tiny import TINY
from tests.pipelines.forking import Forks, forking
from tests.pipelines.small_capture import make_tokens


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with forking(tmp_path_factory.mktemp("logs")) as process:
        yield process


@pytest.fixture(scope="module")
def tokens() -> list[list[int]]:
    return make_tokens()


@pytest.fixture
def llama() -> PreTrainedModel:
    return TINY["llama"]()

"""Fixtures for all tests here: command lines in forked processes, and tokens and a model for small captures."""

import pytest
from transformers import PreTrainedModel

from tests.forking import ForkedWorkers, Forks
from tests.models.tiny import TINY
from tests.pipelines.small_capture import make_tokens


@pytest.fixture(scope="session")
def forks(forked_workers: ForkedWorkers) -> Forks:
    return Forks(forked_workers)


@pytest.fixture(scope="module")
def tokens() -> list[list[int]]:
    return make_tokens()


@pytest.fixture
def llama() -> PreTrainedModel:
    return TINY["llama"]()

"""Arrays and archives that many tests here read, and copies of them that a test may damage."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.store.samples import make_spec
from tests.store.small_archive import make_archive
from tests.store.stored_array import Stored, store

# Tests that compare the store with models and captures; `make test-reader` runs the others without torch.
collect_ignore = (
    []
    if find_spec("torch")
    else ["edits/test_edits.py", "format/test_commits.py", "format/test_format.py", "read/test_archive.py"]
)


@pytest.fixture(scope="module", params=["raw", "fast"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return store(tmp_path_factory.mktemp("archive"), make_spec(request.param, row_shape=(3, 5)))


@pytest.fixture
def fresh(stored: Stored, tmp_path: Path) -> Stored:
    """The same array in a folder that a test may damage."""
    return store(tmp_path, stored.spec)


@pytest.fixture(scope="session")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_archive(tmp_path_factory.mktemp("untouched") / "a.zarr")


@pytest.fixture
def copy(untouched: Path, tmp_path: Path) -> Path:
    """A copy of `untouched` that a test may damage."""
    return Path(shutil.copytree(untouched, tmp_path / "a.zarr"))

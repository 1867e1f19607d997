"""Arrays and archives that many tests here read, and copies of them that a test may damage."""

import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.store.samples import Stored, make_spec, store
from tests.store.small_archive import make_archive

FOLDER = Path(__file__).parent
NEEDS_A_MODEL = re.compile(
    r"^(import|from) (torch|residua\.(analysis|capture|pipelines)|tests\.models)\b", re.MULTILINE
)
# `make test-reader` runs, in an environment without torch, what does not compare the store with models and captures.
collect_ignore = [
    str(path) for path in FOLDER.rglob("test_*.py") if not find_spec("torch") and NEEDS_A_MODEL.search(path.read_text())
]


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

"""Every layout, with real processes: sites, gradients, edits and training agree with one process.

There is one test for each launch and not for each layout, because starting ranks takes time.
"""

import json
from pathlib import Path

import pytest

from tests.distributed.layouts.launches import LAYOUTS, ROOT, launch
from tests.forking import ForkedWorkers

pytestmark = pytest.mark.slow
COMPARED = ("tried", "layout", "model", "what", "n_sites", "bound", "reason")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all launches: what one process gives is computed once."""
    return tmp_path_factory.mktemp("launches")


@pytest.mark.parametrize("name", LAYOUTS)
def test_spread_models_agree_with_one_process(forked_workers: ForkedWorkers, name: str, folder: Path) -> None:
    found = launch(forked_workers, name, folder)
    failures = {layout: result["failure"] for layout, result in found.items() if "failure" in result}
    assert not failures, "\n".join(f"{layout}: {failure}" for layout, failure in failures.items())
    rows = [{"tried": layout, **row} for layout, result in found.items() for row in result["rows"]]
    assert [row for row in rows if row["error"] > row["bound"]] == []
    table = json.loads((ROOT / "docs" / "layouts.json").read_text())
    shown = [[row[key] for key in COMPARED] for row in table if row["launch"] == name]
    assert shown == [[row[key] for key in COMPARED] for row in rows], "run scripts/layouts_table.py: the table is old"


def test_what_cannot_be_done_right_is_refused(forked_workers: ForkedWorkers, folder: Path) -> None:
    found = launch(forked_workers, "refusals", folder)
    failures = {check: result["failure"] for check, result in found.items() if "failure" in result}
    assert not failures, "\n".join(f"{check}: {failure}" for check, failure in failures.items())

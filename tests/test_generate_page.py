"""Run the code of docs/generate.md."""

from pathlib import Path
from typing import Any

import pytest

from tests.pages import ROOT, blocks, run


def test_the_code_does_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {"work": tmp_path}
    run(blocks("docs/generate.md"), names)
    n_new = sum(sum(example["generated"]) for example in names["examples"])
    assert names["first"]
    assert len(names["examples"]) == 2
    assert names["new"].sites["n_rows"].to_pylist() == [n_new]
    assert names["rows"].n_rows <= 24

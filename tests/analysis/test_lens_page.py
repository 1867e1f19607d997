"""The lens section of docs/analysis.md, run as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest

import residua
from tests.analysis.lens_archive import make_lens_archive

PAGE = Path(__file__).parents[2] / "docs" / "analysis.md"


def test_every_block_does_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_lens_archive(tmp_path / "acts.zarr")
    monkeypatch.chdir(tmp_path)
    section = PAGE.read_text().partition("## Tuned lens")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names: dict[str, Any] = {"residua": residua}
    for block in blocks:
        exec(block, names)  # noqa: S102  # the page's own code is what is tested
    assert len(blocks) == 2
    assert names["logits"].shape == (3, 97)
    assert names["final"].shape == (3, 32)
    assert (tmp_path / "copy" / "params.pt").is_file()

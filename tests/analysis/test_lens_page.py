"""The lens section of docs/analysis.md, run as it stands there."""

import json
import re
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

import residua
from residua.pipelines.cli import main

ROOT = Path(__file__).parents[2]
SECTION = re.split(r"^## ", (ROOT / "docs" / "analysis.md").read_text(), flags=re.MULTILINE)


def blocks(language: str) -> list[str]:
    (section,) = [part for part in SECTION if part.startswith("Tuned lens\n")]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def test_every_block_does_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dataset is shorter here: three topics of the documentation instead of all."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    (tmp_path / "demo").mkdir()
    lines = [json.dumps({"text": text}) for text in list(topics.values())[:3]]
    (tmp_path / "demo" / "topics.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    capture, train, show = blocks("console")[0].replace("\\\n", " ").strip().splitlines()
    assert main([word.strip("'") for word in capture.split()[2:]]) == 0
    assert main([*train.split()[2:], "--scheduler", "inline"]) == 0
    assert main(show.split()[2:]) == 0
    (tmp_path / "lens").rename(tmp_path / "from the command line")
    names: dict[str, Any] = {"residua": residua}
    for block in blocks("python"):
        exec(block, names)  # noqa: S102  # the page's own code is what is tested
    assert len(blocks("python")) == 2
    assert names["logits"].shape == (3, 1024)
    assert names["final"].shape == (3, 128)
    assert (tmp_path / "copy" / "params.pt").is_file()

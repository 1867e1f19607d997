"""The code of docs/heads.md, run as it stands there."""

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

import residua
from residua.analysis.attention.heads import MEASURES
from residua.pipelines.cli.main import main
from tests.pages import ROOT, blocks, run

PAGE = "docs/heads.md"


def test_every_block_does_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")
    lines = [json.dumps({"text": topics[title]}) for title in sorted(topics)[:6]]
    (tmp_path / "topics.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    commands = blocks(PAGE, language="console")[0].splitlines()
    for command in commands:
        assert command.startswith("$ residua ")
        inline = ["--scheduler", "inline"] if command.split()[2] == "heads" else []
        assert main([*command.split()[2:], *inline]) == 0
    assert len(list(Path("heads", "heads").iterdir())) == 24
    names: dict[str, Any] = {"residua": residua}
    run(blocks(PAGE), names)
    assert {(line["layer"], line["head"]) for line in names["strongest"]} == {(3, head) for head in range(4)}
    assert all(f"| `{name}` |" in (ROOT / PAGE).read_text() for name in MEASURES)
    assert names["measures"].column_names == ["layer", "head", *MEASURES]
    assert names["without_files"].equals(names["measures"].slice(12, 4))

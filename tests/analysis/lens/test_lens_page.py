"""docs/lens.md, run as it stands there."""

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

import residua
from residua.pipelines.cli.main import main
from tests.pages import ROOT, blocks, run

PAGE = "docs/lens.md"


def test_every_block_does_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dataset is shorter here: three topics of the documentation instead of all."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    (tmp_path / "demo").mkdir()
    lines = [json.dumps({"text": text}) for text in list(topics.values())[:3]]
    (tmp_path / "demo" / "topics.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    capture, train, show = blocks(PAGE, language="console")[0].replace("\\\n", " ").strip().splitlines()
    assert main([word.strip("'") for word in capture.split()[2:]]) == 0
    assert main([*train.split()[2:], "--scheduler", "inline"]) == 0
    assert main(show.split()[2:]) == 0
    (tmp_path / "lens").rename(tmp_path / "from the command line")
    names: dict[str, Any] = {"residua": residua}
    assert len(blocks(PAGE)) == 2
    run(blocks(PAGE), names)
    assert names["logits"].shape == (3, 1024)
    assert names["final"].shape == (3, 128)
    assert (tmp_path / "copy" / "params.pt").is_file()

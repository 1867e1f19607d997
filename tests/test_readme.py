"""Run the commands and the code of README.md on a few topics of the demo's text."""

import json
import re
import shlex
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

import residua
from residua.pipelines.cli.main import main
from tests.pages import ROOT, blocks, run

PAGE = "README.md"
ON_A_CLUSTER = ("lens", "induction", "heads", "probe", "stats", "top", "page")
"""Jobs that start processes, which takes seconds; here they run in this process."""
TOPICS = ("async", "atom-identifiers", "atom-literals", "attribute-references")
"""Short ones: every command of the page reads their rows."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the working folder of a reader, with the files that the page shows."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "models").symlink_to(ROOT / "models")
    (folder / "demo").mkdir()
    lines = [json.dumps({"title": title, "text": topics[title]}) for title in TOPICS]
    (folder / "demo" / "topics.jsonl").write_text("\n".join(lines))
    shown = dict(re.findall(r"\$ cat (\S+)\n(.*)\n", "".join(blocks(PAGE, language="console"))))
    assert shown.keys() == {"edits.yaml", "pairs.jsonl"}
    for name, content in shown.items():
        (folder / name).write_text(content)
    return folder


def commands() -> list[list[str]]:
    """Return every command of the page, without comments."""
    text = "".join(blocks(PAGE, language="console")).replace("\\\n", " ")
    found = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("$ residua ")]
    return [words[2:] for words in found]


@pytest.mark.slow
def test_every_block_does_what_the_page_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    torch.set_num_threads(1)
    for words in commands():
        inline = ["--scheduler", "inline"] if words[0] in ON_A_CLUSTER else []
        assert main([*words, *inline]) == 0, words
    names: dict[str, Any] = {}
    run(blocks(PAGE), names)
    assert names["archive"].is_sealed
    assert residua.open("loop.zarr").examples["label"].to_pylist() == ["function", "call", "class"]
    assert names["scores"].num_rows == 24
    assert names["gradients"].keys() == {f"resid_post.{layer}" for layer in range(6)}
    assert names["lens"].weight.grad.any()

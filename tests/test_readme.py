"""Run the commands and the code of README.md on a few topics of the demo's text."""

import json
import re
import shlex
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from residua.pipelines.cli.main import main
from tests.pages import ROOT, blocks, run

PAGE = "README.md"
ON_A_CLUSTER = ("lens", "induction", "probe", "stats", "top")
"""Jobs that start processes, which takes seconds; here they run in this process."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the working folder of a reader, with the files that the page shows."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "models").symlink_to(ROOT / "models")
    (folder / "demo").mkdir()
    lines = [json.dumps({"title": title, "text": topics[title]}) for title in sorted(topics)[2:6]]
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


def test_every_block_does_what_the_page_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    torch.set_num_threads(1)
    for words in commands():
        inline = ["--scheduler", "inline"] if words[0] in ON_A_CLUSTER else []
        assert main([*words, *inline]) == 0, words
    model = AutoModelForCausalLM.from_pretrained("models/pydoc-1m")
    tokenizer = AutoTokenizer.from_pretrained("models/pydoc-1m")
    batch = tokenizer(["def f(x):"], return_tensors="pt")
    names: dict[str, Any] = {"model": model, "torch": torch, "loader": [{**batch, "label": ["a"]}]}
    code = blocks(PAGE)
    assert len(code) == 7
    run(code[:6], names)
    names |= {"gradients": {}, "lens": nn.Linear(128, 128), "batch": {**batch, "labels": batch["input_ids"]}}
    run(code[6:], names)
    assert names["archive"].is_sealed
    assert names["scores"].num_rows == 24
    assert names["gradients"].keys() == {f"resid_post.{layer}" for layer in range(6)}
    assert names["lens"].weight.grad.any()

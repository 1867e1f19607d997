"""Run the code of docs/capture.md, and check that its settings exist."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from residua.pipelines.setup.capture_settings import CaptureSettings, read_config
from residua.store.encoding.codecs import PRESETS
from tests.pages import ROOT, blocks, run

PAGE = "docs/capture.md"


def test_the_code_does_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {"work": tmp_path}
    run(blocks(PAGE), names)
    tokens = [len(ids) for ids in names["tokenizer"](names["texts"])["input_ids"]]
    assert names["result"].archive.n_rows == sum(tokens)
    assert names["last"].archive.rows.position[:].tolist() == [n - 1 for n in tokens]
    assert (names["again"].resumed, names["again"].stats.rows) == (True, 0)


def test_the_file_of_settings_is_one(tmp_path: Path) -> None:
    (text,) = blocks(PAGE, language="yaml")
    (tmp_path / "settings.yaml").write_text(text)
    found = read_config(tmp_path / "settings.yaml")
    where = {key: found.pop(key) for key in ("model", "dataset", "out")}
    assert all(where.values())
    assert CaptureSettings.from_mapping(found).max_length == 128


def test_every_flag_and_codec_that_it_names_exists() -> None:
    text = (ROOT / PAGE).read_text()
    flags = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(CaptureSettings)}
    flags |= {"--model", "--dataset", "--out", "--add-sites", "--config", "--help", "--weights"}
    used = set(re.findall(r"`(--[a-z-]+)", text))
    assert used <= flags | {"--nproc-per-node"}
    assert set(PRESETS) <= set(re.findall(r"`([\w-]+)`", text))

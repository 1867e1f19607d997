"""Lists as values of flags: numbers, ranges, positions from the end, tokens by text."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import residua
from residua.pipelines.cli.main import main
from residua.pipelines.cli.options import bind_negative_values, parse_tokens
from residua.store.base.errors import PlanError
from residua.store.selection.grammar import parse_numbers
from tests.ragged import MODEL


def test_lists_are_read_as_written() -> None:
    assert parse_numbers("3,7, 10-12", "--examples") == [3, 7, 10, 11, 12]
    assert parse_numbers("-1,-5--3,0-1", "--positions", signed=True) == [-1, -5, -4, -3, 0, 1]
    assert parse_tokens('17,40-41, the,"7","a,\\u0062" , 5', "--tokens") == [17, 40, 41, " the", "7", "a,b", 5]


@pytest.mark.parametrize(
    ("way", "text", "message"),
    [
        (parse_numbers, "9-3", "--flag .*3 is less than 9"),
        (parse_numbers, "-1", "--flag .*such as 3,7,10-19$"),
        (parse_numbers, "0--1", "--flag .*such as 3,7"),
        (parse_numbers, "", "--flag .*such as 3,7"),
        (parse_numbers, "0-99999999", "--flag .*10,000,000"),
        (parse_tokens, "a,,b", "--flag .*between commas is empty"),
        (parse_tokens, "a,", "--flag .*between commas is empty"),
        (parse_tokens, r'"\x"', "--flag .*double quotes"),
    ],
)
def test_a_bad_list_is_refused_and_quoted(way: Callable[[str, str], object], text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        way(text, "--flag")


@pytest.mark.parametrize("value", ["-1", "-3,-1", "-3--1", "2,-1"])
def test_negative_values_are_not_flags(value: str) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--positions")
    parser.add_argument("--json", action="store_true")
    for words in (["--positions", value, "--json"], [f"--positions={value}", "--json"]):
        assert vars(parser.parse_args(bind_negative_values(words))) == {"positions": value, "json": True}


def test_patching_takes_positions_from_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = np.random.default_rng(2).integers(3, 1024, 9).tolist()
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"clean": ids, "corrupted": [*ids[:4], 9, *ids[5:]], "answer": 7, "wrong": 8}))
    words = ["--model", str(MODEL), "--pairs", str(pairs), "--sites", "attn_out.3", "--json"]
    for job in ("patch", "attribute"):
        for positions in (["--positions", "-2,-1"], ["--positions=-2--1"], ["--positions", "7-8"]):
            assert main([job, *words, *positions, "--out", str(tmp_path / job)]) == 0
            found = json.loads(capsys.readouterr().out.splitlines()[-1])
            assert sorted(line["position"] for line in found["largest"]) == [7, 8]


def test_tokens_are_ids_or_texts_of_one_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = residua.capture_dataset(MODEL, ["return the value of self"], sites="resid_post.5", out=tmp_path / "a")
    tokenizer = result.archive.tokenizer
    assert tokenizer is not None
    the = tokenizer.token_to_id("Ġthe") or 0
    words = ["replay", str(tmp_path / "a"), "--model", str(MODEL), "--edit", str(tmp_path / "edits.yaml"), "--json"]
    (tmp_path / "edits.yaml").write_text("[{edit: zero, site: attn_out.3}]")
    assert main([*words, "--rows", "0-1,3", "--tokens", " the,42", "--out", str(tmp_path / "b")]) == 0
    columns = residua.replay_dataset(
        MODEL, result.archive, out=tmp_path / "b", edits=tmp_path / "edits.yaml", rows=[0, 1, 3], tokens=[the, 42]
    ).tokens.column_names
    assert {f"logit_{the}", "logit_42", "logit_42_change"} < set(columns)
    capsys.readouterr()
    assert main([*words, "--tokens", " the value", "--out", str(tmp_path / "c")]) == 2
    ids: Any = tokenizer.encode(" the value", add_special_tokens=False).ids
    said = json.loads(capsys.readouterr().out)["message"]
    assert said.startswith(f"the text ' the value' is {len(ids)} tokens, ' the' ({ids[0]}), ")
    assert main([*words, "--tokens", '""', "--out", str(tmp_path / "c")]) == 2
    assert "the text '' " in capsys.readouterr().out

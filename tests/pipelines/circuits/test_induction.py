"""From a model to scored heads, a table and a heat map."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

import residua
from residua.pipelines.circuits.circuit_settings import RepeatSettings
from residua.pipelines.circuits.induction import capture_repeats, score_repeats
from residua.pipelines.circuits.repeats import plain_ids, repeated_tokens
from residua.pipelines.cli.main import main
from residua.store.base.errors import PlanError
from tests.models.tiny import LAYERS, TINY

MODEL = "models/pydoc-1m"


def induction(out: Path, *flags: str) -> int:
    return main(["induction", "--model", MODEL, "--out", str(out), "--scheduler", "inline", *flags])


def test_the_command_finds_the_known_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ind.zarr"
    assert induction(out, "--examples", "16", "--dtype", "bfloat16", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    folder = tmp_path / "ind-heads"
    assert (said["archive"], said["folder"]) == (str(out), str(folder))
    assert {(line["layer"], line["head"]) for line in said["strongest"][:4]} == {(3, head) for head in range(4)}
    scores = pq.read_table(folder / "heads.parquet")
    assert scores.equals(residua.induction_scores(out, period=50, bos=True))
    stated = json.loads(Path(MODEL, "report.json").read_text())["repeats"]["induction"]
    assert np.abs(scores.column("induction").to_numpy() - np.ravel(stated)).max() < 0.05
    assert (folder / "induction.png").read_bytes().startswith(b"\x89PNG")
    assert residua.verify(out).is_sound
    assert residua.open(out).sites == tuple(f"{kind}.{layer}" for layer in range(6) for kind in ("q", "k"))
    assert induction(out, "--examples", "16", "--dtype", "bfloat16") == 0  # nothing is left to capture
    assert "      3     2  " in capsys.readouterr().out
    assert pq.read_table(folder / "heads.parquet").equals(scores)
    assert induction(out, "--examples", "17", "--json") == 2
    assert "another plan" in json.loads(capsys.readouterr().out)["message"]


def test_patterns_and_no_bos(tmp_path: Path) -> None:
    settings = RepeatSettings(period=7, copies=3, n_examples=4, seed=5)
    model = TINY["gpt2"]()
    archives = [
        capture_repeats(model, out=tmp_path / f"{how}.zarr", repeats=settings, captured_from=how).archive
        for how in ("qk", "pattern")
    ]
    tables = [score_repeats(archive, name="gpt2").scores for archive in archives]
    for name in ("induction", "previous_token", "duplicate_token", "prefix_matching"):
        columns = [table.column(name).to_numpy() for table in tables]
        assert np.abs(columns[0] - columns[1]).max() < 1e-6
    assert archives[1].sites == tuple(f"pattern.{layer}" for layer in range(LAYERS))
    assert set(archives[0].examples["n_tokens"].to_pylist()) == {22}  # the config names a BOS
    assert set(archives[0].examples["period"].to_pylist()) == {7}


def test_sequences_are_seeded_and_hold_no_special_tokens() -> None:
    model, tokenizer = TINY["llama"](), AutoTokenizer.from_pretrained(MODEL)
    assert 0 not in plain_ids(model.config, tokenizer)  # the shipped tokenizer's only special token
    assert plain_ids(model.config, None).tolist() == list(range(3, 97))
    settings = RepeatSettings(period=20, n_examples=5, seed=1)
    rows = repeated_tokens(model, None, settings)
    assert rows == repeated_tokens(model, None, settings)
    assert rows != repeated_tokens(model, None, RepeatSettings(period=20, n_examples=5, seed=2))
    for row in rows:
        bos, *ids = row["input_ids"]
        assert bos == 1
        assert ids[:20] == ids[20:]
        assert len(set(ids)) == 20
        assert min(ids) >= 3
    without_bos = repeated_tokens(model, None, RepeatSettings(period=20, n_examples=1, bos=False))
    assert len(without_bos[0]["input_ids"]) == 40


def test_what_a_model_cannot_take_is_refused() -> None:
    model = TINY["llama"]()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"period": 40}, "takes 64"),
        ({"period": 1}, "period=1"),
        ({"copies": 1}, "copies=1"),
        ({"seed": -1}, "seed=-1"),
    ]
    for options, message in wrong:
        with pytest.raises(PlanError, match=message):
            repeated_tokens(model, None, RepeatSettings(**options))
    model.config.bos_token_id = None
    assert repeated_tokens(model, None, RepeatSettings(period=5, n_examples=1))[0]["input_ids"][:5]
    with pytest.raises(PlanError, match="BOS"):
        repeated_tokens(model, None, RepeatSettings(period=5, bos=True))
    model.config.vocab_size, model.config.max_position_embeddings = 30, 500
    with pytest.raises(PlanError, match=r"50 .*28"):
        repeated_tokens(model, None, RepeatSettings())

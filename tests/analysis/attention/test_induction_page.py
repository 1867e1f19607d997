"""The code of docs/induction.md, run as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest

import residua
from residua.pipelines.cli.main import main
from tests.pages import ROOT, blocks, run

PAGE = "docs/induction.md"


def test_every_block_does_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    for command in blocks(PAGE, language="console")[0].splitlines():
        assert command.startswith("$ residua ")
        assert main([*command.split()[2:], "--scheduler", "inline"]) == 0
        assert "the 10 strongest of 24 heads" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "ind-heads").iterdir()} == {"heads.parquet", "induction.png"}
    names: dict[str, Any] = {"residua": residua}
    assert len(blocks(PAGE)) == 2
    run(blocks(PAGE), names)
    assert {(line["layer"], line["head"]) for line in names["strongest"]} == {(3, head) for head in range(4)}
    assert [line["induction"] for line in names["strongest"]] == pytest.approx([0.96] * 4, abs=0.015)
    assert names["by_period_column"].equals(names["scores"])
    assert names["stated"].equals(names["scores"].slice(12, 4))
    others = [line["induction"] for line in names["scores"].to_pylist() if line["layer"] != 3]
    assert max(others) < 0.02
    assert max(names["detected"].column("score").to_pylist()) == pytest.approx(0.475, abs=0.01)
    assert names["strict"].num_rows == 24


def test_the_bytes_of_queries_and_keys_follow_from_the_model() -> None:
    rows = [
        re.findall(r"[\d,]+", line) for line in (ROOT / PAGE).read_text().splitlines() if re.match(r"\| [\d,]+ ", line)
    ]
    numbers = [[int(cell.replace(",", "")) for cell in row if cell != ","] for row in rows]
    assert len(numbers) == 5
    for row in numbers:
        n_tokens, (keys, half, single) = row[0], (row[1::2] if len(row) > 4 else row[1:])
        assert keys == 6 * (4 + 2) * 32 * 2
        assert (half, single) == (6 * 4 * n_tokens * 2, 6 * 4 * n_tokens * 4)

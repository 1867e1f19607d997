"""`residua stats`, `probe`, `top` and `page` as a user types them: what they print, write and refuse."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import residua
from residua.pipelines.cli.main import main
from tests.analysis.rows_archive import write_rows

RNG = np.random.default_rng(0)
LENGTHS = tuple(RNG.integers(5, 40, 60).tolist())
N_ROWS = sum(LENGTHS)
LABEL = RNG.integers(0, 2, len(LENGTHS))
NOISE = RNG.standard_normal((N_ROWS, 6)).astype(np.float32)
SHIFT = 2 * np.repeat(LABEL, LENGTHS)[:, None].astype(np.float32)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    broken = NOISE.copy()
    broken[7, 2] = np.nan
    sites = {"resid_post.0": NOISE, "resid_post.1": NOISE + SHIFT, "mlp_out.1": broken}
    columns: dict[str, list[object]] = {
        "label": [f"label {label}" for label in LABEL],
        "size": [float(n) + 0.5 for n in LENGTHS],
    }
    return write_rows(tmp_path_factory.mktemp("cli") / "acts.zarr", LENGTHS, sites, columns=columns).path


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answer(capsys: pytest.CaptureFixture[str], *words: str | Path, code: int = 0) -> Any:
    """Run the command line with ``--json``; return the one object that it prints."""
    capsys.readouterr()
    assert main([*(str(word) for word in words), "--json", "--scheduler", "inline"]) == code
    return json.loads(capsys.readouterr().out)


def size_of(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as image:
        return image.size


def printed(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    capsys.readouterr()
    assert main([*(str(word) for word in words), "--scheduler", "inline"]) == 0
    return capsys.readouterr().out


def test_stats(archive: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "stats", archive, "--where", "position > 1", "--components", "2")
    expected = residua.stats(residua.open(archive), where="position > 1", components=2)
    assert found["sites"] == expected.sites.to_pylist()
    written = folder / found["folder"]
    assert written.name.startswith("acts-stats-position-1-")
    assert pq.read_table(written / "positions.parquet").equals(expected.positions)
    assert size_of(written / "norms.png") > (500, 300)
    text = printed(capsys, "stats", archive, "--out", "other", "--components", "0")
    assert f"{N_ROWS:,} rows" in text
    assert "warning: mlp_out.1 has 1 NaN or infinite values in 1 rows" in text
    assert "note: resid_post.0 has no principal components" in text
    assert "norms.png" in text
    assert (folder / "other" / "norms.png").is_file()


def test_many_sites_are_drawn_as_cells(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {f"resid_post.{layer}": NOISE[:90] for layer in range(9)}
    wide = write_rows(folder / "many.zarr", (40, 50), rows)
    printed(capsys, "stats", wide.path)
    assert size_of(folder / "many-stats" / "norms.png")[0] > 1500  # wider than a picture of lines


def test_probe(archive: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "probe", archive, "--target", "label", "--sites", "resid_post.*", "--seed", "3")
    expected = residua.probe(residua.open(archive), "label", "resid_post.*", seed=3)
    assert found["sites"] == expected.to_pylist()
    written = folder / found["folder"]
    assert written == folder / "acts-probe-label"
    assert pq.read_table(written / "probe.parquet").equals(expected)
    assert size_of(written / "probe.png") > (500, 300)
    assert found["sites"][1]["accuracy"] > 0.9
    probe: Any = residua.analysis.LinearProbe.load(written / "probes" / "resid_post" / "1")
    assert probe.classes_.tolist() == ["label 0", "label 1"]
    text = printed(capsys, "probe", archive, "--target", "position > 10 and position < 20", "--where", "position > 0")
    for word in ("rows to learn from", "balanced", "shuffled labels", "commonest class", "warning: mlp_out.1: 1 rows"):
        assert word in text
    (made,) = folder.glob("acts-probe-position-10-and-position-20-??????-position-0-??????/probe.png")
    assert made.is_file()
    assert "R²" in printed(capsys, "probe", archive, "--target", "size", "--group", "example")
    assert "R²" in printed(capsys, "probe", archive, "--target", "label", "--task", "regression", "--as-numbers")


def test_top(archive: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "probe", archive, "--target", "label", "--sites", "resid_post.1", "--out", "p")
    direction = Path("p/probes/resid_post/1/probe.safetensors")
    words = ("top", archive, "--site", "resid_post.1", "--direction", direction, "-k", "5", "--per-example")
    found = answer(capsys, *words, "--out", "top.parquet")
    assert {int(LABEL[line["example"]]) for line in found["rows"]} == {1}
    assert {int(LABEL[line["example"]]) for line in answer(capsys, *words, "--bottom")["rows"]} == {0}
    assert pq.read_table("top.parquet").to_pylist() == found["rows"]
    text = printed(capsys, *words)
    assert f"«w{found['rows'][0]['token']}»" in text
    np.save("d.npy", np.eye(6)[2])
    by_channel = answer(capsys, "top", archive, "--site", "mlp_out.1", "--channel", "2")
    assert by_channel == answer(capsys, "top", archive, "--site", "mlp_out.1", "--direction", "d.npy")


def test_page(archive: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("d.npy", np.eye(6)[2])
    words = ("page", archive, "--direction", "resid_post.0=d.npy", "--direction", "two:=mlp_out.1=channel:2", "-k", "2")
    assert "index.html" in printed(capsys, *words, "--examples", "5", "--tokens", "8")
    found = answer(capsys, *words, "--out", "page")
    assert Path(found["file"]).is_file()
    assert found["n_examples"] == len(LENGTHS)
    data = (folder / "acts-page" / "data" / "archive.js").read_text()
    assert '"name":"two"' in data


@pytest.mark.parametrize(
    ("words", "quoted"),
    [
        (["probe", "--target", "labl"], "labl"),
        (["probe", "--target", "label", "--where", "positoin > 3"], "positoin"),
        (["probe", "--target", "label", "--test-fraction", "2"], "2"),
        (["stats", "--sites", "resid_pots.*"], "resid_pots"),
        (["top", "--site", "resid_post.9", "--channel", "0"], "resid_post.9"),
        (["page", "--direction", "resid_post.0=channel:9"], "9"),
        (["page", "--lens", "nowhere"], "nowhere"),
        (["top", "--site", "resid_post.1", "--channel", "77"], "77"),
        (["top", "--site", "resid_post.1", "--direction", "nowhere.npy"], "nowhere.npy"),
    ],
)
def test_bad_words_are_quoted(
    words: list[str], quoted: str, archive: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([words[0], str(archive), *words[1:], "--scheduler", "inline"]) in (1, 2)
    said = capsys.readouterr()
    assert quoted in said.err
    assert "Traceback" not in said.err
    assert said.out == ""
    assert list(folder.iterdir()) == []

"""A subset of an archive is an archive: the same values, tokens and texts, and it says where they are from."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import residua
from residua.pipelines.cli.main import main
from residua.pipelines.copies.extract import extract
from residua.pipelines.copies.rewritten import SOURCE_EXAMPLE
from residua.store.base.errors import NotCapturedError, PlanError, UnknownSiteError
from residua.store.read.archive import Archive
from tests.plain_zarr import plain_array
from tests.stopped import take_back
from tests.store.small_archive import LENGTHS, make_archive

FROZEN = Path(__file__).parents[2] / "fixtures/format-1.0"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return Archive(make_archive(tmp_path_factory.mktemp("source") / "a.zarr"))


CHOICES: list[dict[str, Any]] = [
    {},
    {"examples": [2, 0]},
    {"rows": "position > 3"},
    {"rows": "position == 0", "sites": "q.*"},
    {"examples": [0, 1, 3], "rows": "position in [0, 2, 4]"},
    {"rows": 'label == "example 2"', "sites": ["resid_post.0"]},
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_rows_keep_their_values_tokens_and_texts(choice: dict[str, Any], source: Archive, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    made = extract(source, tmp_path / "b.zarr", **choice, on_row=lambda *step: steps.append(step))
    position: Any = source.rows.position[:]
    example = source.rows.example[:]
    tests = {
        "position > 3": position > 3,
        "position == 0": position == 0,
        "position in [0, 2, 4]": np.isin(position, [0, 2, 4]),
        'label == "example 2"': example == 2,
    }
    keep = np.isin(example, choice.get("examples", range(len(LENGTHS))))
    keep &= tests.get(choice.get("rows", ""), np.ones(len(keep), bool))
    assert made.is_sealed
    assert steps[-1] == (keep.sum(), keep.sum())
    assert set(made.sites) == set(source.select(choice.get("sites", "*")))
    for name in made.sites:
        assert np.array_equal(plain_array(made.path, made.plan.site(name).path), source[name][:][keep])
    assert np.array_equal(made.rows.token[:], source.rows.token[:][keep])
    assert np.array_equal(made.rows.position[:], position[keep])
    old = made.examples.column(SOURCE_EXAMPLE).to_pylist()
    assert [old[number] for number in made.rows.example[:]] == example[keep].tolist()
    assert made.examples.column("label").to_pylist() == [f"example {number}" for number in old]
    for new, number in enumerate(old):
        assert np.array_equal(made.example_table.tokens(new), source.example_table.tokens(number))
    assert made.text(0) == source.text(int(np.flatnonzero(keep)[0]))
    report = residua.verify(made.path)
    assert (report.problems, report.notes) == ([], [])
    taken: Any = made.provenance["extracted"]
    assert taken["archive"] == source.plan.digest
    notes: Any = made.provenance["notes"]
    assert any(source.plan.digest[:12] in note for note in notes)
    assert made.plan.digest != source.plan.digest
    assert residua.stats(made, made.sites[0]).sites.num_rows == 1


@pytest.mark.parametrize("name", ["raw", "small", "bitround10"])
def test_every_type_is_taken_bit_for_bit(name: str, tmp_path: Path) -> None:
    source = Archive(FROZEN / f"{name}.archive")
    made = extract(source, tmp_path / "b.zarr", examples=[1, 3, 4])
    keep = np.isin(source.rows.example[:], [1, 3, 4])
    for site in source.sites:
        assert np.array_equal(made[site].bits(), source[site].bits()[keep])
    assert residua.verify(made.path).is_sound
    assert (made.path / "head/head.safetensors").read_bytes() == (source.path / "head/head.safetensors").read_bytes()


def test_a_subset_of_a_subset_names_the_first_archives_examples(source: Archive, tmp_path: Path) -> None:
    once = extract(source, tmp_path / "b.zarr", examples=[1, 2, 3])
    twice = extract(once, tmp_path / "c.zarr", examples=[1])
    assert twice.examples.column(SOURCE_EXAMPLE).to_pylist() == [2]


def test_what_cannot_be_taken_is_refused_before_anything_is_written(source: Archive, tmp_path: Path) -> None:
    out = tmp_path / "b.zarr"
    choices: list[tuple[type[Exception], dict[str, Any]]] = [
        (PlanError, {"examples": [4]}),
        (PlanError, {"rows": "position > 99"}),
        (PlanError, {"examples": [1], "rows": "position > 3"}),
        (UnknownSiteError, {"sites": "z.*"}),
    ]
    for error, choice in choices:
        with pytest.raises(error):
            extract(source, out, **choice)
    with pytest.raises(PlanError, match="int8-block32"):
        extract(FROZEN / "int8-block32.archive", out)
    unfinished = make_archive(tmp_path / "u.zarr")
    take_back(unfinished, 1)
    with pytest.raises(NotCapturedError):
        extract(unfinished, out)
    assert not out.exists()
    with pytest.raises(FileExistsError):
        extract(source, source.path)


def test_the_command(source: Archive, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["extract", str(source.path), "--out", str(tmp_path / "b.zarr"), "--examples", "0,2-3", "--sites", "q.1"]
    assert main(words) == 0
    assert "37 rows of 3 examples, 1 sites" in capsys.readouterr().out
    assert main([*words[:4], "--rows", "position >"]) == 2

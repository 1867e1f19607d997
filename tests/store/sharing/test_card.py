"""The card of an archive: what machines read in it works, it says what the archive holds, and no edit gets lost."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from residua.store.base.errors import PlanError, StorageError
from residua.store.format.archive_metadata import read_metadata, write_metadata
from residua.store.read.archive import Archive
from residua.store.sharing.card import Licences, card_of, is_own, write_card
from residua.store.verification.verify import verify
from tests.store.small_archive import LENGTHS, make_archive

FROZEN = Path(__file__).parents[2] / "fixtures/format-1.0/bitround10.archive"
COMMIT = "0123456789" * 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_archive(tmp_path_factory.mktemp("source") / "a.zarr")


def with_provenance(path: Path, provenance: dict[str, Any]) -> Archive:
    make_archive(path)
    write_metadata(path, replace(read_metadata(path), provenance=provenance))
    return Archive(path)


def front(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_it_says_what_the_archive_holds(source: Path) -> None:
    card = card_of(source, address="hf://datasets/org/acts/a.zarr")
    archive = Archive(source)
    for name in archive.sites:
        assert f"`{name}`" in card.text
        assert " x ".join(map(str, archive[name].shape)) in card.text
    assert archive.plan.digest in card.text
    assert 'residua.open("hf://datasets/org/acts/a.zarr")' in card.text
    assert "residua verify hf://datasets/org/acts/a.zarr" in card.text
    assert front(card.text)["configs"][0]["data_files"][0]["path"] == "a.zarr/examples/*.parquet"


def test_licences_are_never_guessed(source: Path) -> None:
    unknown = card_of(source).text
    assert "license" not in front(unknown)
    assert "# license: fill in" in unknown
    assert unknown.count("not said") == 3
    known = card_of(source, licences=Licences(data="cc-by-4.0", model="apache-2.0", text="odc-by"))
    assert front(known.text)["license"] == json.loads(known.croissant)["license"] == "cc-by-4.0"
    assert all(name in known.text for name in ("apache-2.0", "odc-by"))
    for wrong in ("CC BY 4.0", "", "a\nb"):
        with pytest.raises(PlanError, match=r"cc-by-4\.0"):
            Licences(text=wrong)


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ({"id": "org/model", "revision": COMMIT}, ["org/model"]),
        ({"id": "org/model", "revision": None}, None),
        ({"id": "/home/me/org/model", "revision": COMMIT}, None),
        ({"id": "", "class": "Own"}, None),
        (None, None),
    ],
    ids=str,
)
def test_a_model_of_the_hub_is_the_base_model(model: Any, base: list[str] | None, tmp_path: Path) -> None:
    dataset = {"kind": "hub", "id": "org/text", "revision": COMMIT}
    card = card_of(with_provenance(tmp_path / "a.zarr", {"model": model, "dataset": dataset}))
    assert front(card.text).get("base_model") == base
    assert "org/text" in card.text
    assert "/home/me" not in card.text


def test_values_cannot_break_it(tmp_path: Path) -> None:
    name = 'a|b`c\n---\nlicense: mit\n<script> "'
    provenance = {"model": {"id": name, "class": name}, "dataset": {"kind": "hub", "id": name}, "notes": [name]}
    card = card_of(with_provenance(tmp_path / "a.zarr", provenance))
    assert "license" not in front(card.text)
    assert "\nlicense" not in card.text
    assert "<script" not in card.text.replace("\\<script", "")
    assert is_own(card.text)


def test_a_card_that_somebody_edited_is_not_written_over(tmp_path: Path) -> None:
    source = make_archive(tmp_path / "a.zarr")
    path = write_card(source)
    write_card(source, licences=Licences(data="mit"))
    assert front(path.read_text())["license"] == "mit"
    assert verify(source).problems == []
    for edited in (path.read_text().replace("rows", "ROWS"), "mine", path.read_text() + "more", ""):
        path.write_text(edited)
        assert not is_own(edited)
        if edited:
            with pytest.raises(FileExistsError, match=r"README\.md"):
                write_card(source)
            assert path.read_text() == edited
    write_card(source, force=True)
    path.write_bytes(path.read_text().replace("\n", "\r\n").encode())
    write_card(source)


def test_of_every_kind_of_archive(tmp_path: Path) -> None:
    assert "rows of activations" in card_of(FROZEN).text
    open_size = make_archive(tmp_path / "b.zarr", codec="int8-block32", open_size=True)
    text = card_of(open_size).text
    assert "relative RMS" in text
    assert "residua reproduce" not in text
    with pytest.raises(StorageError, match="hf://datasets/ORG/NAME"):
        card_of(FROZEN, address="s3://bucket/a")
    with pytest.raises(PlanError, match="folder"):
        write_card("https://example.org/a.zarr")


def test_the_viewer_finds_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    source = make_archive(tmp_path / "a.zarr")
    write_card(source)
    examples = datasets.load_dataset(str(source), "examples", split="train", cache_dir=str(tmp_path / "cache"))
    assert examples["n_tokens"][:] == list(LENGTHS)
    archive = Archive(source)
    assert examples[2]["input_ids"] == archive.example_table.tokens(2).tolist()
    described = json.loads((source / "croissant.json").read_bytes())
    fields = {field["name"]: field for field in described["recordSet"][0]["field"]}
    assert set(fields) == set(examples.column_names)
    assert (fields["input_ids"]["repeated"], fields["score"]["dataType"]) == (True, "sc:Float")
    assert {source["fileSet"]["@id"] for source in (field["source"] for field in fields.values())} <= {
        entry["@id"] for entry in described["distribution"]
    }

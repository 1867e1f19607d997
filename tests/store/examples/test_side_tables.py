"""Labels that came later: matched by a key, kept beside the examples, and read as columns of the dataset are."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import residua
from residua.store.base.canonical import digest_of
from residua.store.base.errors import DamagedArchiveError, DatasetError, PlanError, ResiduaError, UnsafeArchiveError
from residua.store.examples.side_tables import FOLDER, SIDE_TABLES
from residua.store.read.archive import Archive
from residua.store.selection.row_filter import RowFilter
from residua.store.storage.lease import leased
from residua.store.storage.lock import ArchiveInUseError
from residua.store.storage.objects import ObjectFolder
from tests.servers.files import serving_files
from tests.servers.objects import objects
from tests.servers.s3 import S3Server
from tests.store.small_archive import N_ROWS, files_of, make_archive

TABLE: dict[str, list[Any]] = {
    "example": [3, 0],
    "points": [0.5, float("nan")],
    "who": ["ann", None],
    "n": [1, 2],
    "ok": [True, False],
}


def content(archive: Archive) -> dict[str, bytes]:
    return {name: (archive.path / name).read_bytes() for name in files_of(archive.path)}


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return residua.open(make_archive(tmp_path / "acts.zarr"))


def column(archive: Archive, name: str) -> list[Any]:
    found: list[Any] = archive.example_table.table([name])[name].to_pylist()
    return found


MAKERS: dict[str, Callable[[Path], Any]] = {
    "arrow": lambda _: pa.table(TABLE, schema=None),
    "pandas": lambda _: pd.DataFrame(TABLE),
    "pandas index": lambda _: pd.DataFrame(TABLE).set_index("example"),
    "polars": lambda _: pytest.importorskip("polars").DataFrame(TABLE),
    "mapping": lambda _: {**TABLE, "n": np.array([1, 2], np.int16)},
    "lines": lambda _: [{name: values[i] for name, values in TABLE.items()} for i in range(2)],
    "csv": lambda folder: _file(folder / "t.csv", "example,points,who,n,ok\n3,0.5,ann,1,true\n0,nan,,2,false\n"),
    "jsonl": lambda folder: _file(folder / "t.jsonl", str(pd.DataFrame(TABLE).to_json(orient="records", lines=True))),
    "parquet": lambda folder: _parquet(folder / "t.parquet"),
}


def _file(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def _parquet(path: Path) -> str:
    pq.write_table(pa.table(TABLE), path)
    return str(path)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_table_of_any_kind_becomes_columns_of_the_examples(kind: str, archive: Archive, tmp_path: Path) -> None:
    found = archive.annotate(MAKERS[kind](tmp_path), name="judge")
    assert column(archive, "points") == [None, None, None, 0.5]  # NaN is no value
    assert column(archive, "who") == [None, None, None, "ann"]
    assert column(archive, "n") == [2, None, None, 1]
    assert column(archive, "ok") == [False, None, None, True]
    assert found.n_missing == 2
    assert "2 examples" in found.notes[0]


def test_rows_get_the_value_of_their_token(archive: Archive) -> None:
    rows = np.array([0, 19, 20, 37])
    archive.annotate(pd.DataFrame({"row": rows, "mark": [5, 6, 7, 8]}), key="row", name="marks")
    flat = np.concatenate([np.array(values or [], float) for values in column(archive, "mark")])
    expected = np.full(N_ROWS, np.nan)
    expected[rows] = [5, 6, 7, 8]
    np.testing.assert_array_equal(flat, expected)
    assert RowFilter.parse("mark > 5").rows(archive).tolist() == [19, 20, 37]


def test_all_windows_of_a_document_get_its_values(archive: Archive) -> None:
    archive.annotate({"example": range(4), "doc": ["a", "b", "a", None]}, name="docs")
    archive.annotate({"doc": ["a"], "topic": ["news"]}, key="doc", name="topics")
    assert column(archive, "topic") == ["news", None, "news", None]
    assert [table.name for table in archive.side_tables] == ["docs", "topics"]


def test_a_list_has_a_value_a_token(archive: Archive) -> None:
    archive.annotate({"example": [1, 3], "w": [[9], [1, 2, 3, 4, 5]]}, name="words")
    assert RowFilter.parse("w > 3").rows(archive).tolist() == [20, 36, 37]
    with pytest.raises(DatasetError, match="4 values"):
        archive.annotate({"example": [3], "v": [[1, 2, 3, 4]]}, name="short")


def test_values_lie_in_parts_as_the_examples_do(tmp_path: Path) -> None:
    archive = residua.open(make_archive(tmp_path / "acts.zarr", examples_per_part=3))
    assert len(archive.example_table.index().first_example) == 3
    archive.annotate({"example": [0, 3], "marked": ["x", "y"]}, name="a")
    archive.annotate({"row": [0, 33], "good": [True, False]}, key="row", name="b")
    assert column(archive, "marked") == ["x", None, None, "y"]
    assert RowFilter.parse("good == false").rows(archive).tolist() == [33]
    assert residua.verify(archive.path).problems == []


def test_no_file_of_the_capture_changes_and_other_readers_see_the_columns(archive: Archive) -> None:
    before, other = content(archive), Archive(archive.path)
    condition = RowFilter.parse('marked == "x"')
    with pytest.raises(ResiduaError, match="marked"):
        condition.rows(other)
    archive.annotate({"example": [1], "marked": ["x"]}, name="judge")
    assert condition.rows(other).tolist() == [20]
    archive.annotate({"example": [2], "marked": ["x"]}, name="judge", replace=True)
    assert condition.rows(other).tolist() == list(range(21, 33))
    assert len(list((archive.path / FOLDER).iterdir())) == 1
    archive.remove_annotations("judge")
    assert "marked" not in other.example_table.column_types()
    (archive.path / SIDE_TABLES).unlink()
    (archive.path / FOLDER).rmdir()
    assert content(archive) == before


@pytest.mark.parametrize(
    ("table", "settings", "said"),
    [
        ({"example": [9], "x": [1]}, {}, "matches"),
        ({"example": [0, 9], "x": [1, 2]}, {}, "9"),
        ({"row": [0, -1], "x": [1, 2]}, {"key": "row"}, "-1"),
        ({"example": [0, 0], "x": [1, 2]}, {}, "same example"),
        ({"example": [0, None], "x": [1, 2]}, {}, "no example"),
        ({"example": ["a"], "x": [1]}, {}, "string"),
        ({"example": [0.5], "x": [1]}, {}, "whole"),
        ({"number": [0], "x": [1]}, {}, "number, x"),
        ({"example": [0]}, {}, "besides its key"),
        ({"example": [0], "x": [None]}, {}, "'x'"),
        ({"example": [0], "x": [{"a": 1}]}, {}, "struct"),
        ({"example": [0], "x": [[[1]]]}, {}, "list"),
        ({"example": [0], "token": [1]}, {}, "token"),
        ({"example": [0], "input.ids": [1]}, {}, "input.ids"),
        ({"example": [0], "taken": [1]}, {"name": "other"}, "taken"),
        ({"doc": [0], "x": [1]}, {"key": "doc"}, "'doc'"),
        ({"row": [0], "x": [[1]]}, {"key": "row"}, "'x'"),
        ({"example": [0], "x": [1]}, {"columns": ["y"]}, "'y'"),
        ({"example": [0], "x": [1]}, {"name": "../up"}, "../up"),
        ({"example": [0], "x": [1]}, {"name": "known"}, "replace"),
        ({"example": [0], "x": [1, "a"]}, {}, "plain type"),
        (3, {}, "int"),
    ],
)
def test_what_cannot_be_used_is_refused_and_nothing_changes(
    table: Any, settings: dict[str, Any], said: str, archive: Archive
) -> None:
    archive.annotate({"example": [0], "taken": [1]}, name="known")
    before = content(archive)
    with pytest.raises((DatasetError, PlanError), match=said):
        archive.annotate(table, **{"name": "q", **settings})
    assert content(archive) == before


def test_lines_without_an_example_are_left_out_if_that_is_allowed(archive: Archive) -> None:
    found = archive.annotate({"example": [1, 7], "x": [1, 2]}, name="q", allow_unmatched=True)
    assert column(archive, "x") == [None, 1, None, None]
    assert found.n_missing == 3


def test_an_archive_that_is_not_finished_or_not_written_to_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_archive(tmp_path / "acts.zarr")
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(OSError, match="copy"):
        residua.open(path).annotate({"example": [0], "x": [1]}, name="q")


def _forge(archive: Archive, **changes: Any) -> None:
    path = archive.path / SIDE_TABLES
    entry = json.loads(path.read_text())["annotations"]
    entry["tables"][0] |= changes
    path.write_text(json.dumps({"annotations": entry, "sha256": digest_of(entry)}))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../../x"},
        {"columns": {"input_ids": "int64"}},
        {"columns": {"other_inputs": "list of string"}},
        {"columns": {"kind": "int64"}},
        {"columns": {"x": "object"}},
        {"columns": {"x": "list of int64"}},
        {"columns": {}},
        {"files": []},
        {"files": ["0" * 64]},
        {"files": ["../../../etc/passwd"]},
        {"n_missing": -1},
        {"key": 3},
    ],
)
def test_a_forged_entry_is_refused(changes: dict[str, Any], archive: Archive) -> None:
    archive.annotate({"example": [0], "x": [1]}, name="judge")
    _forge(archive, **changes)
    found = Archive(archive.path)
    with pytest.raises((UnsafeArchiveError, DamagedArchiveError)):
        found.example_table.table(list(found.example_table.column_types()))
    assert residua.verify(archive.path).problems


def test_altered_files_are_named(archive: Archive) -> None:
    archive.annotate({"example": [0], "x": [1]}, name="judge")
    (file,) = (archive.path / FOLDER).iterdir()
    whole = file.read_bytes()
    for content in (whole[:-9] + bytes(9), whole[: len(whole) // 2], whole.replace(b"x", b"y")):
        file.write_bytes(content)
        with pytest.raises(DamagedArchiveError, match=file.name):
            Archive(archive.path).example_table.table(["x"])
        assert [problem.path for problem in residua.verify(archive.path).problems] == [f"{FOLDER}/{file.name}"]
    pq.write_table(pa.table({"x": pa.array(range(5000))}), file)
    _forge(archive, files=[hashlib.sha256(file.read_bytes()).hexdigest()])
    renamed = Archive(archive.path).example_table.side[0].table.paths()[0]
    file.rename(archive.path / renamed)
    with pytest.raises(UnsafeArchiveError, match="one for each example"):
        Archive(archive.path).example_table.table(["x"])
    file = archive.path / SIDE_TABLES
    file.write_text(file.read_text().replace("judge", "jugde"))
    with pytest.raises(DamagedArchiveError, match=SIDE_TABLES):
        Archive(archive.path).example_table.column_types()


def annotations(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.startswith("annotations")}


def test_a_side_table_in_a_bucket_is_the_one_of_a_folder(archive: Archive, s3: S3Server) -> None:
    address = s3.address("annotated.zarr")
    residua.push(archive, address, storage_options=s3.options)
    there = residua.open(address, storage_options=s3.options)
    first, others = {"example": [1], "points": [0.25]}, {"example": [2, 3], "class": ["a", "b"]}
    for each in (archive, there):
        each.annotate(first, name="judge")
        with pytest.raises(PlanError, match="has a side table 'judge'"):
            each.annotate(TABLE, name="judge")
        each.annotate(TABLE, name="judge", replace=True)
        each.annotate(others, name="later")
    assert annotations(objects(address, s3.options)) == annotations(content(archive))
    again = residua.open(address, storage_options=s3.options)
    for name in ("points", "who", "n", "ok", "class"):
        assert column(there, name) == column(again, name) == column(archive, name)
    assert residua.verify(address, storage_options=s3.options).problems == []
    there.remove_annotations("later")
    archive.remove_annotations("later")
    assert annotations(objects(address, s3.options)) == annotations(content(archive))
    assert [table.name for table in there.side_tables] == ["judge"]
    again.annotate(others, name="later")  # which it saw before the other removed it
    assert [table.name for table in again.side_tables] == ["judge", "later"]


def test_what_cannot_be_annotated_at_an_address_stays_as_it_is(archive: Archive, s3: S3Server) -> None:
    address = s3.address("kept.zarr")
    residua.push(archive, address, storage_options=s3.options)
    folder, there = ObjectFolder(address, s3.options), residua.open(address, storage_options=s3.options)
    before = objects(address, s3.options)
    with leased(folder), pytest.raises(ArchiveInUseError, match="kept"):
        there.annotate(TABLE, name="judge")
    with pytest.raises(DatasetError, match="match nothing"):
        there.annotate({"example": [10**6, 0], "points": [1.0, 2.0]}, name="judge")
    with pytest.raises(PlanError, match=r"s3://acts/kept\.zarr has no side table 'judge'"):
        there.remove_annotations("judge")
    assert objects(address, s3.options) == before
    folder.write(SIDE_TABLES, [b"{}"])
    with pytest.raises(DamagedArchiveError, match=rf"s3://acts/kept\.zarr/{SIDE_TABLES} cannot be read"):
        residua.open(address, storage_options=s3.options).annotate(TABLE, name="judge")
    with serving_files(archive.path.parent) as server:
        served = residua.open(f"{server.url}/acts.zarr", cache=False)
        with pytest.raises(PlanError, match="only read from: fetch it with residua pull"):
            served.annotate(TABLE, name="judge")

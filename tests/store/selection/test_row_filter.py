"""Filters on rows, against plain Python over the same rows."""

import datetime
import doctest
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from residua.store.base.errors import AnalysisError
from residua.store.examples.index import Example
from residua.store.examples.writer import ExampleWriter
from residua.store.read.archive import Archive
from residua.store.selection import row_filter
from residua.store.selection.row_filter import RowFilter
from tests.store.small_archive import N_ROWS, make_archive

Row = Mapping[str, Any]

DAY = datetime.date(2024, 3, 1)
COLUMNS: list[dict[str, Any]] = [
    {"label": "code", "score": 0.5, "count": 3, "ok": True, "day": DAY, "two words": "x", "part": "train", "row": 7}
    | {"position": "front", "token": 1.5, "example": True},
    {
        "label": "prose",
        "score": None,
        "count": None,
        "ok": False,
        "day": DAY,
        "two words": "y",
        "part": "test",
        "row": 8,
    },
    {"label": None, "score": float("nan"), "count": 2**53 + 1, "ok": None, "day": None, "two words": None, "row": 9},
    {"label": 'a "quoted" \\ text', "score": -1.5, "count": 0, "ok": True, "day": datetime.date(2025, 1, 1), "row": 9},
]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """Return the small archive, with other columns in its example table."""
    made = Archive(make_archive(tmp_path_factory.mktemp("filters") / "acts.zarr"))
    folder = made.path / "other-examples"
    writer = ExampleWriter(folder)
    for i, columns in enumerate(COLUMNS):
        tokens, positions = made.example_table.tokens(i), made.example_table.positions(i)
        writer.add(Example(input_ids=tokens, positions=positions, columns=columns))
    writer.close()
    for part in folder.iterdir():
        part.replace(made.path / "examples" / part.name)
    return Archive(made.path, check="never")


@pytest.fixture(scope="module")
def rows(archive: Archive) -> list[Row]:
    token, position, example = (column[:].tolist() for column in archive.rows if column is not None)
    numbers = zip(token, position, example, strict=True)
    return [
        {"part": None, "two words": None, **COLUMNS[e], "token": t, "position": p, "example": e} for t, p, e in numbers
    ]


def less(value: Any, bound: Any) -> bool:
    return value is not None and bool(value < bound)


CASES: dict[str, Callable[[Row], bool]] = {
    '`position` == "front"': lambda row: row["example"] == 0,
    '`position` not in ["front", "back"]? and position > 0': lambda row: row["example"] != 0 and row["position"] > 0,
    "`token` > 1 or token < 3 and `example` == null": lambda row: (
        row["example"] == 0 or (row["token"] < 3 and row["example"] != 0)
    ),
    "`example` == true": lambda row: row["example"] == 0,
    "`label` == null": lambda row: row["label"] is None,
    "position > 0": lambda row: row["position"] > 0,
    "position>=3 and position<=4": lambda row: 3 <= row["position"] <= 4,
    "token < 25 or example == 2": lambda row: row["token"] < 25 or row["example"] == 2,
    "not (position < 5 and example == 0) and token != 7": lambda row: (
        not (row["position"] < 5 and row["example"] == 0) and row["token"] != 7
    ),
    "token == 1 or token == 2 and position == 900": lambda row: row["token"] == 1,
    "position in [0, 2, 4, 900]": lambda row: row["position"] in (0, 2, 4),
    "position not in (0, 2, 4.0)": lambda row: row["position"] not in (0, 2, 4),
    "position < 2.5e0": lambda row: row["position"] <= 2,
    "position == null": lambda row: False,
    'label == "code"': lambda row: row["label"] == "code",
    "label != 'code'": lambda row: row["label"] != "code",
    "label == null": lambda row: row["label"] is None,
    'label == "rare"?': lambda row: False,
    'not (label in ["rare", "code"]? or position == 0)': lambda row: row["label"] != "code" and row["position"] > 0,
    "not label != None": lambda row: row["label"] is None,
    r'label == "a \"quoted\" \\ text"': lambda row: row["label"] == 'a "quoted" \\ text',
    'label in ["prose", "code"]': lambda row: row["label"] in ("prose", "code"),
    'label not in ["prose", null]': lambda row: row["label"] not in ("prose", None),
    'label > "b"': lambda row: row["label"] is not None and row["label"] > "b",
    "score < 0.4": lambda row: less(row["score"], 0.4),
    "score != 0.5": lambda row: row["score"] != 0.5,
    "count == 9007199254740993": lambda row: row["count"] == 2**53 + 1,
    "count <= 3": lambda row: less(row["count"], 4),
    "ok == true": lambda row: row["ok"] is True,
    "ok != True": lambda row: row["ok"] is not True,
    'day > "2024-06-01"': lambda row: row["day"] is not None and row["day"] > datetime.date(2024, 6, 1),
    '`two words` == "x"': lambda row: row["two words"] == "x",
    'part == "train" or part == "test"': lambda row: row["part"] in ("train", "test"),
    "row > 8": lambda row: row["row"] > 8,
    "n_tokens == 12": lambda row: row["example"] == 2,
}


@pytest.mark.parametrize("text", CASES)
def test_a_filter_selects_what_python_would(archive: Archive, rows: list[Row], text: str) -> None:
    expected = [i for i, row in enumerate(rows) if CASES[text](row)]
    assert len(expected) < N_ROWS
    chosen = RowFilter.parse(text)
    assert chosen.rows(archive).tolist() == expected
    assert chosen.rows(archive).dtype == np.int64
    copied = pickle.loads(pickle.dumps(chosen))  # noqa: S301  # our own
    assert (5 + np.flatnonzero(copied.mask(archive, 5, 31))).tolist() == [i for i in expected if 5 <= i < 31]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has its end where the name of a column was expected"),
        ("position >", "has its end where a number, a text in quotes, true, false or null was expected"),
        ("position = 3", "cannot be read from '= 3' on"),
        ("0 < position", "has 0 where the name of a column"),
        ("0 < position < 3", "has 0 where the name of a column"),
        ("position < 3 token > 2", "has token where and, or, or the end"),
        ("(position < 3", "where \\) was expected"),
        ("position in 3", "where \\( was expected"),
        ("position in []", "has ] where a number"),
        ("position < null", "has null where a number or a text"),
        ("position == other", "has other where a number"),
        ("__import__('os')", "has \\( where and, or, or the end"),
        ("position > 0; token", "cannot be read from '; token' on"),
        ("(" * 60 + "position > 0" + ")" * 60, "nested more than 50 deep"),
        ("not " * 60 + "position > 0", "nested more than 50 deep"),
        ("position == 9223372036854775808", "the number 9223372036854775808: whole numbers have at most 64 bits"),
        ("position > -" + "9" * 5000, "whole numbers have at most 64 bits"),
        ("position > 0 or " * 1000 + "position > 0", "16,012 characters"),
    ],
)
def test_a_text_that_is_no_condition_is_an_error_that_says_where(text: str, message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        RowFilter.parse(text)


def test_long_chains_are_not_nested(archive: Archive) -> None:
    assert len(RowFilter.parse("token == 900 or " * 600 + "position == 0").rows(archive)) == len(COLUMNS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour == 3", "asks for 'colour', but rows have position, token, example, and the examples have no column"),
        ('position == "x"', "compares 'position' with 'x', but that column holds int64"),
        ("position == true", "compares 'position' with True"),
        ("label == 3", "compares 'label' with 3, but that column holds string"),
        ("ok == 1", "compares 'ok' with 1, but that column holds bool"),
        ("count > 0.5", "column 'count' cannot be compared with 0.5"),
        ("count == false", "compares 'count' with False"),
        ('day == "yesterday"', "'yesterday' is not one"),
        ("input_ids == 3", "that column holds list"),
        ('label == "rare"', r"label == 'rare'.*'code', 'prose'.*\?"),
        ('position > 0 or label not in ["prose", "coda"]', r"'coda'.*mean 'code'"),
    ],
)
def test_a_comparison_that_a_column_does_not_allow_is_an_error(archive: Archive, text: str, message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        RowFilter.parse(text).rows(archive)


def test_a_column_is_read_once_for_the_same_archive(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    table = archive.example_table.table

    def counted(names: list[str]) -> pa.Table:
        read.append(names)
        return table(names)

    monkeypatch.setattr(archive.example_table, "table", counted)
    chosen = RowFilter.parse('label == "code" and not score < 0')
    assert len(chosen.rows(archive)) == 20
    assert read == [["label"], ["score"]]


def test_a_filter_can_be_used_on_several_archives(archive: Archive, tmp_path: Path) -> None:
    other = Archive(make_archive(tmp_path / "acts.zarr"))
    chosen = RowFilter.parse('label in ["code", "example 2"]?')
    assert [len(chosen.rows(one)) for one in (archive, other, archive)] == [20, 12, 20]


def test_a_column_that_is_null_throughout_is_null(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = pa.table({"nothing": pa.nulls(len(COLUMNS))})
    monkeypatch.setattr(archive.example_table, "table", lambda names: empty)
    assert not len(RowFilter.parse("nothing == 3").rows(archive))
    assert len(RowFilter.parse("nothing == null").rows(archive)) == N_ROWS


def test_the_example_in_the_docstring() -> None:
    assert doctest.testmod(row_filter) == (0, 1)


@pytest.mark.parametrize(
    "text", ["ok == true or ok == 1", "count == 0 or count == false", "count in [1] or count in [true]"]
)
def test_a_number_and_true_are_two_conditions(archive: Archive, text: str) -> None:
    with pytest.raises(AnalysisError, match=r"'(ok|count)' with (1|False|True)"):
        RowFilter.parse(text).rows(archive)

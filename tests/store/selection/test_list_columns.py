"""Conditions on columns with one value a token, against plain Python over the same rows."""

import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from residua.store.base.errors import AnalysisError, PlanError
from residua.store.examples.index import Example
from residua.store.examples.writer import ExampleWriter
from residua.store.read.archive import Archive
from residua.store.selection.row_filter import RowFilter
from residua.store.selection.tokens import TokenSelector, parse_selection
from tests.store.small_archive import make_archive


def columns_of(example: int, n_tokens: int) -> dict[str, Any]:
    """Return the lists of one example; the third has none, and each has another number of gaps."""
    if example == 2:
        return {}
    labels = [-100 if i < 2 else (i + example) % 3 for i in range(n_tokens)]
    return {
        "labels": labels,
        "gaps": [None if label == -100 else label for label in labels],
        "kinds": [("noun", "verb", None)[(i + example) % 3] for i in range(n_tokens)],
        "shares": [i / 2 for i in range(n_tokens)],
        "flags": [i % 2 == 0 for i in range(n_tokens)],
        "few": [1, 2],
        "pairs": [[i, i] for i in range(n_tokens)],
        "label": "code",
    }


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """Return the small archive, with other columns in the parts of its example table."""
    made = Archive(make_archive(tmp_path_factory.mktemp("lists") / "acts.zarr"))
    folder = made.path / "other-examples"
    table = made.example_table
    writer = ExampleWriter(folder, examples_per_part=table.index().n_examples)
    for i in range(len(table)):
        columns = columns_of(i, table.tokens(i).size)
        writer.add(Example(input_ids=table.tokens(i), positions=table.positions(i), columns=columns))
    writer.close()
    for part in (made.path / "examples").iterdir():
        part.unlink()
    for part in folder.iterdir():
        part.replace(made.path / "examples" / part.name)
    return Archive(made.path, check="never")


def values_of(archive: Archive, name: str) -> list[Any]:
    """Return each row's own value of a column of lists."""
    lists = archive.examples[name].to_pylist()
    examples, positions = archive.rows.example[:].tolist(), archive.rows.position[:].tolist()
    return [
        None if lists[example] is None else lists[example][position]
        for example, position in zip(examples, positions, strict=True)
    ]


def known(compare: Callable[[Any, Any], bool], wanted: Any) -> Callable[[Any], bool]:
    return lambda value: value is not None and compare(value, wanted)


@pytest.mark.parametrize(
    ("name", "condition", "holds"),
    [
        ("labels", "labels != -100", lambda value: value != -100),
        ("labels", "labels == -100", lambda value: value == -100),
        ("labels", "labels in [0, 2]", lambda value: value in (0, 2)),
        ("labels", "labels != -100 and labels != null", lambda value: value not in (-100, None)),
        ("gaps", "gaps != null", lambda value: value is not None),
        ("gaps", "gaps == null", lambda value: value is None),
        ("gaps", "not gaps >= 1", lambda value: not (value is not None and value >= 1)),
        ("kinds", 'kinds == "noun"', lambda value: value == "noun"),
        ("kinds", 'kinds not in ["noun", "verb"]', lambda value: value not in ("noun", "verb")),
        ("shares", "shares > 0.5", known(operator.gt, 0.5)),
        ("flags", "flags == true", lambda value: value is True),
    ],
)
def test_a_row_has_the_value_of_its_token(
    archive: Archive, name: str, condition: str, holds: Callable[[Any], bool]
) -> None:
    values = values_of(archive, name)
    assert len({str(value) for value in values}) > 1
    expected = [row for row, value in enumerate(values) if holds(value)]
    assert RowFilter.parse(condition).rows(archive).tolist() == expected
    where = RowFilter.parse(condition)
    assert [where.mask(archive, row, row + 1).tolist() for row in expected] == [[True]] * len(expected)


def test_lists_join_with_other_conditions(archive: Archive) -> None:
    found = RowFilter.parse('labels == 1 and position > 2 and label == "code"').rows(archive)
    positions = archive.rows.position[:]
    expected = [row for row, value in enumerate(values_of(archive, "labels")) if value == 1 and positions[row] > 2]
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("few == 1", r"'few' holds lists.* example 0 has 2 values and \d+ tokens"),
        ("pairs == 1", "that column holds list"),
        ('labels == "x"', "'labels' with 'x', but that column holds int64"),
    ],
)
def test_lists_that_have_not_one_plain_value_a_token_are_refused(archive: Archive, condition: str, words: str) -> None:
    with pytest.raises(AnalysisError, match=words):
        RowFilter.parse(condition).rows(archive)


def test_an_edit_does_not_take_a_list_for_a_value(archive: Archive) -> None:
    selector = TokenSelector(archive)
    selector.check(parse_selection({"where": {"label": "code"}}))
    with pytest.raises(PlanError, match="'labels' has a list for each example"):
        selector.check(parse_selection({"where": {"labels": 1}}))


def test_an_edit_takes_a_condition_on_lists_token_by_token(archive: Archive) -> None:
    selector, rows = TokenSelector(archive), RowFilter.parse("labels == 1 and position > 0").rows(archive)
    selection = parse_selection({"where": "labels == 1 and position > 0"})
    selector.check(selection)
    chosen = [selector.tokens(selection, example) for example in range(len(archive.example_table))]
    starts = archive.example_table.index().first_row[:-1]
    assert len(rows)
    assert np.concatenate(
        [start + np.flatnonzero(mask) for start, mask in zip(starts, chosen, strict=True)]
    ).tolist() == (rows.tolist())


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_numpy_lists_are_lists(tmp_path: Path, kind: Any) -> None:
    made = Archive(make_archive(tmp_path / "acts.zarr"))
    table = made.example_table
    counts: Sequence[int] = table.index().n_tokens.tolist()
    writer = ExampleWriter(tmp_path / "other")
    for i, n in enumerate(counts):
        columns: dict[str, object] = {"labels": np.arange(n, dtype=kind)}
        writer.add(Example(input_ids=table.tokens(i), positions=table.positions(i), columns=columns))
    writer.close()
    for part in (made.path / "examples").iterdir():
        part.unlink()
    for part in (tmp_path / "other").iterdir():
        part.replace(made.path / "examples" / part.name)
    archive = Archive(made.path, check="never")
    found = RowFilter.parse("labels == 1").rows(archive)
    assert found.tolist() == np.flatnonzero(archive.rows.position[:] == 1).tolist()

"""What an edit selects, against plain Python over the same tokens; and that all text forms have one meaning."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from residua.store.base.errors import PlanError
from residua.store.examples.table import ExampleTable
from residua.store.read.archive import Archive
from residua.store.selection.examples import ExampleChoice
from residua.store.selection.grammar import format_numbers, format_slice, parse_numbers, parse_slice
from residua.store.selection.row_filter import RowFilter
from residua.store.selection.tokens import Selection, TokenSelector, parse_selection
from tests.store.example_samples import CONTENT, written
from tests.store.small_archive import make_archive

Token = dict[str, Any]


@pytest.fixture(scope="module")
def selector(tmp_path_factory: pytest.TempPathFactory) -> TokenSelector:
    """Return the selector of examples of which some tokens, or all, have no row."""
    folder = tmp_path_factory.mktemp("tokens")
    n_rows = written(folder).total_rows
    return TokenSelector(
        cast("Archive", SimpleNamespace(example_table=ExampleTable(folder), n_rows=n_rows, place="it"))
    )


def tokens() -> list[Token]:
    found: list[Token] = []
    row = 0
    for example, (ids, positions) in enumerate(CONTENT):
        for position, token in enumerate(ids):
            has_row = position in positions
            found.append(
                {
                    "example": example,
                    "position": position,
                    "from_end": position - len(ids),
                    "token": token,
                    "row": row if has_row else None,
                    "label": example,
                    "text": f"example {example}",
                }
            )
            row += has_row
    return found


CASES: list[tuple[dict[str, Any], Callable[[Token], bool]]] = [
    ({}, lambda token: True),
    ({"examples": [3, 0]}, lambda token: token["example"] in (0, 3)),
    ({"positions": [-1, 0]}, lambda token: token["from_end"] == -1 or token["position"] == 0),
    ({"positions": "-2:"}, lambda token: token["from_end"] >= -2),
    ({"positions": "1:3"}, lambda token: 1 <= token["position"] < 3),
    ({"rows": np.array([0, 1, 6])}, lambda token: token["row"] in (0, 1, 6)),
    ({"tokens": [8, 2, 77]}, lambda token: token["token"] in (8, 2)),
    ({"where": {"text": "example 3"}}, lambda token: token["text"] == "example 3"),
    ({"where": {"label": [0, 4.0, "3", None]}}, lambda token: token["label"] in (0, 4)),
    ({"where": {"label": True}}, lambda token: token["label"] == 1),
    ({"where": {"label": [3, 4], "text": ["example 4"]}, "tokens": 8}, lambda token: token["example"] == 4),
    ({"where": "label in [0, 4]"}, lambda token: token["label"] in (0, 4)),
    ({"where": "label == 4 or position == 1"}, lambda token: token["label"] == 4 or token["position"] == 1),
    ({"where": "is_last and not example == 2"}, lambda token: token["from_end"] == -1 and token["example"] != 2),
    ({"where": "position >= -2 and token != 8"}, lambda token: token["from_end"] >= -2 and token["token"] != 8),
    ({"where": "token == 8", "examples": [0, 4]}, lambda token: token["token"] == 8 and token["example"] in (0, 4)),
    ({"rows": [0, 2, 3], "positions": "1:", "tokens": [2, 3]}, lambda token: token["row"] == 3),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_selection_is_what_python_would_select(selector: TokenSelector, case: int) -> None:
    item, meets = CASES[case]
    selection = parse_selection(item)
    selector.check(selection)
    found = [token for example in range(len(CONTENT)) for token in selector.tokens(selection, example).tolist()]
    assert found == [meets(token) for token in tokens()]


def test_examples_are_included_whatever_their_tokens(selector: TokenSelector) -> None:
    selection = parse_selection({"where": {"label": [1, 3]}, "positions": [0]})
    assert [selector.includes(selection, example) for example in range(5)] == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"examples": [5]}, "example 5"),
        ({"rows": [7]}, "row 7"),
        ({"positions": [4]}, "position 4"),
        ({"positions": [3], "examples": [0]}, "position 3: .* 3 tokens"),
        ({"where": {"lable": 1}}, "'lable'.*label, text"),
        ({"where": {"n_tokens": 1}}, "'n_tokens'"),
        ({"where": {"label": "9"}}, r"label in \['9'\].*allow_empty"),
        ({"where": "lable == 1"}, "'lable'"),
        ({"where": 'label == "a"'}, "'label'"),
        ({"where": 'text == "zz" or position == 0'}, r"text == 'zz'"),
    ],
)
def test_what_the_archive_does_not_have_is_refused(selector: TokenSelector, item: Token, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        selector.check(parse_selection(item))


def test_a_text_that_is_not_there_is_allowed_in_the_edit_or_in_the_condition(selector: TokenSelector) -> None:
    for item in ({"where": 'text == "zz"', "allow_empty": True}, {"where": 'text == "zz"?'}):
        selection = parse_selection(item)
        selector.check(selection)
        assert not selector.tokens(selection, 0).any()


def test_a_condition_a_mapping_and_lists_of_numbers_mean_the_same(tmp_path: Path) -> None:
    archive = Archive(make_archive(tmp_path / "a.zarr"))
    rows = RowFilter.parse('label in ["example 0", "example 3"] and position in [1, 2]').rows(archive)
    selector, selection = TokenSelector(archive), parse_selection({"where": {"label": ["example 0", "example 3"]}})
    selection = Selection(where=selection.where, positions=(1, 2))
    by_mapping = [
        archive.example_table.rows(example)[0] + np.flatnonzero(selector.tokens(selection, example))
        for example in range(len(archive.example_table))
    ]
    assert np.concatenate(by_mapping).tolist() == rows.tolist()
    owners = [True, False, False, True]
    listed = parse_numbers(format_numbers(rows), "--rows")
    for choice in (
        ExampleChoice(rows=listed),
        ExampleChoice(examples=[3, 0]),
        ExampleChoice(where='label in ["example 0", "example 3"]'),
    ):
        assert choice.of(archive).tolist() == owners
    assert ExampleChoice(examples=[3, 0, 3], rows=listed).to_json() == {
        "examples": [0, 3],
        "rows": format_numbers(rows),
        "where": None,
    }
    with pytest.raises(PlanError, match=r"rows .*38"):
        ExampleChoice(rows=[38]).of(archive)


@given(st.sets(st.integers(0, 60)))
def test_numbers_come_back_from_their_text(numbers: set[int]) -> None:
    text = format_numbers(np.array(sorted(numbers), np.int64))
    assert (parse_numbers(text, "--rows") if text else []) == sorted(numbers)


@pytest.mark.parametrize("text", [":", "-3:", "5:10", ":2", "0:-1"])
def test_slices_come_back_from_their_text(text: str) -> None:
    assert format_slice(parse_slice(text, "positions")) == text

"""Lists with one value a token are cut along with the tokens: by windows, by truncation, with padding."""

from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from residua.store.base.errors import DatasetError
from residua.store.examples.index import Example
from tests.pipelines.dataset_samples import make_tokenizer, read, tokens

KINDS: dict[str, Any] = {
    "list": list,
    "tuple": tuple,
    "numpy": np.array,
    "torch": torch.tensor,
    "pairs": lambda values: [[value, value] for value in values],
    "texts": lambda values: [f"t{value}" for value in values],
}


def rows_of(lengths: list[int], kind: str = "list") -> list[dict[str, Any]]:
    """Return rows of token ids, whose labels are the same numbers again."""
    return [{"input_ids": [3 + i % 9 for i in range(n)], "labels": KINDS[kind](range(n))} for n in lengths]


def labels(examples: list[Example]) -> list[list[Any]]:
    """Return the labels of examples as lists of Python values."""
    return [np.asarray(example.columns["labels"]).tolist() for example in examples]


@pytest.mark.parametrize("kind", KINDS)
def test_windows_have_the_values_of_their_tokens(kind: str) -> None:
    examples, _ = read(rows_of([5, 2, 7], kind), tokenizer=None, max_length=3)
    expected = [range(3), range(3, 5), range(2), range(3), range(3, 6), range(6, 7)]
    assert labels(examples) == [np.asarray(KINDS[kind](list(run))).tolist() for run in expected]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_cut_off_loses_its_values(kind: str) -> None:
    examples, _ = read(rows_of([5, 4], kind), tokenizer=None, max_length=4, long_examples="truncate", max_tokens=6)
    assert labels(examples) == [np.asarray(KINDS[kind](list(range(n)))).tolist() for n in (4, 2)]


@pytest.mark.parametrize(("left", "right"), [(2, 0), (0, 3), (1, 1)])
def test_padding_loses_its_values(left: int, right: int) -> None:
    rows = [
        {
            "input_ids": [0] * left + row["input_ids"] + [0] * right,
            "attention_mask": [0] * left + [1] * 6 + [0] * right,
            "labels": [-100] * left + row["labels"] + [-100] * right,
        }
        for row in rows_of([6])
    ]
    for source in (rows, datasets.Dataset.from_list(rows)):
        assert labels(read(source, tokenizer=None)[0]) == [list(range(6))]
        assert labels(read(source, tokenizer=None, max_length=4)[0]) == [[0, 1, 2, 3], [4, 5]]


def test_a_start_token_that_a_window_gets_has_no_value() -> None:
    tokenizer = make_tokenizer(single="<s> $A </s>")
    examples, _ = read([{"text": "a b c d", "labels": [0, 1, 2, 3, 4, 5]}], tokenizer=tokenizer, max_length=4)
    assert [len(ids) for ids in tokens(examples)] == [4, 3]
    assert [example.columns["labels"] for example in examples] == [[0, 1, 2, 3], [None, 4, 5]]


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    max_length=st.integers(2, 9),
    max_tokens=st.none() | st.integers(1, 40),
)
@settings(max_examples=40, deadline=None)
def test_every_value_stays_with_its_token(lengths: list[int], max_length: int, max_tokens: int | None) -> None:
    rows = [
        {"input_ids": ids, "labels": [10 * x for x in ids]} for ids in ([3 + i % 9 for i in range(n)] for n in lengths)
    ]
    examples, _ = read(rows, tokenizer=None, max_length=max_length, max_tokens=max_tokens)
    assert all(example.columns["labels"] == [10 * x for x in example.input_ids.tolist()] for example in examples)


@pytest.mark.parametrize(
    "values",
    [
        [[1, 2, 3], [1, 2, 3]],  # as long as no row
        [["x"] * 4, ["y"] * 9],  # as long as the second row has tokens, and not as the first
        [[{"a": 1}] * 5, [{"a": 1}] * 9],  # as long as both have tokens, but no values
        ["abcde", "abcdefghi"],
        [None, None],
        [[], []],
    ],
)
def test_other_columns_stay_as_they_are(values: list[Any]) -> None:
    rows = [{"input_ids": [5] * n, "labels": value} for n, value in zip((5, 9), values, strict=True)]
    examples, _ = read(rows, tokenizer=None, max_length=5)
    assert [example.columns["labels"] for example in examples] == [values[0], values[1], values[1]]


def test_a_column_that_was_cut_keeps_to_it() -> None:
    rows = [*rows_of([3, 5]), {"input_ids": [5, 5], "labels": [1, 2, 3]}]
    with pytest.raises(DatasetError, match=r"row 2: column 'labels' has 3 values.* 2 tokens; in row 1 "):
        read(rows, tokenizer=None, max_length=4)
    assert labels(read(rows, tokenizer=None)[0])[-1] == [1, 2, 3]  # nothing was cut
    gap = [*rows_of([5]), {"input_ids": [5, 5], "labels": None}, *rows_of([2])]
    examples, _ = read(gap, tokenizer=None, max_length=4)
    assert [example.columns["labels"] for example in examples] == [[0, 1, 2, 3], [4], None, [0, 1]]


@pytest.mark.parametrize(
    ("lengths", "off", "is_noted"),
    [
        ([6, 4, 7, 5], {0: -1}, True),  # the first row lacks one
        ([6, 4, 7, 5], {0: 1}, True),
        ([6, 4, 7, 5], {0: 5}, True),  # the others are as long as their rows
        ([6, 4, 7, 5], {0: -1, 1: -1, 2: -1, 3: -1}, True),  # all lack the BOS
        ([6, 4, 7, 5], {0: 3, 1: 9, 2: -4, 3: 0}, False),  # an ordinary list, as long as one row by chance
        ([6, 4, 7, 5], {}, False),
    ],
)
def test_lists_that_should_have_one_value_a_token_are_noted(
    lengths: list[int], off: dict[int, int], is_noted: bool
) -> None:
    rows = rows_of(lengths)
    for row, by in off.items():
        rows[row]["labels"] = list(range(lengths[row] + by))
    rows[0]["scores"] = [1]  # and nowhere else: says nothing
    examples, report = read(rows, tokenizer=None, max_length=100)
    found = [note for note in report.notes() if "'labels'" in note]
    assert len(found) == is_noted
    if is_noted:
        assert f"row 0 has {len(rows[0]['labels'])} values and {lengths[0]} tokens" in found[0]
    assert labels(examples) == [row["labels"] for row in rows]

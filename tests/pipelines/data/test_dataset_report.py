"""The report on a dataset: every count that says something was cut or left out is told, and only then."""

from dataclasses import fields, replace
from typing import Any

import pytest

from residua.pipelines.data.dataset_settings import DatasetReport

WHOLE = DatasetReport(n_sources=2000, n_examples=2500, n_tokens=90_000, n_rows=90_000)


def test_a_dataset_that_was_taken_whole_needs_no_note() -> None:
    assert WHOLE.notes() == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_split": 12}, "12 rows of the dataset were split into windows"),
        ({"n_truncated": 3, "n_truncated_tokens": 4}, "3 rows lost 4 tokens"),
        ({"n_padding": 5}, "5 tokens of padding were taken off"),
        ({"n_empty": 6}, "6 rows of the dataset have no tokens and were left out"),
        ({"n_short": 7}, "7 examples were shorter than asked and left out"),
        ({"n_without_rows": 8}, "8 examples have no position to keep and were left out"),
        ({"cut_at_max_tokens": True, "n_cut_tokens": 9}, "--max-tokens ended the reading; the last example lost 9"),
    ],
)
def test_each_loss_is_one_sentence(changes: dict[str, Any], words: str) -> None:
    (note,) = replace(WHOLE, **changes).notes()
    assert words in note


def test_no_count_of_the_report_is_forgotten() -> None:
    counted = {field.name for field in fields(DatasetReport)} - {"n_sources", "n_examples", "n_tokens", "n_rows"}
    values: dict[str, Any] = {name: 7_000_000 + i for i, name in enumerate(sorted(counted - {"cut_at_max_tokens"}))}
    text = "\n".join(DatasetReport(**values, cut_at_max_tokens=True).notes())
    assert [name for name, value in values.items() if str(value) not in text] == []

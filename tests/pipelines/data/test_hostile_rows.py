"""Rows of a dataset are untrusted: any row becomes examples that can be stored, or an error that names it."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residua.pipelines.data.dataset import DatasetReport, read_examples
from residua.pipelines.data.dataset_settings import DatasetSettings
from residua.store.base.errors import DatasetError
from residua.store.examples.table import ExampleTable
from residua.store.examples.writer import ExampleWriter
from tests.pipelines.dataset_samples import TOKENIZER

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just([1, 2, 3])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)
NAMES = st.sampled_from(["text", "input_ids", "messages", "attention_mask", "keep", "label", "n_rows", "first_row", ""])
ROWS = st.dictionaries(NAMES | st.text(max_size=3), VALUES, max_size=4)
GOOD = st.sampled_from(
    [{"text": "a b c"}, {"input_ids": [3, 4, 5]}, {"messages": [{"role": "user", "content": "a b"}]}]
)


def read_and_store(source: Any, folder: Path, positions: str = "all") -> int:
    """Read and store examples, check that all can be read back, and return their number."""
    writer = ExampleWriter(folder)
    settings = DatasetSettings(positions=positions, max_length=16)
    examples = read_examples(
        source,
        settings=settings,
        tokenizer=TOKENIZER,
        model_limit=64,
        vocab_size=12,
        special_ids=frozenset({0}),
        report=DatasetReport(),
    )
    n = 0
    for example in examples:
        writer.add(example)
        n += 1
    writer.close()
    table = ExampleTable(folder)
    table.verify()
    assert table.table().num_rows == n
    return n


@settings(max_examples=120)
@given(
    rows=st.lists(ROWS | GOOD, min_size=1, max_size=4),
    positions=st.sampled_from(["all", "last", "column:keep", "assistant"]),
)
def test_any_rows_are_stored_or_refused(
    rows: list[Any], positions: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    try:
        assert read_and_store(rows, tmp_path_factory.mktemp("rows") / "examples", positions) >= 0
    except DatasetError as error:
        assert len(str(error)) < 2000  # noqa: PT017  # either outcome is right for some rows


@settings(max_examples=100)
@given(items=st.lists(VALUES | st.binary(max_size=4), min_size=1, max_size=3))
def test_any_items_are_stored_or_refused(items: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    try:
        assert read_and_store(items, tmp_path_factory.mktemp("items") / "examples") >= 0
    except DatasetError as error:
        assert len(str(error)) < 2000  # noqa: PT017  # as above


@settings(max_examples=25)
@given(data=st.data())
def test_any_file_of_lines_is_stored_or_refused_with_its_name(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("lines")
    path = folder / "data.jsonl"
    lines = [json.dumps(row) for row in data.draw(st.lists(GOOD | ROWS, min_size=1, max_size=3))]
    text = "\n".join(lines).encode()
    at = data.draw(st.integers(0, len(text)))
    path.write_bytes(text[:at] + data.draw(st.binary(max_size=6)) + text[at + data.draw(st.integers(0, 3)) :])
    try:
        assert read_and_store(str(path), folder / "examples") >= 0
    except DatasetError as error:
        assert len(str(error)) < 20_000  # noqa: PT017  # as above

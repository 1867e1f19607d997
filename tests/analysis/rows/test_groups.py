"""Which examples belong together: windows of a document, equal contents, and what a user's column says."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from residua.analysis.rows.groups import example_groups
from residua.store.base.errors import AnalysisError
from residua.store.read.archive import Archive
from tests.analysis.rows_archive import write_rows

RNG = np.random.default_rng(0)


def text(n_tokens: int) -> list[int]:
    return [int(token) for token in RNG.integers(1, 5000, n_tokens)]


def make(path: Path, input_ids: Sequence[Sequence[int]], **columns: Sequence[object]) -> Archive:
    lengths = [len(ids) for ids in input_ids]
    values = {"resid_post.0": np.zeros((sum(lengths), 2), np.float32)}
    return write_rows(path / "a.zarr", lengths, values, input_ids=input_ids, columns=columns, rows_per_shard=4096)


def test_windows_of_a_document_and_equal_documents(tmp_path: Path) -> None:
    long, other, short = text(90), text(60), text(5)
    documents = [long, other, short, text(5), long, short, other[:59]]  # 4 is a copy of 0, 5 of 2; 6 is almost 1
    windows = [(i, ids[start : start + 30]) for i, ids in enumerate(documents) for start in range(0, len(ids), 30)]
    archive = make(tmp_path, [ids for _, ids in windows], source_index=[i for i, _ in windows])
    document = np.array([i for i, _ in windows])
    first = {0: 0, 1: 1, 2: 2, 3: 3, 4: 0, 5: 2, 6: 1}  # 6 shares a whole window with 1
    start = {i: int(np.flatnonzero(document == i)[0]) for i in range(7)}
    assert example_groups(archive).tolist() == [start[first[i]] for i in document.tolist()]
    assert example_groups(archive, "source_index").tolist() == [start[i] for i in document.tolist()]
    assert example_groups(archive, "example").tolist() == list(range(len(windows)))


def test_documents_in_windows_of_a_few_tokens_are_compared_as_a_whole(tmp_path: Path) -> None:
    one, two = text(24), text(24)
    two[16:] = one[16:]  # the same last window, as many documents have
    documents = [one, two, one]
    archive = make(
        tmp_path,
        [ids[start : start + 8] for ids in documents for start in (0, 8, 16)],
        source_index=[i for i in range(3) for _ in range(3)],
    )
    assert example_groups(archive).tolist() == [0, 0, 0, 3, 3, 3, 0, 0, 0]


def test_without_a_dataset_equal_examples_belong_together(tmp_path: Path) -> None:
    """A Recorder's archive has no source_index; images have one placeholder for tokens, and no content to compare."""
    same = text(3)
    archive = make(tmp_path, [same, [0], [0], text(4), same, [7] * 40, [7] * 40])
    assert example_groups(archive).tolist() == [0, 1, 2, 3, 0, 5, 6]


def test_columns_join_what_documents_and_contents_leave_apart(tmp_path: Path) -> None:
    same = text(20)
    archive = make(
        tmp_path,
        [text(9), same, text(9), same, text(9), text(9)],
        source_index=[0, 1, 2, 3, 4, 5],
        author=["a", "b", "a", "c", None, None],
        team=[7, 7, 8, 8, 9, 9],
        notes=[["x"]] * 6,
    )
    assert example_groups(archive).tolist() == [0, 1, 2, 1, 4, 5]
    assert example_groups(archive, "author").tolist() == [0, 1, 0, 1, 4, 5]
    assert example_groups(archive, "team").tolist() == [0, 0, 0, 0, 4, 4]
    for name, quoted in {"autor": r"'autor'.*author", "notes": r"'notes'.*list"}.items():
        with pytest.raises(AnalysisError, match=quoted):
            example_groups(archive, name)


def test_many_examples(tmp_path: Path) -> None:
    contents = [text(2) for _ in range(50)]
    drawn: list[int] = RNG.integers(0, 50, 400).tolist()
    archive = make(tmp_path, [contents[i] for i in drawn])
    expected: list[Any] = [drawn.index(i) for i in drawn]
    assert example_groups(archive).tolist() == expected

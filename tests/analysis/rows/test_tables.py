"""Rows as tables, compared with values looked up one by one."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import residua
from residua.store.base.errors import AnalysisError, DatasetError, NotCapturedError, UnknownSiteError
from residua.store.read.archive import Archive
from residua.store.selection.row_filter import RowFilter
from tests.analysis.large_archive import make_large
from tests.stopped import take_back
from tests.store.read.test_text import byte_level
from tests.store.small_archive import LENGTHS, N_ROWS, make_archive

record_batches, table = residua.analysis.record_batches, residua.analysis.table


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return Archive(make_archive(tmp_path_factory.mktemp("tables") / "acts.zarr"))


def by_hand(archive: Archive, row: int) -> dict[str, Any]:
    """Return what the table should hold for a row, from its example."""
    example = int(np.repeat(np.arange(len(LENGTHS)), LENGTHS)[row])
    start, _ = archive.example_table.rows(example)
    token = int(archive.example_table.tokens(example)[row - start])
    return {
        "row": row,
        "example": example,
        "position": row - start,
        "token": token,
        "token_text": f"w{token}",
        "label": f"example {example}",
        "score": example / 7,
        "count": 1000 * example,
        "resid_post.0": archive.example(example)["resid_post.0"][row - start].tolist(),
        "q.1": archive.example(example)["q.1"][row - start].tolist(),
    }


def test_a_table_has_tokens_columns_and_activations(archive: Archive) -> None:
    rows = [30, 2, 2, 37, 20]
    found = table(archive, rows, sites=["resid_post.0", "q.1"])
    assert found.to_pylist() == [by_hand(archive, row) for row in rows]
    assert found.schema.field("resid_post.0").type == pa.list_(pa.float32(), 40)
    assert found.schema.field("q.1").type == pa.list_(pa.list_(pa.float32(), 4), 2)


def test_texts_are_whole_characters(tmp_path: Path) -> None:
    text = "a 漢 b😂"
    config = LlamaConfig(
        vocab_size=256, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
    )
    archive = residua.capture_dataset(
        LlamaForCausalLM(config),
        [text],
        out=tmp_path / "a.zarr",
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=byte_level()),  # type: ignore[no-untyped-call]  # theirs
        sites="embed",
    ).archive
    expected = [letter for letter in text for _ in letter.encode()]
    assert table(archive, slice(None))["token_text"].to_pylist() == expected
    assert table(archive, [9, 3, 0])["token_text"].to_pylist() == [expected[row] for row in (9, 3, 0)]
    assert [archive.text(row, 0)[1:-1] for row in range(len(expected))] == expected


def test_rows_are_selected_by_filter_slice_or_numbers(archive: Archive) -> None:
    expected = [row for row in range(N_ROWS) if by_hand(archive, row)["position"] > 3]
    for choice in ("position > 3", RowFilter.parse("position > 3"), np.array(expected, np.int32)):
        assert table(archive, choice)["row"].to_pylist() == expected
    assert table(archive, slice(5, 30, 7))["row"].to_pylist() == [5, 12, 19, 26]
    assert table(archive, slice(None))["row"].to_pylist() == list(range(N_ROWS))


def test_batches_are_slices_of_the_table(archive: Archive) -> None:
    full = table(archive, "label != 'example 1'", sites="q.*")
    batches = list(record_batches(archive, "label != 'example 1'", sites="q.*", batch_rows=6))
    assert max(batch.num_rows for batch in batches) == 6
    assert pa.Table.from_batches(batches).equals(full)
    assert full.num_rows == N_ROWS - 1


def test_columns_are_selected_by_name(archive: Archive) -> None:
    own = ["row", "example", "position", "token", "token_text"]
    assert table(archive, [3]).column_names == [*own, "label", "score", "count"]
    assert table(archive, [3], columns=["count", "n_tokens"]).column_names == [*own, "count", "n_tokens"]
    assert table(archive, [3], columns=[]).column_names == own


def test_no_rows_make_an_empty_table_of_the_same_columns(archive: Archive) -> None:
    some, none = (table(archive, rows, sites="q.1") for rows in ([3], "position > 900"))
    assert none.num_rows == 0
    assert none.schema == some.schema
    assert list(record_batches(archive, "position > 900")) == []


def test_pandas_gets_a_frame(archive: Archive) -> None:
    frame = table(archive, "position > 3", sites="resid_post.0").to_pandas()
    norms = frame["resid_post.0"].map(np.linalg.norm).groupby(frame["label"]).mean()
    for label in ("example 0", "example 2", "example 3"):
        values = archive.example(int(label[-1]))["resid_post.0"][4:]
        assert norms[label] == pytest.approx(np.linalg.norm(values, axis=1).mean(), rel=1e-6)


def test_bfloat16_becomes_float32_and_without_a_tokenizer_there_is_no_text(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((16, 4), np.float32).astype(ml_dtypes.bfloat16)
    archive = make_large(tmp_path / "acts.zarr", values.view(np.uint16), 2, dtype="bfloat16")
    found = table(archive, [17, 3], sites="resid_post.0", columns=[])
    assert found.column_names == ["row", "example", "position", "token", "resid_post.0"]
    assert found["resid_post.0"].to_pylist() == [values[row].astype(np.float32).tolist() for row in (1, 3)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rows": [N_ROWS]}, IndexError, "acts.zarr has 38 rows.* 38$"),
        ({"rows": [-1]}, IndexError, "row -1"),
        ({"rows": [0.5]}, AnalysisError, r"\[0.5\].*filter.*slice.*row numbers"),
        ({"rows": "position >"}, AnalysisError, "'position >'"),
        ({"rows": [0], "sites": "q.7"}, UnknownSiteError, "q.7"),
        ({"rows": [0], "columns": ["colour"]}, DatasetError, "'colour'"),
        ({"rows": [0], "columns": ["label", "label"]}, AnalysisError, "'label'.* columns="),
    ],
)
def test_bad_arguments_are_named(
    archive: Archive, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        table(archive, **arguments)


def test_a_filter_selects_among_captured_rows(tmp_path: Path) -> None:
    path = make_archive(tmp_path / "acts.zarr")
    take_back(path, 1)
    incomplete = Archive(path)
    assert table(incomplete, "token >= 0", sites="q.1")["row"].to_pylist() == [*range(16), *range(32, N_ROWS)]
    with pytest.raises(NotCapturedError, match=r"16 "):
        table(incomplete, [20])

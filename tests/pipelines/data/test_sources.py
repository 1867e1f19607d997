"""What a dataset yields is what is captured: every feature type, every kind of object, compared with its own rows."""

import datetime
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from residua.pipelines.data.dataset_settings import DatasetSettings
from residua.pipelines.data.sources import Rows, open_rows
from residua.store.base.errors import DatasetError
from tests.pipelines.dataset_samples import CHATS, ids, read, tokens

List, Value = datasets.List, datasets.Value
WHEN = datetime.datetime(2026, 1, 2, 3, 4, 5)
FEATURES: dict[str, tuple[Any, list[Any]]] = {
    "json": (datasets.Json(), [{"a": [1, "x"]}, "pos", 7, None, [1]]),
    "json inside": (List({"role": Value("string"), "args": datasets.Json()}), [[{"role": "a", "args": {"x": 1}}], []]),
    "class label": (datasets.ClassLabel(names=["neg", "pos"]), [0, 1]),
    "nested": ({"a": {"b": Value("int64")}, "c": List(Value("string"))}, [{"a": {"b": 1}, "c": ["x"]}]),
    "lists of lists": (List(List(Value("float64"))), [[[0.1], []], []]),
    "list of one length": (List(Value("int32"), length=2), [[1, 2], [3, 4]]),
    "large list": (datasets.LargeList(Value("int64")), [[1], []]),
    "large string": (Value("large_string"), ["x", None, ""]),
    "null": (Value("null"), [None, None]),
    "nulls": (Value("int64"), [None, 2**53 + 1]),
    "bool": (Value("bool"), [True, None]),
    "float": (Value("float64"), [0.1, float("inf")]),
    "time": (Value("timestamp[us]"), [WHEN]),
    "bytes": (Value("binary"), [b"\xff\x00"]),
    "array": (datasets.Array2D(shape=(1, 2), dtype="int64"), [[[1, 2]]]),
    "translation": (datasets.Translation(languages=["de", "en"]), [{"de": "x", "en": "y"}]),
}


def build(name: str) -> datasets.Dataset:
    feature, values = FEATURES[name]
    features = datasets.Features({"text": Value("string"), "x": feature})
    return datasets.Dataset.from_dict({"text": ["a b"] * len(values), "x": values}, features=features)


def opened(source: object, **options: Any) -> Rows:
    return open_rows(source, DatasetSettings(**options))


def as_lists(rows: Any) -> Any:
    """Return rows with every array as a list, for comparing."""
    return [
        {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()} for row in rows
    ]


def as_parquet(dataset: datasets.Dataset, folder: Path) -> object:
    dataset.to_parquet(folder / "x.parquet")
    return folder / "x.parquet"


def as_saved(dataset: datasets.Dataset, folder: Path) -> object:
    dataset.save_to_disk(folder / "saved")
    return folder / "saved"


def as_folder(dataset: datasets.Dataset, folder: Path) -> object:
    (folder / "folder").mkdir()
    dataset.to_parquet(folder / "folder" / "train-0.parquet")
    return folder / "folder"


KINDS: dict[str, Callable[[datasets.Dataset, Path], object]] = {
    "dataset": lambda dataset, _: dataset,
    "chosen rows": lambda dataset, _: dataset.select(list(range(len(dataset)))[::-1]).flatten_indices().select([0]),
    "stream": lambda dataset, _: dataset.to_iterable_dataset(),
    "torch": lambda dataset, _: dataset.with_format("torch"),
    "pandas": lambda dataset, _: dataset.with_format("pandas"),
    "splits": lambda dataset, _: datasets.DatasetDict({"train": dataset}),
    "parquet": as_parquet,
    "saved": as_saved,
    "folder": as_folder,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FEATURES)
def test_rows_are_what_the_dataset_yields(name: str, kind: str, tmp_path: Path) -> None:
    dataset = build(name)
    expected = list(dataset) if kind != "chosen rows" else [dataset[len(dataset) - 1]]
    assert as_lists(opened(KINDS[kind](dataset, tmp_path)).rows) == expected


def test_a_transform_is_applied_and_its_columns_count() -> None:
    dataset = datasets.Dataset.from_dict({"text": ["a", "b"], "x": [1, 2]})
    shouting = dataset.with_transform(lambda batch: {"body": [f"{t} c" for t in batch["text"]], "n": batch["x"]})
    rows = opened(shouting)
    assert (rows.columns, rows.text_columns) == (["body", "n"], ["body"])
    examples, _ = read(shouting)
    assert tokens(examples) == [ids("<s> a c"), ids("<s> b c")]
    assert [example.columns["n"] for example in examples] == [1, 2]


def test_a_format_chooses_columns_only() -> None:
    dataset = datasets.Dataset.from_dict({"text": ["a"], "x": [0.1], "y": [1]})
    assert list(opened(dataset.with_format("numpy", columns=["text", "x"])).rows) == [{"text": "a", "x": 0.1}]


def test_a_stream_that_was_mapped_keeps_its_mixed_values() -> None:
    def mixed() -> Iterator[dict[str, Any]]:
        yield {"text": "a", "y": {"a": 1}}
        yield {"text": "b", "y": {"b": "x"}}

    stream = datasets.IterableDataset.from_generator(mixed).map(lambda row: {"z": [row["y"]]})
    assert list(opened(stream).rows) == list(stream)


@pytest.mark.parametrize("as_stream", [False, True])
def test_pictures_stay_as_they_are_stored_and_json_beside_them_is_decoded(tmp_path: Path, as_stream: bool) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "p.png")
    picture = datasets.Image()
    features = datasets.Features(
        {"text": Value("string"), "p": picture, "many": List(picture), "meta": datasets.Json(), "other": Value("int8")}
    )
    path = str(tmp_path / "p.png")
    values = {"text": ["a"], "p": [path], "many": [[path]], "meta": [{"k": [1, "x"]}], "other": [1]}
    dataset: Any = datasets.Dataset.from_dict(values, features=features)
    if as_stream:
        dataset = dataset.to_iterable_dataset()
    (row,) = opened(dataset).rows
    stored = {"bytes": None, "path": path}
    assert row == {"text": "a", "p": stored, "many": [stored], "meta": {"k": [1, "x"]}, "other": 1}
    assert dataset.features["p"].decode  # the user's dataset is as it was
    if not as_stream:
        (row,) = opened(dataset.with_format("torch", columns=["text", "meta", "p"])).rows
        assert row == {"text": "a", "p": stored, "meta": {"k": [1, "x"]}}


def test_a_chat_with_other_kinds_of_content_keeps_the_plain_ones() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    dataset = datasets.Dataset.from_list([{"messages": chat} for chat in [*CHATS, parts]], on_mixed_types="use_json")
    assert [row["messages"] for row in opened(dataset).rows] == [*CHATS, parts]
    assert tokens(read(dataset.select([0, 1]))[0]) == [ids("<s> user a b assistant c d"), ids("<s> user e")]


def test_a_number_among_the_texts_is_refused_with_row_and_column() -> None:
    dataset = datasets.Dataset.from_dict({"text": ["a", 7, "c"]}, on_mixed_types="use_json")
    with pytest.raises(DatasetError, match=r"row 1: column 'text' .* found 7"):
        read(dataset)


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())])
def test_any_column_of_texts_in_parquet_is_found(tmp_path: Path, kind: Any) -> None:
    table = pa.table({"n": [1, 2, 3], "body": pa.array([None, "a", "b"]).cast(kind)})
    pq.write_table(table, tmp_path / "x.parquet")
    examples, report = read(tmp_path / "x.parquet")
    assert tokens(examples) == [ids("<s> a"), ids("<s> b")]
    assert report.n_empty == 1


class TestFrames:
    def test_rows_of_pandas(self) -> None:
        frame = pd.DataFrame(
            {
                "text": ["a b", None, "c"],
                "n": pd.array([2**53 + 1, None, 3], "Int64"),
                "score": [0.5, float("nan"), 1.0],
                "kind": pd.Categorical(["x", "y", "x"]),
                "tags": [["p"], [], None],
            },
            index=[7, 8, 9],
        )
        assert list(opened(frame).rows) == [
            {"text": "a b", "n": 2**53 + 1, "score": 0.5, "kind": "x", "tags": ["p"]},
            {"text": None, "n": None, "score": None, "kind": "y", "tags": []},
            {"text": "c", "n": 3, "score": 1.0, "kind": "x", "tags": None},
        ]
        examples, report = read(frame)
        assert tokens(examples) == [ids("<s> a b"), ids("<s> c")]
        assert report.n_empty == 1
        many = pd.DataFrame({"input_ids": [[i % 12] for i in range(300)]})
        assert tokens(read(many, tokenizer=None)[0]) == many["input_ids"].tolist()

    def test_rows_of_arrow(self) -> None:
        rows = [{"text": "a b", "n": 1}, {"text": None, "n": 2}, {"text": "c", "n": None}]
        assert list(opened(pa.Table.from_pylist(rows)).rows) == rows
        with pytest.raises(DatasetError, match="no rows"):
            opened(pa.table({"text": pa.array([], pa.string())}))

    @pytest.mark.parametrize("lazy_slice", [False, True])
    def test_rows_of_polars(self, lazy_slice: bool) -> None:
        day = datetime.datetime(2024, 2, 29, 12, 30)
        frame = pl.DataFrame(
            {
                "text": ["a b", None, "c"],
                "n": [2**53 + 1, None, 3],
                "score": [0.5, None, 1.0],
                "kind": pl.Series(["x", "y", "x"], dtype=pl.Categorical),
                "tags": [["p"], [], None],
                "of": [{"id": 1}, {"id": None}, None],
                "day": [day, None, day],
            }
        )
        rows = [
            {"text": "a b", "n": 2**53 + 1, "score": 0.5, "kind": "x", "tags": ["p"], "of": {"id": 1}, "day": day},
            {"text": None, "n": None, "score": None, "kind": "y", "tags": [], "of": {"id": None}, "day": None},
            {"text": "c", "n": 3, "score": 1.0, "kind": "x", "tags": None, "of": None, "day": day},
        ]
        if lazy_slice:
            frame, rows = frame.lazy().filter(pl.col("n").is_not_null()).collect(), [rows[0], rows[2]]
        assert list(opened(frame).rows) == rows
        examples, report = read(frame)
        assert tokens(examples) == [ids("<s> a b"), ids("<s> c")]
        assert report.n_empty == len(rows) - 2
        many = pl.DataFrame({"input_ids": [[i % 12] for i in range(300)]})
        assert tokens(read(many, tokenizer=None)[0]) == many["input_ids"].to_list()

    def test_an_empty_frame_of_polars(self) -> None:
        with pytest.raises(DatasetError, match="is empty"):
            opened(pl.DataFrame({"text": []}))

    @pytest.mark.parametrize("columns", [["text", "text"], ["text", 0], [("a", "b"), "text"]])
    def test_columns_without_a_name_of_their_own_are_refused(self, columns: list[Any]) -> None:
        frame = pd.DataFrame([["a", "b"]])
        frame.columns = columns
        with pytest.raises(DatasetError, match=r"has a column .*: give each column a name"):
            opened(frame)

    def test_an_empty_frame(self) -> None:
        with pytest.raises(DatasetError, match="is empty"):
            opened(pd.DataFrame({"text": []}))


class TestSurrogates:
    @pytest.mark.parametrize(
        "row",
        [
            {"text": "ab\ud800cd"},
            {"text": "a", "note": "\udfff"},
            {"text": "a", "note": [{"deep": ["\ud83d"]}]},
            {"text": "a", "note": {"\ud83d": 1}},
            {"text": "a", "\ud83d": 1},
            {"messages": [{"role": "user", "content": "\ud83d"}]},
        ],
    )
    def test_half_a_pair_names_row_and_column(self, row: dict[str, Any]) -> None:
        good = {"messages": CHATS[1]} if "messages" in row else {"text": "a"}
        rows = [good] * 137 + [row]
        with pytest.raises(DatasetError, match=r"row 137: column .* surrogate"):
            read(rows)

    def test_bare_texts_and_whole_pairs(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=r"row 1: column 'text' has '\\ud800' at character 2"):
            read(["a", "ab\ud800"])
        path = tmp_path / "x.jsonl"
        path.write_text("\n".join(json.dumps({"text": "a", "x": x}) for x in ("\U0001f602", "é\x00\u2028", "")))
        assert [row["x"] for row in opened(path).rows] == ["\U0001f602", "é\x00\u2028", ""]


def test_an_error_says_how_far_the_rows_were_read() -> None:
    def broken() -> Iterator[str]:
        yield from ["a"] * 300
        raise RuntimeError("the socket is gone")

    with pytest.raises(DatasetError, match=r"cannot be read after 300 rows: RuntimeError: the socket is gone"):
        read(broken())
    with pytest.raises(DatasetError, match=r"row 2: the dataset yields 5"):
        read(["a", "b", 5])


def test_token_ids_are_arrays_and_not_lists() -> None:
    (row,) = opened(datasets.Dataset.from_dict({"input_ids": [[5, 6]], "attention_mask": [[1, 1]]})).rows
    assert isinstance(row["input_ids"], np.ndarray)
    assert isinstance(row["attention_mask"], np.ndarray)

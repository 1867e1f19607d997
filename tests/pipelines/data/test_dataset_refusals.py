"""Datasets that cannot be used: an error that quotes what was asked, and says what to do."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from residua.pipelines.data.dataset import DatasetSettings
from residua.store.base.errors import DatasetError
from tests.pipelines.dataset_samples import CHATS, make_tokenizer, read, table_of, write_source


class TestBadInput:
    @pytest.mark.parametrize(
        ("source", "options", "message"),
        [
            ([], {}, "a list is empty: it has no rows"),
            ([""], {}, "the dataset gives no example: 1 rows of the dataset have no tokens"),
            (5, {}, "a int is no dataset: give a path"),
            ([5], {}, "the dataset yields 5, which is no text"),
            (b"text", {}, "a bytes is no dataset"),
            (["a"], {"split": "train"}, "--split 'train': a list has no splits"),
            (["a"], {"text_column": "body"}, "there is no column 'body': the dataset has text"),
            ([{"x": "a", "y": "b"}], {}, "no column 'text', and 2 columns hold text: the dataset has x, y"),
            ([{"text": "a"}, {"body": "b"}], {}, "row 1: there is no column 'text'; the row has body"),
            ([{"text": "a"}, {"text": 5}], {}, "row 1: column 'text' should hold a text, found 5"),
            ([[5], [12]], {}, "row 1: token id 12 at position 0 is not one of the model's, 0 to 11"),
            ([[5, -1]], {}, "row 0: token id -1 at position 1"),
            ([[5], [0.5]], {}, "row 1: a flat list of whole numbers is needed"),
            ([[5], [[5, 6]]], {}, "row 1: a flat list of whole numbers is needed"),
            ([[5], [[5], [5, 6]]], {}, "row 1: .* is no list of token ids"),
            ([[5], ["a"]], {}, "row 1: a flat list of whole numbers is needed"),
            ([[5, None]], {}, "row 0: a flat list of whole numbers is needed"),
            ([[True]], {}, "row 0: a flat list of whole numbers is needed"),
            ([{"text": "a", "source_token": 1}], {}, "has a column 'source_token', which the examples need"),
            ([[5]], {"positions": "column:keep"}, "positions column:keep: the dataset has no such column"),
            ([{"text": "a", "keep": [2]}], {"positions": "column:keep"}, "row 0: position 2 is not in the example"),
            (["a"], {"positions": "assistant"}, "column 'text' holds text, not chats"),
            ([CHATS[0], "a"], {}, "row 1: there is no column 'messages'; the row has text"),
            ([[{"role": "user"}]], {}, "row 0: a message needs role and content"),
            ([{"input_ids": [5], "attention_mask": [1, 1]}], {}, "row 0: its attention_mask has shape"),
            ([{"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}], {}, "row 0: its attention_mask has gaps"),
        ],
    )
    def test_in_memory(self, source: object, options: dict[str, Any], message: str) -> None:
        with pytest.raises(DatasetError, match=message):
            read(source, **options)

    def test_nothing_to_tokenize_with(self) -> None:
        with pytest.raises(DatasetError, match="holds text, and the model comes without a tokenizer"):
            read(["a"], tokenizer=None)
        with pytest.raises(DatasetError, match="the tokenizer has no chat template"):
            read(CHATS, tokenizer=make_tokenizer())

    def test_a_template_that_raises_names_the_row(self) -> None:
        template = "{% generation %}{% endgeneration %}{{ raise_exception('roles must alternate') }}"
        with pytest.raises(DatasetError, match=r"row 0: the chat template refuses this chat: roles must alternate"):
            read(CHATS, tokenizer=make_tokenizer(template))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_length": 0}, "--max-length is 0: it must be at least 1"),
            ({"max_tokens": -1}, "--max-tokens is -1"),
            ({"long_examples": "cut"}, "--long-examples 'cut': choose one of refuse, split, truncate"),
            ({"positions": "every:x"}, "--positions 'every:x'"),
            ({"max_length": 2, "min_length": 3}, "--min-length 3 is above --max-length 2"),
        ],
    )
    def test_settings_check_themselves(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(DatasetError, match=message):
            DatasetSettings(**options)

    def test_max_length_above_the_model(self) -> None:
        with pytest.raises(DatasetError, match="--max-length is 9, the model takes 8 tokens: give at most 8"):
            read(["a"], model_limit=8, max_length=9)

    @pytest.mark.parametrize("name", ["nowhere.parquet", "./nowhere", "/no/where", "a/b/c", "~/nowhere"])
    def test_a_path_that_is_not_there(self, name: str) -> None:
        with pytest.raises(DatasetError, match=f"dataset '{name}': there is no such file or folder"):
            read(name)

    def test_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        for name, content in (("a.parquet", b"PAR1 no"), ("a.jsonl", b'{"text": "a"}\n{"text'), ("a.arrow", b"?")):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(DatasetError, match=f"dataset '.*{name}' cannot be read"):
                read(tmp_path / name)
        (tmp_path / "a.xyz").write_bytes(b"")
        with pytest.raises(DatasetError, match=r"a.xyz': cannot tell its format; known endings are .parquet"):
            read(tmp_path / "a.xyz")
        (tmp_path / "empty").mkdir()
        with pytest.raises(DatasetError, match=r"empty' cannot be read"):
            read(tmp_path / "empty")

    def test_an_empty_file(self, tmp_path: Path) -> None:
        pq.write_table(table_of([]), tmp_path / "a.parquet")
        with pytest.raises(DatasetError, match=r"a.parquet' is empty: it has no rows"):
            read(tmp_path / "a.parquet")

    def test_hub_options_on_a_local_path(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=r"--subset is given, but .* is a local path"):
            read(write_source(tmp_path, "jsonl"), subset="en")

    def test_an_iterable_that_raises_keeps_its_cause(self) -> None:
        def broken() -> Iterator[str]:
            yield "a"
            raise RuntimeError("the socket is gone")

        with pytest.raises(DatasetError, match="RuntimeError: the socket is gone") as caught:
            read(broken())
        assert isinstance(caught.value.__cause__, RuntimeError)

"""Datasets that cannot be used: the error quotes the request and says what to do."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from residua.pipelines.data.dataset_settings import DatasetSettings
from residua.store.base.errors import DatasetError
from tests.pipelines.dataset_samples import CHATS, make_tokenizer, read, table_of, write_source


class TestBadInput:
    @pytest.mark.parametrize(
        ("source", "options", "message"),
        [
            ([], {}, "a list is empty"),
            ([""], {}, "no example: 1 rows .* no tokens"),
            (5, {}, "a int is .*: give a path"),
            ([5], {}, "the dataset yields 5, .* text"),
            (b"text", {}, "a bytes is .*: give a path"),
            (["a"], {"split": "train"}, "split='train': a list"),
            (["a"], {"text_column": "body"}, "column 'body': the dataset has text; .*text_column="),
            ([{"x": "a", "y": "b"}], {}, "no column 'text'.* x, y; .*text_column="),
            ([{"text": "a"}, {"body": "b"}], {}, "row 1: .* 'text'; the row has body"),
            ([{"text": "a"}, {"text": 5}], {}, "row 1: column 'text' .* found 5"),
            ([[5], [12]], {}, "row 1: token id 12 at position 0 .* 0 to 11"),
            ([[5, -1]], {}, "row 0: token id -1 at position 1"),
            ([[5], [0.5]], {}, "row 1: a flat list of whole numbers is needed"),
            ([[5], [[5, 6]]], {}, "row 1: a flat list of whole numbers is needed"),
            ([[5], [[5], [5, 6]]], {}, "row 1: .* list of token ids"),
            ([[5], ["a"]], {}, "row 1: a flat list of whole numbers is needed"),
            ([[5, None]], {}, "row 0: a flat list of whole numbers is needed"),
            ([[True]], {}, "row 0: a flat list of whole numbers is needed"),
            ([{"text": "a", "source_token": 1}], {}, "column 'source_token'.* rename"),
            ([[5]], {"positions": "column:keep"}, "positions='column:keep': .* no such column"),
            ([{"text": "a", "keep": [2]}], {"positions": "column:keep"}, "row 0: position 2 "),
            (["a"], {"positions": "assistant"}, "positions='assistant': column 'text' .* text_column="),
            ([CHATS[0], "a"], {}, "row 1: .* 'messages'; the row has text"),
            ([[{"role": "user"}]], {}, "row 0: .* role and content"),
            ([{"input_ids": [5], "attention_mask": [1, 1]}], {}, "row 0: .*attention_mask has shape"),
            ([{"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}], {}, "row 0: .*attention_mask has gaps"),
        ],
    )
    def test_in_memory(self, source: object, options: dict[str, Any], message: str) -> None:
        with pytest.raises(DatasetError, match=message):
            read(source, **options)

    def test_nothing_to_tokenize_with(self) -> None:
        with pytest.raises(DatasetError, match=r"column 'text' .* without a tokenizer"):
            read(["a"], tokenizer=None)
        with pytest.raises(DatasetError, match=r"column 'messages' .* no chat template"):
            read(CHATS, tokenizer=make_tokenizer())

    def test_a_template_that_raises_names_the_row(self) -> None:
        template = "{% generation %}{% endgeneration %}{{ raise_exception('roles must alternate') }}"
        with pytest.raises(DatasetError, match=r"row 0: the chat template .*: roles must alternate"):
            read(CHATS, tokenizer=make_tokenizer(template))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_length": 0}, "max_length=0: .* at least 1"),
            ({"max_tokens": -1}, "max_tokens=-1"),
            ({"long_examples": "cut"}, "long_examples='cut': choose one of refuse, split, truncate"),
            ({"positions": "every:x"}, "positions='every:x'"),
            ({"max_length": 2, "min_length": 3}, "min_length=3 is above max_length=2"),
        ],
    )
    def test_settings_check_themselves(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(DatasetError, match=message):
            DatasetSettings(**options)

    def test_max_length_above_the_model(self) -> None:
        with pytest.raises(DatasetError, match=r"max_length=9: .* 8 tokens: give at most 8"):
            read(["a"], model_limit=8, max_length=9)

    @pytest.mark.parametrize("name", ["nowhere.parquet", "./nowhere", "/no/where", "a/b/c", "~/nowhere"])
    def test_a_path_that_is_not_there(self, name: str) -> None:
        with pytest.raises(DatasetError, match=f"dataset '{name}': .*no such file"):
            read(name)

    def test_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        for name, content in (("a.parquet", b"PAR1 no"), ("a.jsonl", b'{"text": "a"}\n{"text'), ("a.arrow", b"?")):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(DatasetError, match=f"'.*{name}' cannot be read"):
                read(tmp_path / name)
        (tmp_path / "a.xyz").write_bytes(b"")
        with pytest.raises(DatasetError, match=r"a.xyz': .*format.* .parquet"):
            read(tmp_path / "a.xyz")
        (tmp_path / "empty").mkdir()
        with pytest.raises(DatasetError, match=r"empty' cannot be read"):
            read(tmp_path / "empty")

    def test_an_empty_file(self, tmp_path: Path) -> None:
        pq.write_table(table_of([]), tmp_path / "a.parquet")
        with pytest.raises(DatasetError, match=r"a.parquet' is empty"):
            read(tmp_path / "a.parquet")

    def test_hub_options_on_a_local_path(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=r"subset= .* local path: leave it out"):
            read(write_source(tmp_path, "jsonl"), subset="en")

    def test_an_iterable_that_raises_keeps_its_cause(self) -> None:
        def broken() -> Iterator[str]:
            yield "a"
            raise RuntimeError("the socket is gone")

        with pytest.raises(DatasetError, match="RuntimeError: the socket is gone") as caught:
            read(broken())
        assert isinstance(caught.value.__cause__, RuntimeError)

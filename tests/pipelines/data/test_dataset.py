"""From a dataset to examples: every kind of source, every rule, and bad input in the user's own words."""

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residua.pipelines.data.dataset import DatasetReport, Window, cut_windows, read_examples
from residua.pipelines.data.dataset_settings import DatasetSettings
from residua.store.base.errors import DatasetError
from residua.store.examples.table import ExampleTable
from residua.store.examples.writer import ExampleWriter
from tests.pipelines.dataset_samples import CHATS, TOKENIZER, ids, make_tokenizer, positions, read, tokens, write_source


class TestSources:
    @pytest.mark.parametrize(
        "kind", ["parquet", "PARQUET", "jsonl", "json", "jsonl.gz", "csv", "tsv", "arrow", "saved", "folder"]
    )
    @pytest.mark.parametrize("as_text", [True, False])
    def test_local_files(self, tmp_path: Path, kind: str, as_text: bool) -> None:
        path = write_source(tmp_path, kind)
        examples, report = read(str(path) if as_text else path)
        assert tokens(examples) == [ids("<s> a b c"), ids("<s> d e f g a"), ids("<s> b")]
        assert [dict(example.columns) for example in examples] == [
            {"label": i, "source_index": i, "source_token": 0} for i in (0, 2, 3)
        ]
        assert (report.n_sources, report.n_examples, report.n_empty) == (4, 3, 1)
        assert (report.n_tokens, report.n_rows) == (12, 12)
        (note,) = report.notes()
        assert "1 rows of the dataset have no tokens" in note

    def test_lines_of_a_text_file(self, tmp_path: Path) -> None:
        path = tmp_path / "book.txt"
        path.write_text("a b\n\nc\n")
        examples, report = read(path)
        assert tokens(examples) == [ids("<s> a b"), ids("<s> c")]
        assert report.n_empty == 1

    def test_a_local_file_of_token_ids_needs_no_tokenizer(self, tmp_path: Path) -> None:
        path = tmp_path / "ids.parquet"
        pq.write_table(pa.table({"input_ids": [[5, 6], [], [7]], "text": ["x", "y", "z"]}), path)
        examples, report = read(path, tokenizer=None)
        assert tokens(examples) == [[5, 6], [7]]
        assert [example.columns["text"] for example in examples] == ["x", "z"]
        assert report.n_empty == 1

    @pytest.mark.parametrize(
        "source",
        [
            [[5, 6], [7]],
            [np.array([5, 6]), np.array([7], np.uint8)],
            ((5, 6), (7,)),
            [{"input_ids": [5, 6]}, {"input_ids": (7,)}],
            datasets.Dataset.from_dict({"input_ids": [[5, 6], [7]]}),
            datasets.Dataset.from_dict({"input_ids": [[5, 6], [7]]}).to_iterable_dataset(),
            datasets.DatasetDict({"train": datasets.Dataset.from_dict({"input_ids": [[5, 6], [7]]})}),
        ],
        ids=lambda source: type(source).__name__,
    )
    def test_token_ids_in_memory(self, source: object) -> None:
        assert tokens(read(source, tokenizer=None)[0]) == [[5, 6], [7]]

    def test_texts_and_rows_in_memory(self) -> None:
        assert tokens(read(["a b", "c"])[0]) == [ids("<s> a b"), ids("<s> c")]
        examples, _ = read([{"body": "a", "n": 1}, {"body": "b", "n": None}])
        assert tokens(examples) == [ids("<s> a"), ids("<s> b")]
        assert [example.columns["n"] for example in examples] == [1, None]

    def test_a_chat_goes_through_the_template(self) -> None:
        expected = [ids("<s> user a b assistant c d"), ids("<s> user e")]
        assert tokens(read(CHATS)[0]) == expected
        rows = [{"id": i, "messages": chat} for i, chat in enumerate(CHATS)]
        assert tokens(read(rows)[0]) == expected
        assert tokens(read(datasets.Dataset.from_list(rows))[0]) == expected

    def test_padding_is_taken_off_and_positions_follow(self) -> None:
        rows = [
            {"input_ids": [0, 0, 5, 6], "attention_mask": [0, 0, 1, 1], "keep": [3]},
            {"input_ids": [7, 8, 1], "attention_mask": [1, 1, 0], "keep": [0, 2]},
        ]
        examples, report = read(rows, positions="column:keep")
        assert tokens(examples) == [[5, 6], [7, 8]]
        assert positions(examples) == [[1], [0]]
        assert report.n_padding == 3
        assert set(examples[0].columns) == {"source_index", "source_token"}

    def test_splits(self, tmp_path: Path) -> None:
        for split, texts in (("train", ["a"]), ("test", ["b"])):
            pq.write_table(pa.table({"text": texts}), tmp_path / f"{split}-0.parquet")
        assert tokens(read(tmp_path)[0]) == [ids("<s> a")]
        assert tokens(read(tmp_path, split="test")[0]) == [ids("<s> b")]
        for wrong in ("dev", "train[:1]"):
            with pytest.raises(DatasetError, match=r"has train, test"):
                read(tmp_path, split=wrong)

    def test_reading_runs_only_a_little_ahead(self) -> None:
        taken = 0

        def endless() -> Iterator[str]:
            nonlocal taken
            while True:
                taken += 1
                yield "a b c"

        examples = read_examples(endless(), settings=DatasetSettings(), tokenizer=TOKENIZER)
        for _ in range(1000):
            next(examples)
        assert taken <= 1000 + 256
        _, report = read(endless(), max_tokens=10)
        assert (report.n_tokens, report.cut_at_max_tokens, report.n_cut_tokens) == (10, True, 2)

    def test_examples_of_a_capture_arrive_in_the_table(self, tmp_path: Path) -> None:
        writer = ExampleWriter(tmp_path / "examples", examples_per_part=2)
        source = write_source(tmp_path, "jsonl")
        for example in read_examples(source, settings=DatasetSettings(max_length=3), tokenizer=TOKENIZER):
            writer.add(example)
        writer.close()
        table = ExampleTable(tmp_path / "examples").table()
        assert table.column("source_index").to_pylist() == [0, 0, 2, 2, 2, 3]
        assert table.column("source_token").to_pylist() == [0, 3, 0, 3, 5, 0]
        assert table.column("label").to_pylist() == [0, 0, 2, 2, 2, 3]


class TestLength:
    def test_longer_than_the_model_is_refused_with_what_to_pass(self) -> None:
        with pytest.raises(DatasetError, match=r"row 1 .* 5 tokens.* model takes 4: .*max_length=4"):
            read(["a", "a b c d"], model_limit=4)

    def test_max_length_splits_and_repeats_the_bos(self) -> None:
        examples, report = read(["a b c d e"], model_limit=4, max_length=3)
        assert tokens(examples) == [ids("<s> a b"), ids("<s> c d"), ids("<s> e")]
        assert [example.columns["source_token"] for example in examples] == [0, 3, 5]
        assert (report.n_split, report.n_tokens) == (1, 8)

    def test_a_bos_is_repeated_only_where_the_source_has_one(self) -> None:
        assert tokens(read([[5, 6, 7]], max_length=2)[0]) == [[5, 6], [7]]
        assert tokens(read([[0, 6, 7]], max_length=2)[0]) == [[0, 6], [0, 7]]
        assert tokens(read([[0, 6, 7]], max_length=2, tokenizer=None)[0]) == [[0, 6], [7]]
        plain = make_tokenizer(single="$A")
        assert tokens(read(["a b c"], max_length=2, tokenizer=plain)[0]) == [ids("a b"), ids("c")]
        closed = make_tokenizer(single="<s> $A </s>")
        examples, _ = read(["a b c"], max_length=3, tokenizer=closed)
        assert tokens(examples) == [ids("<s> a b"), ids("<s> c </s>")]

    def test_truncate_and_refuse(self) -> None:
        examples, report = read(["a b c d", "a"], max_length=3, long_examples="truncate")
        assert tokens(examples) == [ids("<s> a b"), ids("<s> a")]
        assert (report.n_truncated, report.n_truncated_tokens) == (1, 2)
        with pytest.raises(DatasetError, match=r"row 0 .* 5 tokens.* max_length=3"):
            read(["a b c d"], max_length=3, long_examples="refuse")
        examples, _ = read(["a b c d"], model_limit=4, long_examples="split")
        assert tokens(examples) == [ids("<s> a b c"), ids("<s> d")]

    def test_max_tokens_cuts_the_last_example(self) -> None:
        examples, report = read(["a b c", "d e f", "g"], max_tokens=6, positions="last")
        assert tokens(examples) == [ids("<s> a b c"), ids("<s> d")]
        assert positions(examples) == [[3], [1]]
        assert (report.cut_at_max_tokens, report.n_cut_tokens, report.n_tokens) == (True, 2, 6)
        _, report = read(["a b c", "d e f"], max_tokens=8)
        assert (report.cut_at_max_tokens, report.n_tokens) == (False, 8)
        _, report = read(["a b c", "d e f", "g"], max_tokens=8)
        assert (report.cut_at_max_tokens, report.n_cut_tokens) == (True, 0)

    def test_a_cut_that_leaves_nothing_of_its_own_is_counted(self) -> None:
        examples, report = read(["a b c d"], max_length=3, max_tokens=4)
        assert tokens(examples) == [ids("<s> a b")]
        assert (report.n_short, report.cut_at_max_tokens) == (1, True)

    def test_min_length_leaves_out_and_counts(self) -> None:
        examples, report = read(["a", "a b"], min_length=3)
        assert tokens(examples) == [ids("<s> a b")]
        assert report.n_short == 1

    @given(
        sources=st.lists(st.lists(st.integers(3, 11), max_size=30), min_size=1, max_size=5),
        has_bos=st.booleans(),
        max_length=st.integers(2, 9),
    )
    @settings(max_examples=60, deadline=None)
    def test_windows_without_added_bos_are_the_source(
        self, sources: list[list[int]], has_bos: bool, max_length: int
    ) -> None:
        sources = [[5], *([0, *source] if has_bos else source for source in sources)]
        examples, report = read(sources, max_length=max_length)
        rebuilt: list[list[int]] = [[] for _ in sources]
        for example in examples:
            index, at = example.columns["source_index"], example.columns["source_token"]
            assert isinstance(index, int)
            own = example.input_ids.tolist()
            assert len(own) <= max_length
            if at and has_bos:
                assert own.pop(0) == 0
            assert len(rebuilt[index]) == at
            rebuilt[index] += own
        assert rebuilt == sources
        assert report.n_empty == sum(not source for source in sources)
        assert report.n_rows == report.n_tokens == sum(len(example.input_ids) for example in examples)


class TestPositions:
    def test_assistant_turns(self) -> None:
        examples, report = read(CHATS, positions="assistant")
        assert [example.input_ids[example.positions].tolist() for example in examples] == [ids("c d")]
        assert report.n_without_rows == 1

    def test_a_column_of_positions_follows_its_tokens_into_windows(self) -> None:
        rows = [{"text": "a b c d e", "keep": [2, 4]}, {"text": "f", "keep": []}]
        examples, report = read(rows, positions="column:keep", max_length=3)
        kept = [example.input_ids[example.positions].tolist() for example in examples]
        assert kept == [ids("b"), ids("d")]
        assert [example.columns["source_token"] for example in examples] == [0, 3]
        assert report.n_without_rows == 2
        assert any("2 examples have no position" in note for note in report.notes())

    def test_drop_special_takes_the_last_ordinary_token(self) -> None:
        closed = make_tokenizer(single="<s> $A </s>")
        examples, _ = read(["a b", "c"], tokenizer=closed, positions="last", drop_special=True)
        assert positions(examples) == [[2], [1]]
        examples, _ = read(["a b"], tokenizer=closed, drop_special=True)
        assert positions(examples) == [[1, 2]]

    def test_a_template_without_the_mark_is_refused(self) -> None:
        # The template has the word "generation", as nearly every template does.
        template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}{% endif %}"
        with pytest.raises(DatasetError, match=r"positions='assistant': .* \{% generation %\}"):
            read(CHATS, tokenizer=make_tokenizer(template), positions="assistant")


@given(n_tokens=st.integers(0, 200), n_start=st.integers(0, 3), room=st.integers(1, 40))
def test_windows_follow_each_other_without_gap(n_tokens: int, n_start: int, room: int) -> None:
    max_length = n_start + room
    windows = cut_windows(n_tokens, max_length, n_start)
    assert [i for window in windows for i in range(window.start, window.stop)] == list(range(n_tokens))
    assert all(window.n_tokens <= max_length for window in windows)
    assert all(window.n_tokens == max_length for window in windows[:-1])
    assert [window.n_added for window in windows] == [0] + [n_start] * (len(windows) - 1)
    assert all(window.stop > window.start for window in windows) or n_tokens == 0


def test_a_source_that_fits_is_one_window() -> None:
    assert cut_windows(4, 4, 1) == [Window(0, 4)]
    assert cut_windows(1, 1, 1) == [Window(0, 1)]


def test_no_room_next_to_the_start_tokens() -> None:
    with pytest.raises(DatasetError, match=r"max_length=2 .* 2 start tokens .* at least 3"):
        cut_windows(10, 2, 2)


FULL = DatasetReport(n_sources=2000, n_examples=2500, n_tokens=90_000, n_rows=90_000)


def test_a_dataset_that_was_read_in_full_needs_no_note() -> None:
    assert FULL.notes() == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_split": 12}, "12 rows of the dataset were split"),
        ({"n_truncated": 3, "n_truncated_tokens": 4}, "3 rows lost 4 tokens"),
        ({"n_padding": 5}, "5 tokens of padding"),
        ({"n_empty": 6}, "6 rows of the dataset have no tokens"),
        ({"n_short": 7}, "7 examples were shorter"),
        ({"n_without_rows": 8}, "8 examples have no position"),
        ({"cut_at_max_tokens": True, "n_cut_tokens": 9}, "max_tokens= ended the reading; the last example lost 9"),
    ],
)
def test_each_loss_is_one_sentence(changes: dict[str, Any], words: str) -> None:
    (note,) = replace(FULL, **changes).notes()
    assert words in note


def test_no_count_of_the_report_is_forgotten() -> None:
    counted = {field.name for field in fields(DatasetReport)} - {"n_sources", "n_examples", "n_tokens", "n_rows"}
    others: dict[str, Any] = {"cut_at_max_tokens": True, "odd_lists": ["a sentence"]}
    values: dict[str, Any] = {name: 7_000_000 + i for i, name in enumerate(sorted(counted - set(others)))}
    text = "\n".join(DatasetReport(**values, **others).notes())
    assert "a sentence" in text
    assert [name for name, value in values.items() if str(value) not in text] == []

"""From a dataset to examples: every kind of source, every rule, and bad input in the user's own words."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from residua.pipelines import hub
from residua.pipelines.dataset import DatasetReport, DatasetSettings, dataset_identity, read_examples
from residua.store.canonical import canonical_json, digest_of
from residua.store.errors import DatasetError
from residua.store.examples import Example, ExampleTable, ExampleWriter

WORDS = ["<s>", "</s>", "<unk>", "user", "assistant", "a", "b", "c", "d", "e", "f", "g"]
TEXTS = ["a b c", "", "d e f g a", "b"]
UNKNOWN = {"unk_token": "<unk>"}
CHATS = [
    [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}],
    [{"role": "user", "content": "e"}],
]
TEMPLATE = (
    "{{ bos_token }} {% for m in messages %}{{ m['role'] }} {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %} {% endfor %}"
)


def make_tokenizer(template: str | None = None, single: str = "<s> $A") -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, **UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", **UNKNOWN}
    build: Any = PreTrainedTokenizerFast  # its constructor has no annotations
    tokenizer: PreTrainedTokenizerFast = build(tokenizer_object=backend, model_max_length=4, **special)
    tokenizer.chat_template = template
    return tokenizer


TOKENIZER = make_tokenizer(TEMPLATE)


def ids(words: str) -> list[int]:
    return [WORDS.index(word) for word in words.split()]


def read(
    source: object, *, tokenizer: Any = TOKENIZER, model_limit: int | None = None, **options: Any
) -> tuple[list[Example], DatasetReport]:
    report = DatasetReport()
    examples = read_examples(
        source,
        settings=DatasetSettings(**options),
        tokenizer=tokenizer,
        model_limit=model_limit,
        special_ids=frozenset({0, 1}),
        vocab_size=len(WORDS),
        report=report,
    )
    return list(examples), report


def tokens(examples: list[Example]) -> list[list[int]]:
    return [example.input_ids.tolist() for example in examples]


def positions(examples: list[Example]) -> list[list[int]]:
    return [example.positions.tolist() for example in examples]


def table_of(texts: list[str]) -> pa.Table:
    return pa.table({"text": texts, "label": list(range(len(texts)))})


def write_source(folder: Path, kind: str) -> Path:
    """Write TEXTS with a column label in one of the formats, and return the path to give."""
    path = folder / f"data.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in table_of(TEXTS).to_pylist())
    if kind in ("parquet", "PARQUET"):
        pq.write_table(table_of(TEXTS), path, row_group_size=2)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind in ("csv", "tsv"):
        gap = "\t" if kind == "tsv" else ","
        path.write_text(f"text{gap}label\n" + "".join(f"{t}{gap}{i}\n" for i, t in enumerate(TEXTS)))
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table_of(TEXTS).schema) as writer:
            writer.write_table(table_of(TEXTS))
    elif kind == "saved":
        datasets.Dataset.from_dict(table_of(TEXTS).to_pydict()).save_to_disk(path)
    elif kind == "folder":
        path.mkdir()
        pq.write_table(table_of(TEXTS), path / "part-0.parquet")
    else:
        path.write_text(lines)
    return path


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
        assert report.notes() == ["1 rows of the dataset have no tokens and were left out"]

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
        with pytest.raises(
            DatasetError, match=r"row 1 of the dataset has 5 tokens, and the model takes 4: pass max_length=4"
        ):
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
        with pytest.raises(DatasetError, match="row 0 of the dataset has 5 tokens, and max_length is 3"):
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
        assert "2 examples have no position to keep and were left out" in report.notes()

    def test_drop_special_takes_the_last_ordinary_token(self) -> None:
        closed = make_tokenizer(single="<s> $A </s>")
        examples, _ = read(["a b", "c"], tokenizer=closed, positions="last", drop_special=True)
        assert positions(examples) == [[2], [1]]
        examples, _ = read(["a b"], tokenizer=closed, drop_special=True)
        assert positions(examples) == [[1, 2]]

    def test_a_template_without_the_mark_is_refused(self) -> None:
        # Its text has "generation" in it, as nearly every template does.
        template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}{% endif %}"
        with pytest.raises(DatasetError, match="does not mark the assistant's turns"):
            read(CHATS, tokenizer=make_tokenizer(template), positions="assistant")


class TestBadInput:
    @pytest.mark.parametrize(
        ("source", "options", "message"),
        [
            ([], {}, "a list is empty: it has no rows"),
            ([""], {}, "the dataset gives no example: 1 rows of the dataset have no tokens"),
            (5, {}, "a int is no dataset: give a path"),
            ([5], {}, "the dataset yields 5, which is no text"),
            (b"text", {}, "a bytes is no dataset"),
            (["a"], {"split": "train"}, "split 'train': a list has no splits"),
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
            ({"max_length": 0}, "max_length is 0: it must be at least 1"),
            ({"max_tokens": -1}, "max_tokens is -1"),
            ({"long_examples": "cut"}, "long_examples 'cut': choose one of refuse, split, truncate"),
            ({"positions": "every:x"}, "positions 'every:x'"),
            ({"max_length": 2, "min_length": 3}, "min_length 3 is above max_length 2"),
        ],
    )
    def test_settings_check_themselves(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(DatasetError, match=message):
            DatasetSettings(**options)

    def test_max_length_above_the_model(self) -> None:
        with pytest.raises(DatasetError, match="max_length is 9, the model takes 8 tokens: give at most 8"):
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
        with pytest.raises(DatasetError, match=r"subset is given, but .* is a local path"):
            read(write_source(tmp_path, "jsonl"), subset="en")

    def test_an_iterable_that_raises_keeps_its_cause(self) -> None:
        def broken() -> Iterator[str]:
            yield "a"
            raise RuntimeError("the socket is gone")

        with pytest.raises(DatasetError, match="RuntimeError: the socket is gone") as caught:
            read(broken())
        assert isinstance(caught.value.__cause__, RuntimeError)


class TestHub:
    def test_one_commit_is_read_and_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[object] = []

        def load_dataset(*args: object, **options: object) -> object:
            asked.append((args, options))
            return datasets.IterableDatasetDict(
                {"test": datasets.Dataset.from_dict({"text": ["a b"]}).to_iterable_dataset()}
            )

        monkeypatch.setattr(hub, "_hub_revision", lambda name, revision: f"commit of {name}@{revision}")
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        examples, _ = read("someone/texts", subset="en", split="test")
        assert tokens(examples) == [ids("<s> a b")]
        commit = "commit of someone/texts@None"
        assert asked == [(("someone/texts", "en"), {"revision": commit, "streaming": True})]
        assert dataset_identity("someone/texts", DatasetSettings(subset="en", split="test")) == {
            "kind": "hub",
            "id": "someone/texts",
            "subset": "en",
            "split": "test",
            "revision": commit,
        }

    @pytest.mark.parametrize(
        ("variables", "found"),
        [
            ({"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}, "ConnectError"),
            ({"HF_HUB_OFFLINE": "1"}, "ConnectionError"),
        ],
    )
    def test_no_network_is_said_at_once(self, tmp_path: Path, variables: dict[str, str], found: str) -> None:
        program = (
            "from residua.pipelines.dataset import *\n"
            "from residua.store.errors import DatasetError\n"
            "try:\n    read_examples('someone/texts', settings=DatasetSettings())\n"
            "except DatasetError as error:\n    print(error)\n"
        )
        environment = {**os.environ, "HF_HOME": str(tmp_path), **variables}
        result = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        assert "dataset 'someone/texts': there is no such file or folder here" in result.stdout
        assert f"could not be read from the hub ({found}" in result.stdout


class TestIdentity:
    def test_of_many_files_the_first_are_named_and_all_are_counted(self, tmp_path: Path) -> None:
        for number in range(250):
            (tmp_path / f"{number:03d}.txt").write_text("x" * number)
        before = dataset_identity(tmp_path, DatasetSettings())
        assert isinstance(before["files"], list)
        assert (len(before["files"]), before["n_files"]) == (100, 250)
        (tmp_path / "249.txt").write_text("y")
        after = dataset_identity(tmp_path, DatasetSettings())
        assert before["files"] == after["files"]
        assert before["files_digest"] != after["files_digest"]

    def test_what_names_a_dataset(self, tmp_path: Path) -> None:
        path = write_source(tmp_path, "jsonl")
        chosen = DatasetSettings(split="train")
        assert dataset_identity(path, chosen) == {
            "kind": "local",
            "path": str(path),
            "split": "train",
            "files": [{"name": "data.jsonl", "bytes": path.stat().st_size}],
            "n_files": 1,
            "files_digest": digest_of([{"name": "data.jsonl", "bytes": path.stat().st_size}]),
        }
        folder = write_source(tmp_path, "folder")
        assert dataset_identity(folder, chosen)["files"] == [
            {"name": "data.folder/part-0.parquet", "bytes": (folder / "part-0.parquet").stat().st_size}
        ]
        dataset = datasets.Dataset.from_dict({"text": ["a"]})
        assert dataset_identity(dataset, chosen)["fingerprint"] == dataset._fingerprint
        assert dataset_identity(iter([]), chosen)["kind"] == "iterable"
        sources: list[object] = [path, folder, dataset, []]
        for source in sources:
            assert canonical_json(dataset_identity(source, chosen))

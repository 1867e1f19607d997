"""Files of text: values are what the file spells, and what cannot be read is refused with its line."""

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from residua.pipelines.data.dataset_settings import DatasetSettings
from residua.pipelines.data.sources import open_rows
from residua.pipelines.data.text_files import TextFiles
from residua.store.base.errors import DatasetError
from residua.store.examples.table import ExampleTable
from residua.store.examples.writer import ExampleWriter
from tests.pipelines.dataset_samples import CHATS, ids, read, tokens


def rows_of(path: Path, **options: Any) -> list[Any]:
    return list(open_rows(path, DatasetSettings(**options)).rows)


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines_of(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class TestCsv:
    def test_texts_stay_what_the_file_spells(self, tmp_path: Path) -> None:
        texts = ["null", "NA", "nan", "None", "n/a", "007", "1.50", "true", " x ", "1e3", 'say "a"', "a,b", "a\r\nb"]
        path = tmp_path / "x.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["text", "kind"], *([text, text] for text in texts)])
        assert rows_of(path) == [{"text": text, "kind": text} for text in texts]

    @pytest.mark.parametrize(
        ("cells", "expected"),
        [
            (["0", "-5", "", "7"], [0, -5, None, 7]),
            (["0.5", "1", "NA", "inf"], [0.5, 1.0, None, float("inf")]),
            (["True", "FALSE", "null"], [True, False, None]),
            (["007", "8"], ["007", "8"]),
            (["1", "x", "NA"], ["1", "x", "NA"]),
            (["1", "true"], ["1", "true"]),
            (["NA", "nan"], ["NA", "nan"]),
            (["+1", "2"], ["+1", "2"]),
            (["1", "9223372036854775808"], ["1", "9223372036854775808"]),
            (["0.5", "9007199254740993"], ["0.5", "9007199254740993"]),
            (["1e400", "1"], ["1e400", "1"]),
            (["1_000", "2"], ["1_000", "2"]),
            (["", ""], [None, None]),
        ],
    )
    def test_a_column_of_numbers_is_one_from_first_to_last(
        self, tmp_path: Path, cells: list[str], expected: list[object]
    ) -> None:
        path = written(tmp_path / "x.csv", "text,label\n" + "".join(f"ab,{cell}\n" for cell in cells))
        found = [row["label"] for row in rows_of(path)]
        assert found == expected
        assert list(map(type, found)) == list(map(type, expected))

    def test_what_comes_late_changes_the_whole_column(self, tmp_path: Path) -> None:
        for late, first, last in (("", 7, None), ("0.5", 7.0, 0.5), ("seven", "7", "seven")):
            path = written(tmp_path / "x.csv", "text,label\n" + "a,7\n" * 10_500 + f"b,{late}\n")
            found = [row["label"] for row in rows_of(path)]
            assert (len(found), set(found[:-1]), found[-1]) == (10_501, {first}, last)

    def test_the_column_that_is_asked_for_is_text(self, tmp_path: Path) -> None:
        path = written(tmp_path / "x.csv", "number,label\n7,0\n8,1\n")
        rows = open_rows(path, DatasetSettings(text_column="number"))
        assert rows.text_columns == ["number"]
        assert list(rows.rows) == [{"number": "7", "label": 0}, {"number": "8", "label": 1}]

    def test_names_of_columns(self, tmp_path: Path) -> None:
        (row,) = rows_of(written(tmp_path / "x.csv", ",text,text,a\n0,x,y\n"))
        assert row == {"Unnamed: 0": 0, "text": "x", "text.1": "y", "a": None}

    def test_a_text_longer_than_the_limit_of_python(self, tmp_path: Path) -> None:
        before = csv.field_size_limit()
        assert len(rows_of(written(tmp_path / "x.csv", f"text\n{'a' * 200_000}\n"))[0]["text"]) == 200_000
        assert csv.field_size_limit() == before

    @pytest.mark.parametrize(
        ("content", "line", "problem"),
        [
            (b'text,x\na,1\n"ab\nc,2\n', 3, "unexpected end of data"),
            (b'text,x\n"ab"c,1\n', 2, "expected after"),
            (b"text,x\na,1\nb,2,3\n", 3, "3 cells, and the header has 2"),
            (b"text,x\na,1\n\xe9,2\n", 3, "0xe9.* is not UTF-8"),
            (b"text,x\na\x00,1\n", 2, "NUL"),
            ("text,x\na,1\n".encode("utf-16"), 1, "UTF-16"),
            ("text,x\na,1\n".encode("utf-16-le"), 1, "NUL"),
        ],
    )
    def test_a_bad_row_names_its_line(self, tmp_path: Path, content: bytes, line: int, problem: str) -> None:
        with pytest.raises(DatasetError, match=rf"x.csv' cannot be read: line {line}: .*{problem}"):
            rows_of(written(tmp_path / "x.csv", content))

    @given(
        cells=st.lists(
            st.tuples(*[st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))] * 2), max_size=4
        )
    )
    @settings(max_examples=50, deadline=None)
    def test_any_text_comes_back(self, cells: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory) -> None:
        path = tmp_path_factory.mktemp("csv") / "x.tsv"
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, "excel-tab", quoting=csv.QUOTE_ALL).writerows([("text", "b"), *cells])
        found = list(TextFiles(paths=[str(path)], kind="csv", separator="\t", texts=("text", "b")))
        assert found == [{"text": a or None, "b": b or None} for a, b in cells]


class TestJson:
    def test_values_are_not_converted(self, tmp_path: Path) -> None:
        rows = [
            {"text": "a\nb", "x": "2026-01-01 00:00:00", "y": {"p": 1}},
            {"text": "123", "x": "7", "y": {"q": [1, "z"]}},
            {"text": "a\u2028b\x85c\u2029", "x": "\x00", "y": None},
        ]
        assert rows_of(written(tmp_path / "x.jsonl", lines_of(rows))) == rows
        assert rows_of(written(tmp_path / "x.json", json.dumps(rows))) == rows
        assert rows_of(written(tmp_path / "y.json", json.dumps(rows, indent=2))) == rows
        assert rows_of(written(tmp_path / "z.json", "\n".join(json.dumps(row, indent=2) for row in rows))) == rows

    def test_a_number_among_the_texts_is_refused_and_changes_no_other(self, tmp_path: Path) -> None:
        path = written(tmp_path / "x.jsonl", lines_of([{"text": "a"}, {"text": 7}, {"text": "c"}]))
        with pytest.raises(DatasetError, match=r"row 1: column 'text' .* found 7"):
            read(path)

    def test_chats_of_many_shapes(self, tmp_path: Path) -> None:
        def calling(**arguments: object) -> list[dict[str, object]]:
            call = {"function": {"name": "f", "arguments": arguments}}
            return [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [call]}]

        chats = [*CHATS, calling(x=1), calling(x="z"), calling(y=[1])]
        path = written(tmp_path / "x.jsonl", lines_of([{"messages": chat} for chat in chats]))
        assert [row["messages"] for row in rows_of(path)] == chats
        assert tokens(read(path)[0])[2:] == [ids("<s> user a assistant b")] * 3

    @pytest.mark.parametrize("late", [0.5, None, 3])
    def test_a_late_change_is_what_it_is_from_a_generator(self, tmp_path: Path, late: object) -> None:
        rows = [{"text": "a", "pad": "x" * 90_000, "score": 0}] * 120 + [{"text": "b", "pad": "", "score": late}]
        path = written(tmp_path / "x.jsonl", lines_of(rows))
        results = []
        for i, source in enumerate((path, iter(rows))):
            writer = ExampleWriter(tmp_path / f"examples{i}")
            for example in read(source, positions="last")[0]:
                writer.add(example)
            writer.close()
            results.append(ExampleTable(tmp_path / f"examples{i}").table())
        assert results[0] == results[1]
        assert results[0]["score"].to_pylist() == [0] * 120 + [late]

    @pytest.mark.parametrize("late", ["x", {"a": 1}, "\u00e9", [1]])
    def test_a_late_value_of_another_kind_names_row_and_column(self, tmp_path: Path, late: object) -> None:
        rows = [{"text": "a b c", "n": i} for i in range(4)] + [{"text": "", "n": 4}, {"text": "a", "n": late}]
        path = written(tmp_path / "x.jsonl", lines_of(rows))
        for i, source in enumerate((path, iter(rows))):
            writer = ExampleWriter(tmp_path / f"examples{i}", examples_per_part=9)
            *first, last = read(source, max_length=3)[0]
            for example in first:
                writer.add(example)
            with pytest.raises(DatasetError, match=r"column 'n', example 8: .* \(row 5 of the dataset\) as int64"):
                writer.add(last)

    def test_lines_of_texts_and_of_token_ids(self, tmp_path: Path) -> None:
        assert rows_of(written(tmp_path / "x.jsonl", '"a b"\n\n"c"\n')) == [{"text": "a b"}, {"text": "c"}]
        assert rows_of(written(tmp_path / "x.jsonl", "[5, 6]\n[7]\n"))[1]["input_ids"] == [7]
        assert rows_of(written(tmp_path / "x.json", '["a", "b"]')) == [{"text": "a"}, {"text": "b"}]

    @pytest.mark.parametrize(
        ("content", "line", "problem"),
        [
            (b'{"text": "a"}\n{"text": "b"\n{"text": "c"}\n', 2, "not JSON"),
            (b'{"text": "a"}\n\n{"text": "\xe9"}\n', 3, "0xe9.* is not UTF-8"),
            (b'{"text": "a\x00"}\n', 1, "not JSON"),
            (b'[{"text": "a"},\n{"text": b}]', 2, "not JSON"),
            (b'{"text": "a"}\n' + b"[" * 100_000, 2, "not JSON"),
            ('{"text": "a"}\n'.encode("utf-16"), 1, "UTF-16"),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path: Path, content: bytes, line: int, problem: str) -> None:
        with pytest.raises(DatasetError, match=rf"x.jsonl' cannot be read: line {line}: .*{problem}"):
            rows_of(written(tmp_path / "x.jsonl", content))


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: zstandard.ZstdCompressor().compress(content),
}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.ndjson", "x.csv", "x.tsv", "x.txt"])
def test_every_kind_of_file_may_have_a_mark_and_be_compressed(tmp_path: Path, name: str, packed: str) -> None:
    content = {"csv": "text\r\na b\r\nc\r\n", "tsv": "text\na b\nc\n", "txt": "a b\r\nc"}
    plain = b"\xef\xbb\xbf" + content.get(name[2:], '{"text": "a b"}\n{"text": "c"}\n').encode()
    assert rows_of(written(tmp_path / (name + packed), PACKED[packed](plain))) == [{"text": "a b"}, {"text": "c"}]


@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_is_read_to_its_end_or_refused(tmp_path: Path, packed: str) -> None:
    content = PACKED[packed](b"a\n" * 1000), PACKED[packed](b"b\n" * 1000)
    assert len(rows_of(written(tmp_path / f"x.txt{packed}", b"".join(content)))) == 2000
    with pytest.raises(DatasetError, match=r"cannot be read after \d+ rows"):
        rows_of(written(tmp_path / f"x.txt{packed}", b"".join(content)[:-3]))


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.txt"])
def test_an_empty_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(DatasetError, match=rf"{name}' is empty"):
        rows_of(written(tmp_path / name, b""))


def test_lines_of_text_end_at_newlines_only(tmp_path: Path) -> None:
    path = written(tmp_path / "x.txt", "a\u2028b\x85\x0cc\n\nd\r\ne\rf")
    assert [row["text"] for row in rows_of(path)] == ["a\u2028b\x85\x0cc", "", "d", "e", "f"]
    with pytest.raises(DatasetError, match=r"x.txt' cannot be read: line 2: .*NUL"):
        rows_of(written(tmp_path / "x.txt", b"a\nb\x00"))


class TestFolders:
    def test_files_in_a_folder_are_read_the_same_way(self, tmp_path: Path) -> None:
        written(tmp_path / "train-0.csv", "text,label\nnull,1\n")
        written(tmp_path / "train-1.csv", "label,text\nx,007\n")
        written(tmp_path / "test.csv", "text,label\nNA,1\n")
        assert rows_of(tmp_path) == [{"text": "null", "label": "1"}, {"label": "x", "text": "007"}]
        assert rows_of(tmp_path, split="test") == [{"text": "NA", "label": 1}]

    @pytest.mark.parametrize("name", ["x.jsonl", "x.tsv", "x.txt", "x.jsonl.gz"])
    def test_other_kinds(self, tmp_path: Path, name: str) -> None:
        content = {"tsv": b"text\n7\n", "txt": b"7\n", "jsonl": b'{"text": "7"}\n', "jsonl.gz": b'{"text": "7"}\n'}
        packed = gzip.compress if name.endswith(".gz") else bytes
        written(tmp_path / name, packed(content[name[2:]]))
        assert rows_of(tmp_path) == [{"text": "7"}]

    def test_types_that_the_author_declares_hold(self, tmp_path: Path) -> None:
        written(tmp_path / "train.csv", "text,label\na,1\n")
        card = "dataset_info:\n  features:\n  - name: text\n    dtype: string\n  - name: label\n    dtype: string\n"
        written(tmp_path / "README.md", f"---\n{card}---\n")
        assert rows_of(tmp_path) == list(datasets.load_dataset(str(tmp_path), split="train", streaming=True))
        assert rows_of(tmp_path) == [{"text": "a", "label": "1"}]

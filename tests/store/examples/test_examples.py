"""The example table: it is read as it was written, and the same examples give the same bytes."""

import errno
import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residua.store.base.errors import DatasetError
from residua.store.examples.index import Example
from residua.store.examples.table import ExampleTable
from residua.store.examples.writer import ExampleWriter
from residua.store.storage import destination
from tests.store.example_samples import CONTENT, Content, as_lists, example, expected_digest, written


class TestRoundTrip:
    def test_parts_are_plain_parquet_with_the_stated_columns(self, tmp_path: Path) -> None:
        written(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"part-0000{i}.parquet" for i in range(3)]
        part = pq.read_table(tmp_path / "part-00001.parquet")
        assert {field.name: str(field.type) for field in part.schema} == {
            "first_row": "int64",
            "n_rows": "int32",
            "n_tokens": "int32",
            "input_ids": "list<element: int32>",
            "positions": "list<element: int32>",
            "label": "int64",
            "text": "string",
        }
        assert part.to_pylist()[1] == {
            "first_row": 2,
            "n_rows": 4,
            "n_tokens": 4,
            "input_ids": [1, 2, 3, 4],
            "positions": [0, 1, 2, 3],
            "label": 3,
            "text": "example 3",
        }

    def test_index_of_writer_and_reader(self, tmp_path: Path) -> None:
        ours, theirs = written(tmp_path), ExampleTable(tmp_path).index()
        for index in (ours, theirs):
            assert index.n_tokens.tolist() == [3, 0, 1, 4, 2]
            assert index.n_rows.tolist() == [2, 0, 0, 4, 1]
            assert index.first_row.tolist() == [0, 2, 2, 2, 6, 7]
            assert index.first_example.tolist() == [0, 2, 4, 5]
            assert [str(array.dtype) for array in (index.n_tokens, index.first_row)] == ["int32", "int64"]
            assert (index.n_examples, index.total_rows, index.total_tokens) == (5, 7, 10)
            assert index.digest == expected_digest(CONTENT)

    def test_examples_by_number_and_by_batch(self, tmp_path: Path) -> None:
        written(tmp_path)
        table = ExampleTable(tmp_path, cached_groups=1)
        assert as_lists(table) == CONTENT
        assert (table.tokens(3).tolist(), table.positions(0).tolist()) == ([1, 2, 3, 4], [0, 2])
        assert [ids.tolist() for ids, _ in table.batch([4, 0])] == [[8, 8], [5, 6, 7]]
        with pytest.raises(IndexError, match="examples 0 to 4"):
            table.tokens(5)

    def test_columns_by_name(self, tmp_path: Path) -> None:
        written(tmp_path)
        table = ExampleTable(tmp_path)
        assert table.table().num_rows == 5
        assert table.table(["text", "first_row"]).to_pydict() == {
            "text": [f"example {i}" for i in range(5)],
            "first_row": [0, 2, 2, 2, 6],
        }
        with pytest.raises(DatasetError, match=r"no column 'txet'; they have .*text"):
            table.table(["txet"])

    def test_a_table_without_examples(self, tmp_path: Path) -> None:
        index = ExampleWriter(tmp_path).close()
        assert (index.n_examples, index.total_rows) == (0, 0)
        table = ExampleTable(tmp_path)
        assert len(table) == 0
        assert table.index().digest == index.digest == hashlib.sha256().hexdigest()
        assert table.table().num_rows == 0

    @given(
        content=st.lists(
            st.lists(st.integers(0, 2**31 - 1), max_size=12).flatmap(
                lambda ids: st.tuples(
                    st.just(ids), st.sets(st.integers(0, max(0, len(ids) - 1)), max_size=len(ids)).map(sorted)
                )
            ),
            max_size=12,
        ),
        examples_per_part=st.integers(1, 5),
    )
    @settings(max_examples=40, deadline=None)
    def test_any_content(
        self, content: Content, examples_per_part: int, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        folder = tmp_path_factory.mktemp("any")
        index = written(folder, content, examples_per_part)
        table = ExampleTable(folder, cached_groups=1)
        assert as_lists(table) == content
        assert index.digest == table.index().digest == expected_digest(content)
        table.verify()

    def test_row_groups_are_bounded_in_tokens_and_in_examples(self, tmp_path: Path) -> None:
        writer = ExampleWriter(tmp_path)
        for _ in range(3):
            ids = np.arange(200_000).astype(np.int32)
            writer.add(Example(input_ids=ids, positions=ids[:1]))
        for _ in range(1100):
            writer.add(example([1], [0]))
        writer.close()
        metadata = pq.ParquetFile(tmp_path / "part-00000.parquet").metadata
        groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        assert groups == [2, 1024, 77]
        table = ExampleTable(tmp_path, cached_groups=1)
        assert table.tokens(2)[-1] == 199_999
        assert table.tokens(1102).tolist() == [1]


class TestParts:
    def test_the_same_examples_give_the_same_bytes(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            written(tmp_path / name)
        for part in sorted((tmp_path / "a").iterdir()):
            assert part.read_bytes() == (tmp_path / "b" / part.name).read_bytes()

    def test_a_part_is_closed_by_its_bytes(self, tmp_path: Path) -> None:
        writer = ExampleWriter(tmp_path, bytes_per_part=1000)
        for _ in range(4):
            writer.add(example([1], [0], text="x" * 600))
        assert writer.close().first_example.tolist() == [0, 2, 4]

    def test_many_short_examples_are_one_part(self, tmp_path: Path) -> None:
        writer = ExampleWriter(tmp_path)
        for i in range(10_000):
            writer.add(example([i], [0]))
        index = writer.close()
        assert [path.name for path in tmp_path.iterdir()] == ["part-00000.parquet"]
        assert index.digest == expected_digest([([i], [0]) for i in range(10_000)])
        assert ExampleTable(tmp_path).tokens(9_999).tolist() == [9_999]

    def test_a_loop_adds_flushes_and_the_reader_sees_what_is_durable(self, tmp_path: Path) -> None:
        writer = ExampleWriter(tmp_path)
        writer.add(example([1, 2], [1]))
        assert (writer.n_examples, writer.n_rows) == (1, 1)
        assert writer.flush() == "part-00000.parquet"
        writer.add(example([3], [0]))
        assert len(ExampleTable(tmp_path)) == 1
        assert writer.flush() == "part-00001.parquet"
        assert writer.flush() is None
        assert as_lists(ExampleTable(tmp_path)) == [([1, 2], [1]), ([3], [0])]
        assert writer.close().digest == expected_digest([([1, 2], [1]), ([3], [0])])

    def test_a_part_that_the_disk_refused_may_be_written_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(path: Path, parts: object) -> int:
            raise OSError(errno.ENOSPC, "no space left")

        writer = ExampleWriter(tmp_path)
        writer.add(example([1, 2], [1]))
        with monkeypatch.context() as patch:
            patch.setattr(destination, "write_file", full)
            with pytest.raises(OSError, match="no space left"):
                writer.flush()
        assert list(tmp_path.iterdir()) == []
        assert writer.close().digest == expected_digest([([1, 2], [1])])
        ExampleTable(tmp_path).verify()

    def test_the_digest_does_not_depend_on_the_parts(self, tmp_path: Path) -> None:
        digests = {written(tmp_path / str(n), examples_per_part=n).digest for n in (1, 2, 5)}
        assert digests == {expected_digest(CONTENT)}

    def test_existing_parts_are_refused(self, tmp_path: Path) -> None:
        written(tmp_path)
        with pytest.raises(DatasetError, match=r"examples already \(part-00000"):
            ExampleWriter(tmp_path)


class TestColumns:
    def write(self, folder: Path, *rows: dict[str, object], per_part: int = 1) -> pa.Table:
        writer = ExampleWriter(folder, examples_per_part=per_part)
        for row in rows:
            writer.add(example([1], [0], **row))
        writer.close()
        return ExampleTable(folder).table()

    def test_nested_and_missing_values(self, tmp_path: Path) -> None:
        rows: list[dict[str, object]] = [
            {"meta": {"a": 1, "tags": ["x"]}, "score": None},
            {"meta": None, "score": 0.5},
            {"score": 2, "extra": True},
        ]
        table = self.write(tmp_path, *rows)
        assert table.select(["meta", "score", "extra"]).to_pylist() == [
            {"meta": {"a": 1, "tags": ["x"]}, "score": None, "extra": None},
            {"meta": None, "score": 0.5, "extra": None},
            {"meta": None, "score": 2.0, "extra": True},
        ]
        assert str(table.schema.field("score").type) == "double"
        only = ExampleTable(tmp_path).table(["extra"])
        assert only.to_pydict() == {"extra": [None, None, True]}

    @pytest.mark.parametrize("name", ["input_ids", "positions", "n_tokens", "n_rows", "first_row"])
    def test_a_reserved_name_says_how_to_rename(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(DatasetError, match=f"rename_column\\('{name}', 'my_{name}'\\)"):
            self.write(tmp_path, {name: 1})

    @pytest.mark.parametrize(
        ("first", "second", "message"),
        [
            (1, "one", r"column 'c', example 1: cannot store 'one' as int64"),
            (1, 1.5, r"column 'c', example 1: cannot store 1.5 as int64"),
            (1, True, r"column 'c', example 1: cannot store True as int64"),
            ({"a": 1}, {"a": 1, "b": 2}, r"example 1: cannot store \{'a': 1, 'b': 2\} as struct<a: int64>"),
            (object(), None, r"example 0: cannot store <object .* as an Arrow value"),
            ({}, None, r"example 0: cannot store \{\} as an Arrow value"),
        ],
    )
    @pytest.mark.parametrize("per_part", [1, 2])
    def test_a_column_that_changes_its_kind_names_the_example(
        self, tmp_path: Path, first: object, second: object, message: str, per_part: int
    ) -> None:
        if per_part == 2 and second in (1.5, {"a": 1, "b": 2}):
            assert self.write(tmp_path, {"c": first}, {"c": second}, per_part=2).column("c")[1].as_py() == second
            return
        with pytest.raises(DatasetError, match=message):
            self.write(tmp_path, {"c": first}, {"c": second}, per_part=per_part)

    def test_an_example_checks_itself(self) -> None:
        good = np.array([1, 2], np.int32)
        with pytest.raises(DatasetError, match=r"input_ids: .*int32.*found int64"):
            Example(input_ids=np.array([1, 2]), positions=good[:0])
        with pytest.raises(DatasetError, match=r"positions: .*int32"):
            Example(input_ids=good, positions=good.reshape(1, 2))
        for positions, message in (([0, 2], "do not lie in"), ([-1, 0], "do not lie"), ([1, 1], "increasing")):
            with pytest.raises(DatasetError, match=message):
                example([1, 2], positions)
        with pytest.raises(DatasetError, match="token id -1 is negative"):
            example([3, -1], [])

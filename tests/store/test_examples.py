"""The example table: what goes in comes out, parts are deterministic, and damaged parts are errors that name them."""

import errno
import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from residua.store import example_writer
from residua.store.errors import DamagedArchiveError, DatasetError, UnsafeArchiveError
from residua.store.examples import Example, ExampleIndex, ExampleTable, ExampleWriter

Content = list[tuple[list[int], list[int]]]
CONTENT: Content = [([5, 6, 7], [0, 2]), ([], []), ([9], []), ([1, 2, 3, 4], [0, 1, 2, 3]), ([8, 8], [1])]


def example(ids: list[int], positions: list[int], /, **columns: object) -> Example:
    return Example(input_ids=np.array(ids, np.int32), positions=np.array(positions, np.int32), columns=columns)


def written(folder: Path, content: Content = CONTENT, examples_per_part: int = 2) -> ExampleIndex:
    writer = ExampleWriter(folder, examples_per_part=examples_per_part)
    for i, (ids, positions) in enumerate(content):
        assert writer.add(example(ids, positions, label=i, text=f"example {i}")) == i
    return writer.close()


def expected_digest(content: Content) -> str:
    """The digest as the format page states it, with `struct` alone."""
    sha256 = hashlib.sha256()
    for ids, positions in content:
        sha256.update(struct.pack("<qq", len(ids), len(positions)))
        sha256.update(struct.pack(f"<{len(ids)}i", *ids) + struct.pack(f"<{len(positions)}i", *positions))
    return sha256.hexdigest()


def as_lists(table: ExampleTable) -> Content:
    return [(ids.tolist(), positions.tolist()) for ids, positions in table.batch(range(len(table)))]


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

    def test_no_example_is_a_table_too(self, tmp_path: Path) -> None:
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
            patch.setattr(example_writer, "write_file", full)
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
        with pytest.raises(DatasetError, match="input_ids: one row of int32 is needed, found int64"):
            Example(input_ids=np.array([1, 2]), positions=good[:0])
        with pytest.raises(DatasetError, match="positions: one row of int32 is needed"):
            Example(input_ids=good, positions=good.reshape(1, 2))
        for positions, message in (([0, 2], "do not lie in"), ([-1, 0], "do not lie"), ([1, 1], "increasing")):
            with pytest.raises(DatasetError, match=message):
                example([1, 2], positions)
        with pytest.raises(DatasetError, match="token id -1 is negative"):
            example([3, -1], [])


def tampered(path: Path, change: Callable[[dict[str, list[object]]], None]) -> None:
    """Rewrite a part with other values, under the same schema and recorded digest."""
    table = pq.read_table(path)
    values = table.to_pydict()
    change(values)
    pq.write_table(pa.table(values, schema=table.schema), path)


class TestDamage:
    def test_a_part_is_compared_with_its_sha256_when_its_content_is_read(self, tmp_path: Path) -> None:
        written(tmp_path)
        digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}
        altered = tmp_path / "part-00001.parquet"
        tampered(altered, lambda values: values["label"].__setitem__(0, 77))
        table = ExampleTable(tmp_path, digests=digests)
        assert len(table) == 5
        assert table.rows(0) == (0, 2)
        assert table.tokens(4).tolist() == [8, 8]
        for read in (lambda: table.rows(2), lambda: table.positions(3), table.table, table.verify):
            with pytest.raises(DamagedArchiveError, match=r"part-00001.parquet was altered"):
                read()
        assert ExampleTable(tmp_path).table(["label"])["label"].to_pylist() == [0, 1, 77, 3, 4]

    @pytest.mark.parametrize(
        ("name", "at", "value", "message"),
        [
            ("n_rows", 1, -1, "negative count"),
            ("n_tokens", 0, -3, "negative count"),
            ("n_rows", 0, 4, "more rows than tokens"),
            ("n_tokens", 0, 2**30, "more than 268435456 tokens"),
            ("n_tokens", 0, 4, "another number of values"),
            ("first_row", 1, 3, "first_row is not the sum"),
            ("first_row", 0, None, "gaps"),
            ("input_ids", 0, [5, 6, -7], "token id -7 is negative"),
            ("input_ids", 0, [5, None, 7], "gaps"),
            ("input_ids", 0, [5, 6], "another number of values"),
            ("positions", 0, [0, 3], "do not lie in its 3 tokens"),
            ("positions", 0, [-1, 2], "do not lie in its 3 tokens"),
            ("positions", 0, [2, 2], "not strictly increasing"),
        ],
    )
    def test_impossible_numbers(self, tmp_path: Path, name: str, at: int, value: object, message: str) -> None:
        written(tmp_path, CONTENT, examples_per_part=5)
        part = tmp_path / "part-00000.parquet"
        tampered(part, lambda values: values[name].__setitem__(at, value))
        with pytest.raises(UnsafeArchiveError, match=f"{part}.*{message}"):
            ExampleTable(tmp_path).verify()

    def test_other_tokens_of_the_same_length(self, tmp_path: Path) -> None:
        written(tmp_path)
        tampered(tmp_path / "part-00001.parquet", lambda values: values["input_ids"].__setitem__(0, [10]))
        with pytest.raises(DamagedArchiveError, match=r"part-00001.parquet: its tokens or positions are not those"):
            ExampleTable(tmp_path).verify()

    @pytest.mark.parametrize(
        ("name", "kind", "found"),
        [("first_row", pa.int32(), "int32"), ("input_ids", pa.list_(pa.int64()), "list<element: int64>")],
    )
    def test_wrong_types(self, tmp_path: Path, name: str, kind: pa.DataType, found: str) -> None:
        written(tmp_path)
        path = tmp_path / "part-00000.parquet"
        table = pq.read_table(path)
        at = table.schema.names.index(name)
        pq.write_table(table.set_column(at, name, table.column(name).cast(kind)), path)
        with pytest.raises(UnsafeArchiveError, match=rf"part-00000.*column '{name}' should be .*, found {found}"):
            ExampleTable(tmp_path)

    def test_missing_column(self, tmp_path: Path) -> None:
        written(tmp_path)
        path = tmp_path / "part-00002.parquet"
        pq.write_table(pq.read_table(path).drop_columns(["positions"]), path)
        with pytest.raises(UnsafeArchiveError, match=r"part-00002.*'positions' should be there once"):
            ExampleTable(tmp_path)

    def test_missing_part_and_folder(self, tmp_path: Path) -> None:
        written(tmp_path)
        (tmp_path / "part-00001.parquet").unlink()
        with pytest.raises(DamagedArchiveError, match=r"part-00001.parquet: this part is missing"):
            ExampleTable(tmp_path)
        with pytest.raises(DamagedArchiveError, match="nowhere: the folder of the examples is missing"):
            ExampleTable(tmp_path / "nowhere")

    def test_a_part_whose_folder_entry_is_no_file(self, tmp_path: Path) -> None:
        (tmp_path / "part-00000.parquet").mkdir()
        with pytest.raises(DamagedArchiveError, match=r"part-00000.parquet"):
            ExampleTable(tmp_path)

    @given(data=st.data())
    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_any_flipped_bits_or_cut_are_noticed_or_harmless(self, data: st.DataObject, tmp_path: Path) -> None:
        folder = tmp_path / "fuzzed"
        path = folder / "part-00000.parquet"
        if not path.exists():
            written(folder, CONTENT, examples_per_part=5)
            (tmp_path / "good").write_bytes(path.read_bytes())
        good = (tmp_path / "good").read_bytes()
        bad = bytearray(good)
        for bit in data.draw(st.lists(st.integers(0, len(good) * 8 - 1), max_size=3, unique=True)):
            bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad[: data.draw(st.one_of(st.just(len(good)), st.integers(0, len(good) - 1)))])
        assert self.read_or_refuse(folder) in (CONTENT, "part-00000.parquet is refused")

    def read_or_refuse(self, folder: Path) -> Content | str:
        try:
            table = ExampleTable(folder)
            table.verify()
            table.table()
        except (DamagedArchiveError, UnsafeArchiveError) as error:
            return f"{str(error).partition(':')[0].rpartition('/')[2]} is refused"
        return as_lists(table)

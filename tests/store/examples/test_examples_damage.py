"""Damaged or hostile example tables are refused by name, or read as they were written."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from residua.store.base.errors import DamagedArchiveError, UnsafeArchiveError
from residua.store.examples.part import read_columns, read_parts
from residua.store.examples.table import ExampleTable
from tests.store.example_samples import CONTENT, Content, as_lists, written


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
            ("n_tokens", 0, 2**30, "tokens: .* to 268,435,456"),
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
        with pytest.raises(DamagedArchiveError, match=r"part-00001.parquet: .*tokens or positions"):
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

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda text: text,
            lambda text: text.encode(),
            lambda text: [text],
            lambda text: {"a": {"b": text}},
            lambda text: [{"a": [text, None]}],
        ],
    )
    def test_a_text_that_many_examples_repeat_is_counted_each_time(
        self, wrap: Callable[[str], object], tmp_path: Path
    ) -> None:
        written(tmp_path)
        path = tmp_path / "part-00000.parquet"
        part = pq.read_table(path)
        for name in ("label.of", "other"):
            for length, is_read in ((10, True), (9_000, False)):
                column = pa.array([wrap("x" * length)] * len(part))
                pq.write_table(part.append_column(name, column), path)
                (stored, *_) = read_parts(tmp_path)
                assert path.stat().st_size < 10_000
                if is_read:
                    for found in (
                        read_columns(stored, [name], most_bytes=10_000),
                        ExampleTable(tmp_path).table([name]),
                    ):
                        assert found[name].to_pylist()[: len(part)] == column.to_pylist()
                        assert found.schema.field(name).type == column.type
                else:
                    with pytest.raises(UnsafeArchiveError, match=r"part-00000.parquet: .*bytes of texts"):
                        read_columns(stored, [name], most_bytes=10_000)

    def test_missing_column(self, tmp_path: Path) -> None:
        written(tmp_path)
        path = tmp_path / "part-00002.parquet"
        pq.write_table(pq.read_table(path).drop_columns(["positions"]), path)
        with pytest.raises(UnsafeArchiveError, match=r"part-00002.*'positions'"):
            ExampleTable(tmp_path)

    def test_missing_part_and_folder(self, tmp_path: Path) -> None:
        written(tmp_path)
        (tmp_path / "part-00001.parquet").unlink()
        with pytest.raises(DamagedArchiveError, match=r"part-00001.parquet is missing"):
            ExampleTable(tmp_path)
        with pytest.raises(DamagedArchiveError, match=r"nowhere.* is missing"):
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

"""Arrays in column shards: read as full rows by our reader and by other Zarr v3 readers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from residua.store.base.errors import PlanError, UnsafeArchiveError
from residua.store.encoding.shard import ShardEncoder, check_shard, shard_path
from residua.store.encoding.spec import ArraySpec
from residua.store.format.array_metadata import create_array, open_array
from residua.store.format.plan import Plan, SitePlan
from residua.store.read.rows_in_shards import ArrayReader, reader_of
from residua.store.storage.files import write_file
from tests.store.read.test_other_readers import READERS, Reader
from tests.store.samples import Array, make_rows, make_spec, same_bits

N_ROWS = 2 * 256 + 70
N_COLUMN_SHARDS = 3


def write_column_shards(root: Path, spec: ArraySpec, rows: Array) -> None:
    create_array(root, spec, len(rows))
    width = spec.row_shape[0] // N_COLUMN_SHARDS
    for shard, start in enumerate(range(0, len(rows), spec.rows_per_shard)):
        for i, part in enumerate(spec.file_specs):
            columns = rows[start : start + spec.rows_per_shard, i * width : (i + 1) * width]
            encoded = ShardEncoder(np.ascontiguousarray(columns), part)
            write_file(shard_path(root, part, shard), encoded)
            assert check_shard(shard_path(root, part, shard), part, len(columns)) == encoded.digest


@pytest.fixture(params=["raw", "fast"])
def spec(request: pytest.FixtureRequest) -> ArraySpec:
    made = make_spec(request.param, "bfloat16", (24, 5), rows_per_shard=256, rows_per_chunk=64)
    return replace(made, column_shards=N_COLUMN_SHARDS)


@pytest.mark.parametrize("reader", READERS)
def test_other_readers_see_full_rows(tmp_path: Path, spec: ArraySpec, reader: Reader) -> None:
    rows = make_rows(spec, N_ROWS)
    write_column_shards(tmp_path, spec, rows)
    assert same_bits(reader(tmp_path, spec.path), rows)


def test_our_reader_sees_full_rows(tmp_path: Path, spec: ArraySpec) -> None:
    rows = make_rows(spec, N_ROWS)
    write_column_shards(tmp_path, spec, rows)
    assert open_array(tmp_path, spec.path)[:2] == (spec, N_ROWS)
    reader = reader_of(spec, lambda columns: ArrayReader(tmp_path, columns, N_ROWS, check="always", threads=1))
    picked = np.array([0, 581, 300, 300, 7])
    assert same_bits(reader.take(picked), rows[picked])
    assert same_bits(reader.read(250, 520), rows[250:520])
    out = np.empty((9, *spec.row_shape), spec.storage_dtype)
    reader.read_into(out, 255, 264)
    assert same_bits(out, rows[255:264])


def site(**changes: object) -> SitePlan:
    values = {"name": "mlp_act.1", "row_shape": (12,), "dtype": "float32", "codec": "fast", "column_shards": 3}
    return SitePlan(**{**values, **changes})  # type: ignore[arg-type]  # wrong ones are what is tested


def plan(*sites: SitePlan) -> Plan:
    return Plan(model={}, dataset={}, rules={}, sites=sites, rows_per_shard=8)


def test_only_plans_with_column_shards_name_them() -> None:
    cut, full = plan(site()), plan(site(column_shards=1))
    assert Plan.from_json(cut.to_json()) == cut
    assert "column_shards" not in str(full.to_json())
    assert cut.digest != full.digest
    assert "column_shards" in full.differences(cut)[0]
    assert [part.key for part in cut.arrays[0].file_specs] == [f"sites/mlp_act/1#{i}" for i in range(3)]
    assert [part.key for part in full.arrays[0].file_specs] == ["sites/mlp_act/1"]


@pytest.mark.parametrize("changes", [{"column_shards": 5}, {"column_shards": 0}, {"codec": "int8-block32"}])
def test_rows_that_cannot_be_cut_equally_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(PlanError, match=r"site mlp_act\.1: "):
        plan(site(**changes))


@pytest.mark.parametrize("value", [1, None, "3", 3.0, True, [3]])
def test_a_plan_with_another_value_of_column_shards_is_refused(value: object) -> None:
    document = plan(site()).to_json()
    assert isinstance(document["sites"], list)
    assert isinstance(document["sites"][0], dict)
    document["sites"][0]["column_shards"] = value  # type: ignore[assignment]  # as above
    with pytest.raises(UnsafeArchiveError):
        Plan.from_json(document)


@pytest.mark.parametrize("width", [1, 3 * 2**10, 0, 2**21])
def test_metadata_of_too_many_or_unequal_column_shards_are_refused(tmp_path: Path, width: int) -> None:
    spec = make_spec("raw", "int8", (2**20,), rows_per_shard=2, rows_per_chunk=1)
    create_array(tmp_path, spec, 4)
    path = tmp_path / spec.path / "zarr.json"
    document = json.loads(path.read_bytes())
    document["chunk_grid"]["configuration"]["chunk_shape"][1] = width
    document["codecs"][0]["configuration"]["chunk_shape"][1] = width
    path.write_text(json.dumps(document))
    with pytest.raises(UnsafeArchiveError, match="equal column shards"):
        open_array(tmp_path, spec.path)

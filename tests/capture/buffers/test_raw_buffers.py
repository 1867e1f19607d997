"""Host buffers of `raw` sites, laid out as their files: any reader finds the rows that were put."""

from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from residua.capture.buffers.host_buffers import HostBuffer, ShardFiller
from residua.capture.buffers.row_index import BatchRows
from residua.store.encoding.shard import ShardMemory, check_shard, shard_path
from residua.store.format.commits import read_commits
from residua.store.format.create import create_archive, workspace
from residua.store.format.plan import Plan, SitePlan
from residua.store.format.writer import ShardWriter

torch.set_num_threads(1)
HEIGHT = 16
WIDTH = 64 * 1024  # so that chunks are 2, 4 and 1 rows high
DTYPES = {"resid_post.0": "float32", "resid_post.1": "bfloat16", "resid_post.2": "float64"}
SITES = (
    *(SitePlan(name=name, row_shape=(WIDTH,), dtype=dtype, codec="raw") for name, dtype in DTYPES.items()),
    SitePlan(name="pattern.0", row_shape=(1, WIDTH), dtype="float16", codec="raw"),
)


def plan_of(n_rows: int | None) -> Plan:
    return Plan(model={}, dataset={}, rules={}, sites=SITES, rows_per_shard=HEIGHT, batch_tokens=64, n_rows=n_rows)


def batches(n_rows: int, order: str) -> list[BatchRows]:
    """Return batches of one example each that together give every row once, in the given order."""
    rows = np.arange(n_rows)
    if order == "scattered":
        rows = np.random.default_rng(n_rows).permutation(rows)
    parts = [part for part in np.array_split(rows, -(-n_rows // 7)) if len(part)]
    return [
        BatchRows(
            source=np.arange(len(part)),
            row=part,
            token=part.astype(np.int32),
            position=np.arange(len(part), dtype=np.int32),
            example=np.full(len(part), number),
            tokens_of=[np.arange(len(part))],
            n_positions=len(part),
        )
        for number, part in enumerate(parts)
    ]


@pytest.mark.parametrize("order", ["in order", "scattered"])
@pytest.mark.parametrize("n_rows", [1, 5, 16, 31, 32])
def test_zarr_reads_the_rows_that_were_put(tmp_path: Path, n_rows: int, order: str) -> None:
    plan = plan_of(n_rows)
    with workspace(tmp_path / "a.zarr") as folder:
        create_archive(folder, tmp_path / "a.zarr", plan, {})
    values = torch.randn(n_rows, WIDTH, generator=torch.Generator().manual_seed(n_rows))
    patterns = np.zeros((n_rows, 1, WIDTH), np.float16)
    with ShardWriter(tmp_path / "a.zarr", plan, threads=2) as writer:
        filler = ShardFiller(plan, writer, n_buffers=2, pinned=False)
        for batch in batches(n_rows, order):
            n = len(batch.row)
            pattern = torch.rand(1, n, 1, n).to(torch.float16)
            patterns[batch.row, :, :n] = pattern[0].numpy()
            filler.begin(batch)
            for site in SITES:
                passed = pattern if site.name == "pattern.0" else values[batch.row][None]
                filler.put(site.name, passed)
                passed.fill_(float("nan"))
            filler.finish()
    expected = [
        values.numpy(),
        values.to(torch.bfloat16).view(torch.int16).numpy().view("<u2"),
        values.double().numpy(),
    ]
    for site, rows in zip(SITES, [*expected, patterns], strict=True):
        stored = zarr.open_array(str(tmp_path / "a.zarr" / site.path), mode="r")
        assert stored.shape == rows.shape
        assert np.asarray(stored[:]).tobytes() == rows.tobytes()
    for commit in read_commits(tmp_path / "a.zarr", plan.digest).values():
        for spec in plan.arrays:
            digest = check_shard(
                shard_path(tmp_path / "a.zarr", spec, commit.shard), spec, commit.rows[1] - commit.rows[0]
            )
            assert digest == commit.arrays[spec.path].digest


def test_rows_of_eight_byte_values_are_contiguous() -> None:
    buffer = HostBuffer(plan_of(8), 8, pinned=False)
    laid_out = {site.name for site in SITES if isinstance(buffer.rows(site.name, 8), ShardMemory)}
    assert laid_out == {"resid_post.0", "resid_post.1", "pattern.0"}


def test_a_buffer_for_few_rows_has_no_more() -> None:
    buffer = HostBuffer(plan_of(3), 3, pinned=False)
    assert {site: sum(len(block) for block in blocks) for site, blocks in buffer.blocks.items()} == dict.fromkeys(
        buffer.blocks, 3
    )

"""Host buffers: every row lands where the plan says, memory is reused only when it is free, and no failure is lost."""

import threading
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from residua.capture.buffers.host_buffers import HostBuffer, ShardFiller, torch_dtype
from residua.capture.buffers.row_index import batch_rows
from residua.store.base.errors import CaptureError
from residua.store.encoding.dtypes import STORAGE_DTYPES
from residua.store.encoding.shard import ShardEncoder, check_shard
from residua.store.examples.schedule import Schedule
from residua.store.format.commits import read_commits
from residua.store.format.create import create_archive, workspace
from residua.store.format.plan import SitePlan, n_open_shards
from residua.store.format.writer import ShardWriter
from tests.capture.buffer_samples import (
    SITES,
    HoldingWriter,
    LateWriter,
    filler_of,
    index_of,
    make_plan,
    rows_of,
    run,
    site_rows,
)

torch.set_num_threads(1)


EXAMPLES = st.lists(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), max_size=10)


@settings(deadline=None)
@given(EXAMPLES, st.sampled_from([1, 2, 4, 8, 64]), st.sets(st.integers(0, 40)))
def test_every_missing_shard_is_handed_over_once_with_its_own_rows(
    examples: list[tuple[int, int]], height: int, committed: set[int]
) -> None:
    index = index_of([tokens for tokens, _ in examples], [rows for _, rows in examples])
    plan = make_plan(height, index.total_rows)
    schedule = Schedule(index, rows_per_shard=height, batch_tokens=plan.batch_tokens)
    writer = LateWriter()
    buffers = n_open_shards(int(index.n_rows.max(initial=0)), height)
    filler = filler_of(plan, writer, n_buffers=buffers)
    filler.keep_only(set(range(schedule.n_shards)) - committed)
    for batch in schedule.work(committed):
        run(filler, index, batch)
    assert filler.open_shards == ()
    shards = writer.close()
    assert sorted(shards) == [shard for shard in range(schedule.n_shards) if shard not in committed]
    everything = [(e, t) for e, (n, kept) in enumerate(examples) for t in range(n - kept, n)]
    for shard, arrays in shards.items():
        expected = everything[shard * height : (shard + 1) * height]
        assert arrays["resid_post.0"].tolist() == [[e, t] for e, t in expected]
        bits = torch.tensor(expected, dtype=torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(arrays["resid_post.1"], bits)
        for row, (e, t) in zip(arrays["pattern.0"], expected, strict=True):
            keys = [100 * e + 10 * t + k + 1 if k < examples[e][0] else 0 for k in range(12)]
            assert row.tolist() == [keys]
        assert arrays["example"].tolist() == [e for e, _ in expected]
        assert arrays["position"].tolist() == [t for _, t in expected]
        assert arrays["token"].tolist() == [t + 1 for _, t in expected]


@pytest.mark.parametrize("n_rows", [1, 7, 8, 9, 20])
def test_a_real_writer_stores_what_was_put(tmp_path: Path, n_rows: int) -> None:
    plan = make_plan(8, n_rows, SITES[:2])
    with workspace(tmp_path / "a.zarr") as folder:
        create_archive(folder, tmp_path / "a.zarr", plan, {})
    values = torch.randn(n_rows, 1, 2, generator=torch.Generator().manual_seed(n_rows))
    with ShardWriter(tmp_path / "a.zarr", plan, threads=2) as writer:
        filler = ShardFiller(plan, writer, n_buffers=2, pinned=False)
        for row in range(n_rows):
            filler.begin(rows_of([1], first_row=row, first_example=row))
            for site in SITES[:2]:
                filler.put(site.name, values[row : row + 1])
            filler.finish()
    assert sorted(read_commits(tmp_path / "a.zarr", plan.digest)) == list(range(-(-n_rows // 8)))
    stored = zarr.open_array(str(tmp_path / "a.zarr" / "sites" / "resid_post" / "0"), mode="r")
    assert np.array_equal(np.asarray(stored[:]), values[:, 0].numpy())
    bits = zarr.open_array(str(tmp_path / "a.zarr" / "sites" / "resid_post" / "1"), mode="r")
    expected = values[:, 0].to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(np.asarray(bits[:]).view(np.uint16), expected)


def test_a_batch_waits_for_a_free_stage_and_the_wait_is_counted() -> None:
    writer = HoldingWriter()
    filler = filler_of(make_plan(4, 12, SITES[:1]), writer, n_buffers=2)
    for shard in range(2):
        filler.begin(rows_of([4], first_row=4 * shard))
        filler.finish()
    assert filler.stall_seconds == 0
    third = threading.Thread(target=filler.begin, args=(rows_of([4], first_row=8),))
    third.start()
    third.join(timeout=0.2)
    assert third.is_alive(), "both buffers are being written"
    writer.held[0].release()
    third.join(timeout=60)
    assert not third.is_alive()
    assert filler.stall_seconds > 0
    assert filler.open_shards == (2,)


def test_a_released_buffer_is_used_again() -> None:
    writer = HoldingWriter()
    filler = filler_of(make_plan(4, 8, SITES[:1]), writer, n_buffers=1)
    for shard in range(2):
        filler.begin(rows_of([4], first_row=4 * shard))
        filler.finish()
        writer.held[shard].release()
    first, second = (site_rows(shard, "resid_post.0") for shard in writer.held)
    assert np.shares_memory(first, second)
    assert filler.stall_seconds == 0


def test_the_writer_is_given_the_wait_for_copies_under_way() -> None:
    writer, waited = HoldingWriter(), threading.Event()

    class Event:
        def synchronize(self) -> None:
            waited.set()

    filler = filler_of(make_plan(4, 4, SITES[:1]), writer, n_buffers=1)
    filler.begin(rows_of([4]))
    filler._open[0].pending.expect(cast("Any", "a device's streams"), cast("Any", Event()))
    filler.finish()
    assert not waited.is_set(), "handing over does not wait"
    writer.held[0].ready()
    assert waited.is_set()


def test_a_batch_that_reaches_too_far_is_refused_and_not_waited_for() -> None:
    filler = filler_of(make_plan(2, 20, SITES[:1]), HoldingWriter(), n_buffers=2)
    with pytest.raises(CaptureError, match=r"6 rows reaches into 3 shards of 2 rows.*memory for 2"):
        filler.begin(rows_of([6]))


def test_shards_that_are_not_wanted_need_no_buffer() -> None:
    filler = filler_of(make_plan(2, 20, SITES[:1]), HoldingWriter(), n_buffers=2)
    filler.keep_only({0, 4})
    filler.begin(rows_of([10]))
    assert filler.open_shards == (0, 4)


def test_buffers_grow_to_the_limit_for_a_wider_batch() -> None:
    filler = filler_of(make_plan(2, None, SITES[:1]), HoldingWriter(), n_buffers=2, max_buffers=3)
    filler.begin(rows_of([6]))
    assert filler.open_shards == (0, 1, 2)
    filler.finish()
    with pytest.raises(CaptureError, match="4 shards"):
        filler.begin(rows_of([8], first_row=6))


def test_a_failure_of_the_writer_comes_up_in_the_next_batch_that_needs_it() -> None:
    writer = HoldingWriter()
    filler = filler_of(make_plan(4, 12, SITES[:1]), writer, n_buffers=2)
    filler.begin(rows_of([4]))
    filler.finish()
    writer.failure = CaptureError("a shard could not be written: the disk is full")
    with pytest.raises(CaptureError, match="disk is full"):
        filler.begin(rows_of([4], first_row=4))


@pytest.mark.parametrize("then", ["another batch", "the end"])
def test_rows_that_were_announced_and_never_copied_are_never_written(then: str) -> None:
    writer = HoldingWriter()
    filler = filler_of(make_plan(4, None, SITES[:1]), writer, n_buffers=2)
    filler.begin(rows_of([3]))
    with pytest.raises(CaptureError, match="3 rows"):
        filler.begin(rows_of([1], first_row=3)) if then == "another batch" else filler.hand_over(0, {})
    assert writer.held == []


def test_a_batch_that_could_not_begin_cannot_be_skipped() -> None:
    filler = filler_of(make_plan(2, 20, SITES[:1]), HoldingWriter(), n_buffers=2)
    with pytest.raises(CaptureError, match="3 shards"):
        filler.begin(rows_of([6]))
    with pytest.raises(CaptureError, match="6 rows"):
        filler.begin(rows_of([1], first_row=6))


def test_rows_before_their_batch_raise_a_runtime_error() -> None:
    filler = filler_of(make_plan(4, 12, SITES[:1]), HoldingWriter(), n_buffers=2)
    with pytest.raises(RuntimeError, match=r"resid_post\.0 came before"):
        filler.put("resid_post.0", torch.zeros(1, 1, 2))


def test_a_batch_without_rows_opens_nothing() -> None:
    filler = filler_of(make_plan(4, 12, SITES[:1]), HoldingWriter(), n_buffers=2)
    filler.begin(batch_rows([], 3))
    filler.put("resid_post.0", torch.zeros(0, 3, 2))
    filler.finish()
    assert filler.open_shards == ()


def test_example_files_are_made_durable_once_a_shard_and_only_for_full_ones() -> None:
    writer, made = HoldingWriter(), iter(range(9))
    filler = filler_of(make_plan(2, None, SITES[:1]), writer, n_buffers=4)
    filler.begin(rows_of([5]))
    filler.put("resid_post.0", torch.zeros(1, 5, 2))
    filler.finish(lambda: {f"part-{next(made):05d}.parquet": "00"})
    assert [(shard.index, dict(shard.examples)) for shard in writer.held] == [
        (0, {"part-00000.parquet": "00"}),
        (1, {"part-00001.parquet": "00"}),
    ]
    assert filler.open_shards == (2,)
    filler.hand_over(2, {})
    assert len(writer.held[-1].columns["token"]) == len(site_rows(writer.held[-1], "resid_post.0")) == 1


def test_buffers_made_in_inference_mode_take_rows_from_outside_of_it() -> None:
    with torch.inference_mode():
        filler = filler_of(make_plan(4, None, SITES[:1]), HoldingWriter(), n_buffers=2)
    filler.begin(rows_of([2]))
    filler.put("resid_post.0", torch.ones(1, 2, 2))
    filler.finish()


def test_a_checksum_never_covers_rows_of_an_earlier_shard(tmp_path: Path) -> None:
    site = SitePlan(name="resid_post.0", row_shape=(2,), dtype="float32", codec="raw")
    writer = HoldingWriter()
    filler = filler_of(make_plan(4, 8, (site,)), writer, n_buffers=1)
    filler.begin(rows_of([4]))
    filler.put(site.name, torch.ones(1, 4, 2))
    filler.finish()
    writer.held[0].release()
    filler.begin(rows_of([4], first_row=4, first_example=1))
    filler.put_rows(site.name, 1, torch.full((4, 2), 7.0))
    filler.finish()
    rows, (spec,) = writer.held[1].sites[site.name], site.arrays(4)
    (tmp_path / "shard").write_bytes(b"".join(bytes(part) for part in ShardEncoder(rows, spec)))
    check_shard(tmp_path / "shard", spec, 4)


@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_overflow_is_counted_in_rows_that_come_from_other_ranks(computed: torch.dtype, stored: str) -> None:
    """Rows of a shard come in several pieces; the model's own infinities are no overflow."""
    site = SitePlan(name="resid_post.0", row_shape=(2,), dtype=stored, codec="raw")
    writer = HoldingWriter()
    filler = filler_of(make_plan(8, 8, (site,)), writer, n_buffers=1)
    values = torch.tensor([1e6, -1e6, torch.inf, torch.nan, 65504.0, 1.0, -7e4, 0.0], dtype=computed)
    for first in (0, 4):
        filler.begin(rows_of([4], first_row=first, first_example=first // 4))
        filler.put_rows(site.name, 0, values.view(4, 2).clone())
        filler.finish()
    cast = values.to(torch_dtype(stored))
    expected = 2 * int((values.isfinite() & ~cast.isfinite()).sum())
    assert writer.held[0].overflowed().get(site.name, 0) == expected
    assert (expected > 0) == (stored == "float16")


def test_buffers_are_no_taller_than_the_archive() -> None:
    assert len(HostBuffer(make_plan(4, 3), 3, pinned=False).columns["token"]) == 3
    writer = HoldingWriter()
    filler = filler_of(make_plan(2**20, 3, SITES[:1]), writer, n_buffers=2)
    filler.begin(rows_of([3]))
    filler.finish()
    assert site_rows(writer.held[0], "resid_post.0").base is not None, "a view, not a copy"
    assert len(site_rows(writer.held[0], "resid_post.0")) == 3


def test_every_stored_data_type_is_torchs() -> None:
    for name, storage in STORAGE_DTYPES.items():
        assert torch_dtype(name).itemsize == storage.itemsize
    with pytest.raises(TypeError, match="nn"):
        torch_dtype("nn")

"""Plans, batches and writers for the tests of host buffers."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from residua.capture.buffers.host_buffers import ShardFiller
from residua.capture.buffers.row_index import BatchRows, ExampleRows, batch_rows
from residua.store.base.errors import CaptureError
from residua.store.examples.index import ExampleIndex
from residua.store.examples.schedule import Batch
from residua.store.format.plan import Plan, SitePlan
from residua.store.format.writer import FilledShard, ShardWriter

SITES = (
    SitePlan(name="resid_post.0", row_shape=(2,), dtype="float32", codec="fast"),
    SitePlan(name="resid_post.1", row_shape=(2,), dtype="bfloat16", codec="fast"),
    SitePlan(name="pattern.0", row_shape=(1, 12), dtype="float32", codec="fast"),
)


def site_rows(shard: FilledShard, site: str) -> npt.NDArray[np.generic]:
    rows = shard.sites[site]
    assert isinstance(rows, np.ndarray)
    return rows


class LateWriter:
    """Reads a shard as late as a slow disk would, on a thread of its own, and frees its memory then."""

    def __init__(self) -> None:
        self.shards: dict[int, dict[str, npt.NDArray[np.generic]]] = {}
        self._pool = ThreadPoolExecutor(1)

    def submit(self, shard: FilledShard) -> None:
        self._pool.submit(self._write, shard)

    def _write(self, shard: FilledShard) -> None:
        shard.ready()
        assert shard.index not in self.shards
        arrays = {**{name: site_rows(shard, name) for name in shard.sites}, **shard.columns}
        self.shards[shard.index] = {name: rows.copy() for name, rows in arrays.items()}
        for rows in arrays.values():
            rows.reshape(-1).view(np.uint8)[:] = 0xA5
        shard.release()

    def raise_failure(self) -> None:
        self._pool.submit(int).result(timeout=60)

    def close(self) -> dict[int, dict[str, npt.NDArray[np.generic]]]:
        self._pool.shutdown()
        return self.shards


class HoldingWriter:
    """Keeps every shard until it is asked to release it, and fails when asked to."""

    def __init__(self) -> None:
        self.held: list[FilledShard] = []
        self.failure: CaptureError | None = None

    def submit(self, shard: FilledShard) -> None:
        self.raise_failure()
        self.held.append(shard)

    def raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure


def make_plan(height: int, n_rows: int | None, sites: tuple[SitePlan, ...] = SITES) -> Plan:
    return Plan(model={}, dataset={}, rules={}, sites=sites, rows_per_shard=height, batch_tokens=24, n_rows=n_rows)


def filler_of(plan: Plan, writer: object, **options: Any) -> ShardFiller:
    return ShardFiller(plan, cast("ShardWriter", writer), pinned=False, **options)


def rows_of(lengths: list[int], first_row: int = 0, first_example: int = 0) -> BatchRows:
    """Return the rows of a right-padded batch whose every token is kept."""
    examples = []
    for number, length in enumerate(lengths, start=first_example):
        at = np.arange(length)
        examples.append(
            ExampleRows(
                example=number,
                first_row=first_row,
                input_ids=(at + 1).astype(np.int32),
                positions=at.astype(np.int32),
                padded=at.astype(np.int64),
            )
        )
        first_row += length
    return batch_rows(examples, max(lengths))


def put_all(filler: ShardFiller, examples: list[int], n_positions: int) -> None:
    """Give every site a tensor in which each entry names its example and position; then overwrite it in place."""
    b = torch.tensor(examples, dtype=torch.float32)[:, None]
    t = torch.arange(n_positions, dtype=torch.float32)[None]
    hidden = torch.stack([b.expand(-1, n_positions), t.expand(len(examples), -1)], dim=-1)
    k = torch.arange(n_positions, dtype=torch.float32)
    pattern = (100 * b[..., None, None] + 10 * t[..., None, None] + k + 1).expand(-1, -1, 1, -1)
    for site, tensor in (("resid_post.0", hidden), ("resid_post.1", hidden), ("pattern.0", pattern)):
        passed = tensor.clone()
        filler.put(site, passed)
        passed.fill_(float("nan"))


def index_of(n_tokens: list[int], n_rows: list[int]) -> ExampleIndex:
    return ExampleIndex(
        n_tokens=np.array(n_tokens, np.int32),
        n_rows=np.array(n_rows, np.int32),
        first_row=np.concatenate([[0], np.cumsum(n_rows)]).astype(np.int64),
        first_example=np.array([0, len(n_tokens)], np.int64),
        digest="",
    )


def run(filler: ShardFiller, index: ExampleIndex, batch: Batch) -> None:
    """Run one batch as a capture does, with every example's last rows kept."""
    examples = batch.examples.tolist()
    rows = []
    for number in examples:
        n_tokens, n_rows = int(index.n_tokens[number]), int(index.n_rows[number])
        rows.append(
            ExampleRows(
                example=number,
                first_row=int(index.first_row[number]),
                input_ids=np.arange(1, n_tokens + 1, dtype=np.int32),
                positions=np.arange(n_tokens - n_rows, n_tokens, dtype=np.int32),
                padded=np.arange(n_tokens, dtype=np.int64),
            )
        )
    n_positions = max(int(index.n_tokens[number]) for number in examples)
    filler.begin(batch_rows(rows, n_positions))
    put_all(filler, examples, n_positions)
    filler.finish()

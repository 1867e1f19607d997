"""An archive of enough rows to be shuffled: row r holds its own number in every site."""

from pathlib import Path

import numpy as np

from residua.store.base.canonical import Json
from residua.store.examples.index import Example
from residua.store.examples.writer import ExampleWriter
from residua.store.format.create import create_archive, workspace
from residua.store.format.plan import Plan, SitePlan
from residua.store.format.writer import FilledShard, ShardWriter
from residua.store.read.archive import Archive
from residua.store.read.reader import Array

HEIGHT = 1024
LENGTH = 32  # rows of an example


def make_numbered(path: Path, n_rows: int, codec: str = "fast", *, width: int = 512) -> Archive:
    """Write an archive with two sites, float32, the second four times as narrow as the first.

    Chunks of the wide site have 512 KiB / (4 * width) rows. Example e has the label e % 4.
    """
    sites = tuple(
        SitePlan(name=f"resid_post.{i}", row_shape=(width // 4**i,), dtype="float32", codec=codec) for i in range(2)
    )
    n_examples = n_rows // LENGTH
    with workspace(path) as folder:
        writer = ExampleWriter(folder / "examples")
        for example in range(n_examples):
            writer.add(_example(example))
        index = writer.close()
        dataset: dict[str, Json] = {"digest": index.digest, "n_examples": n_examples}
        plan = Plan(model={}, dataset=dataset, rules={}, sites=sites, rows_per_shard=HEIGHT, n_rows=n_rows)
        create_archive(folder, path, plan, {})
    with ShardWriter(path, plan) as shards:
        for shard, first in enumerate(range(0, n_rows, HEIGHT)):
            shards.submit(_shard(shard, first, min(first + HEIGHT, n_rows), plan))
    return Archive(path)


def _example(number: int) -> Example:
    positions = np.arange(LENGTH, dtype=np.int32)
    return Example(input_ids=positions + number, positions=positions, columns={"label": number % 4, "name": "n"})


def _shard(shard: int, first: int, stop: int, plan: Plan) -> FilledShard:
    rows = np.arange(first, stop)
    values = {
        site.name: np.broadcast_to(rows[:, None], (len(rows), *site.row_shape)).astype(np.float32)
        for site in plan.sites
    }
    examples, positions = np.divmod(rows, LENGTH)
    columns: dict[str, Array] = {
        "token": (examples + positions).astype(np.int32),
        "position": positions.astype(np.int32),
        "example": examples.astype(np.int64),
    }
    return FilledShard(index=shard, first_row=first, sites=values, columns=columns)

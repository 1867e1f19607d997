"""Archives of many shards at almost no cost: all shards are one file, or no shard is captured."""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from residua.store.base.canonical import canonical_json, digest_of
from residua.store.encoding.shard import shard_path
from residua.store.format.commits import FOLDER, Commit, ShardFile
from residua.store.format.create import create_archive, workspace
from residua.store.format.plan import Plan, SitePlan
from residua.store.format.writer import FilledShard, ShardWriter
from residua.store.read.archive import Archive

Array = npt.NDArray[np.generic]


def make_plan(n_shards: int, height: int, width: int, codec: str, dtype: str) -> Plan:
    """Return the plan of an archive with one site, `resid_post.0`."""
    site = SitePlan(name="resid_post.0", row_shape=(width,), dtype=dtype, codec=codec)
    return Plan(model={}, dataset={}, rules={}, sites=(site,), rows_per_shard=height, n_rows=n_shards * height)


def make_large(path: Path, values: Array, n_shards: int, *, codec: str = "raw", dtype: str = "float32") -> Archive:
    """Write an archive whose shards all hold `values`, (rows of a shard, width), as hard links to one file.

    `values` have the storage type of `dtype`.
    """
    height, width = values.shape
    plan = make_plan(n_shards, height, width, codec, dtype)
    with workspace(path) as folder:
        create_archive(folder, path, plan, {})
    columns: dict[str, Array] = {
        "token": np.arange(height, dtype=np.int32),
        "position": np.arange(height, dtype=np.int32),
        "example": np.zeros(height, np.int64),
    }
    with ShardWriter(path, plan) as writer:
        writer.submit(FilledShard(index=0, first_row=0, sites={"resid_post.0": values}, columns=columns))
    written = Archive(path).commits[0]
    for shard in range(1, n_shards):
        for spec in plan.arrays:
            target = shard_path(path, spec, shard)
            target.parent.mkdir(exist_ok=True)
            os.link(shard_path(path, spec, 0), target)
        _commit(path, plan, shard, dict(written.arrays))
    return Archive(path)


def make_empty(path: Path, n_shards: int) -> Archive:
    """Write an archive of `n_shards` shards, none of them captured."""
    plan = make_plan(n_shards, 4096, 512, "fast", "float32")
    with workspace(path) as folder:
        create_archive(folder, path, plan, {})
    return Archive(path)


def _commit(path: Path, plan: Plan, shard: int, files: dict[str, ShardFile]) -> None:
    """Write the commit record of a shard without fsync, which would take minutes."""
    height = plan.rows_per_shard
    commit = Commit(plan=plan.digest, shard=shard, rows=(shard * height, (shard + 1) * height), arrays=files)
    record = commit.to_json()
    (path / FOLDER / commit.name).write_bytes(canonical_json({"record": record, "sha256": digest_of(record)}))

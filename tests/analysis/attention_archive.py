"""Archives of queries and keys that no model made, and attention weights from them in plain float64 numpy."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from residua.store.examples.index import Example
from residua.store.examples.writer import ExampleWriter
from residua.store.format.create import create_archive, workspace
from residua.store.format.plan import Plan, SitePlan
from residua.store.format.sidecars import AttentionSpec, attention_to_json
from residua.store.format.writer import FilledShard, ShardWriter
from residua.store.read.archive import Archive
from residua.store.storage.files import write_file

Floats = npt.NDArray[np.float64]
HEIGHT = 64


def make_qk_archive(
    path: Path,
    examples: Sequence[Sequence[int]],
    spec: AttentionSpec | str | None,
    *,
    heads: tuple[int, int] = (4, 2),
    width: int = 6,
    keep: int | None = None,
) -> Archive:
    """Write random `q.0` and `k.0` (float32) for the token lists `examples`; of each, `keep` positions or all."""
    rng = np.random.default_rng(0)
    kept = [np.arange(min(len(ids), keep or len(ids)), dtype=np.int32) for ids in examples]
    n_rows = sum(map(len, kept))
    sites = tuple(
        SitePlan(name=name, row_shape=(n, width), dtype="float32", codec="fast")
        for name, n in zip(("q.0", "k.0"), heads, strict=True)
    )
    with workspace(path) as folder:
        writer = ExampleWriter(folder / "examples")
        for ids, positions in zip(examples, kept, strict=True):
            writer.add(Example(input_ids=np.array(ids, np.int32), positions=positions))
        index = writer.close()
        if spec is not None:
            write_file(folder / "head" / "attention.json", [attention_to_json({0: spec})])
        plan = Plan(
            model={},
            dataset={"digest": index.digest},
            rules={},
            sites=sites,
            rows_per_shard=HEIGHT,
            batch_tokens=64,
            n_rows=n_rows,
        )
        create_archive(folder, path, plan, {})
    values = {site.name: rng.standard_normal((n_rows, *site.row_shape), np.float32) for site in sites}
    columns = {
        "token": np.concatenate(
            [np.zeros(0, np.int32), *(np.array(ids, np.int32)[at] for ids, at in zip(examples, kept, strict=True))]
        ),
        "position": np.concatenate([np.zeros(0, np.int32), *kept]),
        "example": np.repeat(np.arange(len(kept)), np.array([len(positions) for positions in kept], np.int64)),
    }
    with ShardWriter(path, plan) as shards:
        for number, first in enumerate(range(0, n_rows, HEIGHT)):
            rows = slice(first, min(first + HEIGHT, n_rows))
            sliced = {name: np.ascontiguousarray(column[rows]) for name, column in columns.items()}
            found = {name: array[rows] for name, array in values.items()}
            shards.submit(FilledShard(index=number, first_row=first, sites=found, columns=sliced))
    return Archive(path)


def dense_weights(archive: Archive, example: int, spec: AttentionSpec) -> Floats:
    """Attention weights of one example, (heads, queries, keys), in float64, as store/FORMAT.md says."""
    stored = archive.example(example)
    query, key = (stored[name].astype(np.float64).swapaxes(0, 1) for name in ("q.0", "k.0"))
    key = np.repeat(key, len(query) // len(key), axis=0)
    score = spec.scale * np.einsum("hqd,hkd->hqk", query, key)
    if spec.softcap is not None:
        score = spec.softcap * np.tanh(score / spec.softcap)
    back = np.subtract.outer(np.arange(score.shape[1]), np.arange(score.shape[1]))
    seen = back >= (0 if spec.causal else -len(back))
    if spec.window is not None:
        seen &= back < spec.window
    weight: Floats = np.where(seen, np.exp(score), 0.0)
    sinks = np.zeros(len(query)) if spec.sinks is None else np.exp(np.array(spec.sinks))
    weight /= weight.sum(-1, keepdims=True) + sinks[:, None, None]
    return weight

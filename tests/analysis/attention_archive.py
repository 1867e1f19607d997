"""Archives of random queries and keys, and their attention weights in plain float64 numpy."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from residua.store.format.sidecars import AttentionSpec, attention_to_json
from residua.store.read.archive import Archive
from tests.analysis.rows_archive import write_rows

Floats = npt.NDArray[np.float64]


def make_qk_archive(
    path: Path,
    examples: Sequence[Sequence[int]],
    spec: AttentionSpec | str | None,
    *,
    heads: tuple[int, int] = (4, 2),
    width: int = 6,
    keep: int | None = None,
) -> Archive:
    """Write random `q.0` and `k.0` (float32) for the token lists `examples`, `keep` positions of each, or all."""
    rng = np.random.default_rng(0)
    lengths = [min(len(ids), keep or len(ids)) for ids in examples]
    values = {
        name: rng.standard_normal((sum(lengths), n, width), np.float32)
        for name, n in zip(("q.0", "k.0"), heads, strict=True)
    }
    files = {} if spec is None else {"head/attention.json": attention_to_json({0: spec})}
    return write_rows(path, lengths, values, input_ids=examples, files=files, sealed=False)


def dense_weights(archive: Archive, example: int, spec: AttentionSpec) -> Floats:
    """Return attention weights of one example, (heads, queries, keys), in float64, as store/FORMAT.md defines them."""
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

"""Reference scores of attention heads, computed query by query in float64."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
NAMES = ("induction", "previous_token", "duplicate_token", "prefix_matching")


def keys_that_count(ids: Sequence[int], query: int, period: int, start: int) -> dict[str, list[int]]:
    """Return the keys that count for a query, by score; `start` is 1 after a BOS token."""
    earlier = [j for j in range(start, query) if ids[j] == ids[query] and query >= start]
    return {
        "induction": [query - period + 1] if query >= start + period else [],
        "previous_token": [query - 1] if query > start else [],
        "duplicate_token": earlier,
        "prefix_matching": [j + 1 for j in earlier],
    }


def reference_scores(
    patterns: Sequence[Floats], examples: Sequence[Sequence[int]], periods: Sequence[int], starts: Sequence[int]
) -> Floats:
    """Return the mean over queries of the attention to keys that count, (heads, scores), of patterns (heads, Q, K)."""
    found: dict[str, list[Floats]] = {name: [] for name in NAMES}
    for pattern, ids, period, start in zip(patterns, examples, periods, starts, strict=True):
        for query in range(len(ids)):
            for name, keys in keys_that_count(ids, query, period, start).items():
                if keys:
                    found[name].append(pattern[:, query, keys].sum(-1))
    return np.stack([np.mean(found[name], axis=0) for name in NAMES], axis=-1)

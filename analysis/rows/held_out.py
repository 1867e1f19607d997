"""The held-out split: hashes of the groups' numbers decide, so that all processes agree without communication.

A group is what must not be divided: `residua.analysis.rows.groups` says which examples those are. The hash is the
output function of SplitMix64 (Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators").
"""

import numpy as np
import numpy.typing as npt

from residua.store.base.errors import AnalysisError

_MASK = 2**64 - 1


def held_out(examples: npt.NDArray[np.int64], *, fraction: float = 0.1, seed: int = 0) -> npt.NDArray[np.bool_]:
    """Return for each example number whether the example is held out.

    The answer depends only on the number and the seed: it needs no memory, and is the same on every machine and in
    every block of rows. Rows of one example are never divided. About `fraction` of many examples is held out; of a few
    examples it may be none.

    >>> held_out(np.arange(8), fraction=0.5).tolist()
    [False, True, False, False, True, True, False, True]

    Args:
        examples: Numbers of examples, any shape, for example `archive.rows.example[start:stop]`.
        fraction: Share of the examples that is held out, above 0 and below 1.
        seed: Another seed holds out other examples.

    Returns:
        bool, with the shape of `examples`.

    Raises:
        AnalysisError: The fraction is not between 0 and 1.
    """
    _check(fraction)
    return np.asarray(_hashes(examples, seed) < np.uint64(int(fraction * 2**64)))


def held_out_groups(
    groups: npt.NDArray[np.int64],
    *,
    fraction: float = 0.1,
    seed: int = 0,
    kinds: npt.NDArray[np.int64] | None = None,
) -> npt.NDArray[np.bool_]:
    """Return for each example whether it is held out, with all examples of its group.

    The groups with the lowest hashes are held out, exactly as many as the fraction asks for, but at least one, and not
    all, of two or more. With `kinds`, such as classes, that holds for the groups of each kind.

    >>> held_out_groups(np.array([0, 0, 2, 3, 2]), fraction=0.4).tolist()
    [False, False, True, False, True]

    Args:
        groups: The group of each example, (examples,).
        fraction: Share of the groups that is held out, above 0 and below 1.
        seed: Another seed holds out other groups.
        kinds: A number for each example, the same within a group, (examples,).

    Returns:
        (examples,).

    Raises:
        AnalysisError: The fraction is not between 0 and 1.
    """
    _check(fraction)
    numbers, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    kind = np.zeros(len(numbers), np.int64) if kinds is None else np.unique(kinds[first], return_inverse=True)[1]
    order = np.lexsort((_hashes(numbers, seed), kind))
    counts = np.bincount(kind)
    ranks = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    n_held_out = np.clip(np.round(fraction * counts).astype(np.int64), 1, np.maximum(counts - 1, 1)) * (counts > 1)
    is_held_out = np.zeros(len(numbers), np.bool_)
    is_held_out[order] = ranks < n_held_out[kind[order]]
    return np.asarray(is_held_out[inverse])


def _check(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise AnalysisError(
            f"a fraction of {fraction} of the examples cannot be held out: give a number between 0 and 1"
        )


def _hashes(numbers: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        return _mixed(np.asarray(numbers).astype(np.uint64) + _mixed(np.uint64(seed & _MASK)))


def _mixed(values: npt.NDArray[np.uint64] | np.uint64) -> npt.NDArray[np.uint64]:
    """Return the output of SplitMix64 for each state in `values`."""
    mixed = np.asarray(values) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)), np.uint64)

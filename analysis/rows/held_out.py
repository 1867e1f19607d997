"""The held-out split: a hash of an example's number decides, so that all processes agree without communication.

The hash is the output function of SplitMix64 (Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number
Generators").
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
    if not 0 < fraction < 1:
        raise AnalysisError(
            f"a fraction of {fraction} of the examples cannot be held out: give a number between 0 and 1"
        )
    with np.errstate(over="ignore"):
        start = _mixed(np.uint64(seed & _MASK))
        hashed = _mixed(np.asarray(examples).astype(np.uint64) + start)
    return np.asarray(hashed < np.uint64(int(fraction * 2**64)))


def _mixed(values: npt.NDArray[np.uint64] | np.uint64) -> npt.NDArray[np.uint64]:
    """Return the output of SplitMix64 for each state in `values`."""
    mixed = np.asarray(values) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)), np.uint64)

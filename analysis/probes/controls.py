"""The held-out split of a probe's examples, and control labels that say nothing about the rows."""

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from residua.analysis.rows.held_out import held_out

Numbers: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]

FIT, VALIDATION, TEST = 0, 1, 2
_VALIDATION_FRACTION = 0.2  # of the examples that are not held out for the test


class Split(NamedTuple):
    """Which examples are held out for the test, which choose the penalty, and which fit the probe."""

    test_fraction: float
    seed: int

    def subsets(self, examples: Numbers) -> npt.NDArray[np.int8]:
        """Return `FIT`, `VALIDATION` or `TEST` for each example number, by a hash: rows of an example stay together."""
        subsets = np.full(len(examples), FIT, np.int8)
        subsets[held_out(examples, fraction=_VALIDATION_FRACTION, seed=self.seed + 1)] = VALIDATION
        subsets[held_out(examples, fraction=self.test_fraction, seed=self.seed)] = TEST
        return subsets


@dataclass(frozen=True)
class Control:
    """Labels with the frequencies of the true ones that say nothing about the rows.

    These are control tasks as in Hewitt and Liang (2019), "Designing and Interpreting Probes with Control Tasks". If
    all rows of an example have the same label, labels are permuted among the examples: all rows of an example have the
    same wrong label, so the control shows whether a probe recognises examples that it should not have seen. Else each
    row gets the label of another row, drawn at random.

    Attributes:
        values: The label of each example, or labels to draw from.
        is_per_example: Which of the two.
        seed: Seed of the draw.
    """

    values: Floats
    is_per_example: bool
    seed: int

    @classmethod
    def permuted(cls, by_example: Floats, seed: int) -> "Control":
        """Return the labels of examples in another order; NaN, which means no label, stays in its place."""
        labelled = np.flatnonzero(np.isfinite(by_example))
        permuted = by_example.copy()
        permuted[labelled] = by_example[np.random.default_rng(seed).permutation(labelled)]
        return cls(permuted, True, seed)

    def labels(self, rows: Numbers, examples: Numbers) -> Floats:
        """Return the labels of a piece of rows and their examples; the same piece always gets the same labels."""
        if self.is_per_example:
            return np.asarray(self.values[examples])
        drawn = np.random.default_rng([self.seed, int(rows[0])]).integers(len(self.values), size=len(rows))
        return np.asarray(self.values[drawn])

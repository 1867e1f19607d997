"""Who takes part in which step of a probe, and labels that mean nothing, to compare a probe with."""

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from residua.analysis.rows.held_out import held_out

Numbers: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]

FIT, VALIDATION, TEST = 0, 1, 2
_VALIDATION_FRACTION = 0.2  # of the examples that are not held out


class Split(NamedTuple):
    """Which part an example is in: held out for the test, else to choose the penalty by, else to fit."""

    test_fraction: float
    seed: int

    def parts(self, examples: Numbers) -> npt.NDArray[np.int8]:
        """Return the part of each example number, by a hash: rows of an example are never divided."""
        parts = np.full(len(examples), FIT, np.int8)
        parts[held_out(examples, fraction=_VALIDATION_FRACTION, seed=self.seed + 1)] = VALIDATION
        parts[held_out(examples, fraction=self.test_fraction, seed=self.seed)] = TEST
        return parts


@dataclass(frozen=True)
class Control:
    """Labels with the true ones' frequencies that say nothing about the rows.

    Where all rows of an example have one label, labels are permuted among the examples: all rows of an example have
    the same wrong label, so a probe that recognises examples from which it should have learned nothing is found out.
    Else each row gets the label of another row, drawn at random.

    Attributes:
        by_example: The label of each example, or None.
        sample: Labels to draw from, or None.
        seed: Of the draw.
    """

    by_example: Floats | None
    sample: Floats | None
    seed: int

    @classmethod
    def permuted(cls, by_example: Floats, seed: int) -> "Control":
        """Return the labels of examples in another order; NaN, which stands for no label, stays in its place."""
        there = np.flatnonzero(np.isfinite(by_example))
        permuted = by_example.copy()
        permuted[there] = by_example[np.random.default_rng(seed).permutation(there)]
        return cls(permuted, None, seed)

    @classmethod
    def drawn(cls, sample: Floats, seed: int) -> "Control":
        """Return labels drawn from `sample`, with replacement."""
        return cls(None, sample, seed)

    def labels(self, rows: Numbers, examples: Numbers) -> Floats:
        """Return the labels of a piece of rows and their examples; the same piece gets the same labels."""
        if self.by_example is not None:
            return np.asarray(self.by_example[examples])
        sample = np.zeros(1) if self.sample is None else self.sample
        drawn = np.random.default_rng([self.seed, int(rows[0])]).integers(len(sample), size=len(rows))
        return np.asarray(sample[drawn])

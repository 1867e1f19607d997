"""The held-out split of a probe's examples, and control labels that say nothing about the rows."""

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from residua.analysis.rows.groups import DOCUMENT, EXAMPLE, example_groups
from residua.analysis.rows.held_out import held_out_groups
from residua.store.read.archive import Archive

Numbers: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]
Subsets: TypeAlias = npt.NDArray[np.int8]

FIT, VALIDATION, TEST = 0, 1, 2
_VALIDATION_FRACTION = 0.2  # of the groups that are not held out for the test


class Split(NamedTuple):
    """How examples are held out: the share of their groups, a seed, and what a group is (see `example_groups`)."""

    test_fraction: float
    seed: int
    group: str | None = None

    def groups(self, archive: Archive) -> Numbers:
        """Return the group of each example, which is not divided."""
        return example_groups(archive, self.group)

    def subsets(self, groups: Numbers, present: Numbers, classes: Numbers | None) -> Subsets:
        """Return `FIT`, `VALIDATION` or `TEST` for each example.

        Args:
            groups: The group of each example, (examples,).
            present: Numbers of the examples that have rows to use; groups of others do not count.
            classes: The class of each example, each of which is divided for itself; None if there are none.
        """
        subsets = np.full(len(groups), FIT, np.int8)
        for subset, fraction, seed in (
            (TEST, self.test_fraction, self.seed),
            (VALIDATION, _VALIDATION_FRACTION, self.seed + 1),
        ):
            kinds = None if classes is None else classes[present]
            is_held_out = held_out_groups(groups[present], fraction=fraction, seed=seed, kinds=kinds)
            subsets[present[is_held_out]] = subset
            present = present[~is_held_out]
        return subsets


@dataclass(frozen=True)
class Control:
    """Labels with the frequencies of the true ones that say nothing about the rows.

    These are control tasks as in Hewitt and Liang (2019), "Designing and Interpreting Probes with Control Tasks". If
    all rows of a document have the same label, labels are permuted among documents: all windows and copies of a
    document have the same wrong label, so the control shows whether a probe recognises documents that it should not
    have seen. Labels that differ within a document are permuted among examples. If they differ within an example, each
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
    def permuted(cls, by_example: Floats, units: Numbers, subsets: Subsets, seed: int) -> "Control":
        """Return the labels of units in another order; NaN, which means no label, stays in its place.

        Labels of units that are held out are permuted among themselves, and so are those of the others, so that each
        side keeps its frequencies. Units that lie on both sides are permuted among themselves, too.

        Args:
            by_example: The label of each example.
            units: The unit of each example; examples of a unit have one label, else every example is its own unit.
            subsets: The subset of each example.
            seed: Seed of the permutation.
        """
        labelled = np.flatnonzero(np.isfinite(by_example))
        _, first, unit = np.unique(units[labelled], return_index=True, return_inverse=True)
        values = by_example[labelled][first]
        if (values[unit] != by_example[labelled]).any():
            return cls.permuted(by_example, np.arange(len(units)), subsets, seed)
        is_test = subsets[labelled] == TEST
        n_test, n_examples = np.bincount(unit, is_test), np.bincount(unit)
        side = np.where(n_test == 0, 0, np.where(n_test == n_examples, 1, 2))
        generator = np.random.default_rng(seed)
        for members in (np.flatnonzero(side == one) for one in range(3)):
            values[members] = values[generator.permutation(members)]
        permuted = by_example.copy()
        permuted[labelled] = values[unit]
        return cls(permuted, True, seed)

    def labels(self, rows: Numbers, examples: Numbers) -> Floats:
        """Return the labels of a piece of rows and their examples; the same piece always gets the same labels."""
        if self.is_per_example:
            return np.asarray(self.values[examples])
        drawn = np.random.default_rng([self.seed, int(rows[0])]).integers(len(self.values), size=len(rows))
        return np.asarray(self.values[drawn])


def control_units(archive: Archive, split: Split, groups: Numbers) -> Numbers:
    """Return what the control permutes: the groups, but whole documents where groups are smaller than these."""
    return example_groups(archive) if split.group in (EXAMPLE, DOCUMENT) else groups

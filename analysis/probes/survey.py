"""What is known of a target before any probe is fitted: what its values are, and how many rows have them.

Only the rows' columns and the example table are read.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from residua.analysis.probes.controls import TEST, Control, Split
from residua.analysis.probes.target import Target
from residua.analysis.rows.blocks import blocks
from residua.analysis.rows.columns import examples_of
from residua.analysis.rows.held_out import held_out
from residua.store.base.errors import AnalysisError
from residua.store.read.archive import Archive
from residua.store.selection.row_filter import RowFilter

Task: TypeAlias = Literal["classification", "regression"]
Numbers: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]

_FEW = 16  # whole numbers of so many values or fewer are taken as classes
_MOST_CLASSES = 2048
_SAMPLE = 16_384  # labels, or up to twice as many, that a control draws from, where labels differ within an example


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What was found out about a target.

    Attributes:
        task: What the probe does.
        classes: The values of the target, ascending, of a classification.
        names: What they are called.
        n_rows: Rows to fit, to choose the penalty by, and to test on.
        majority: Number of the class that most rows of the first two have.
        control: Labels that mean nothing.
    """

    task: Task
    classes: Floats
    names: list[Any]
    n_rows: tuple[int, int, int]
    majority: int
    control: Control


def survey(archive: Archive, text: str, *, where: str | None, task: Task | None, split: Split) -> Survey:
    """Read the target of all captured rows.

    Args:
        archive: The archive.
        text: The target, as `residua.analysis.probes.target` reads it.
        where: Takes only these rows.
        task: What the probe is to do. None decides: classes are texts, true and false, and up to 16 whole numbers.
        split: Who is held out.

    Raises:
        AnalysisError: The target cannot be predicted: values are missing, all equal, or too many for classes; or
            nobody is held out.
    """
    target = Target(archive, text)
    chosen = None if where is None else RowFilter.parse(where)
    labels = _Labels(archive, split)
    for block in blocks(archive):
        rows = np.arange(*block)
        if chosen is not None:
            rows = rows[chosen.mask(archive, *block)]
        if len(rows):
            labels.add(rows, examples_of(archive, rows), target.values(rows))
    labels.check(text)
    if task is None:
        is_few = labels.is_whole and len(labels.n_train + labels.n_test) <= _FEW
        task = "classification" if target.names is not None or (is_few and not labels.is_much) else "regression"
    classes = labels.classes(text) if task == "classification" else np.zeros(0)
    fit, validation, test = labels.n_rows.tolist()
    values = [int(value) if labels.is_whole else value for value in classes.tolist()]
    return Survey(
        task=task,
        classes=classes,
        names=values if target.names is None else [target.names[int(value)] for value in values],
        n_rows=(fit, validation, test),
        majority=int(np.argmax([labels.n_train[value] for value in classes.tolist()] or [0])),
        control=labels.control(),
    )


class _Labels:
    """What one pass over the labels gathers."""

    def __init__(self, archive: Archive, split: Split) -> None:
        self.n_rows = np.zeros(3, np.int64)
        self.n_train: Counter[float] = Counter()
        self.n_test: Counter[float] = Counter()
        self.is_much = False  # more values than are counted
        self.is_whole = True
        self._split = split
        self._by_example: Floats = np.full(archive.example_table.index().n_examples, np.nan)
        self._is_per_example = True
        self._missing: list[int] = []  # examples of rows without a value, at most one a block
        self._n_missing = 0
        self._sample: tuple[Numbers, Floats] = np.zeros(0, np.int64), np.zeros(0)  # rows and their labels
        self._share = 1.0  # of all rows, so many are in the sample

    def add(self, rows: Numbers, examples: Numbers, values: npt.NDArray[Any]) -> None:
        labels: Floats = values.astype(np.float64)
        missing = ~np.isfinite(labels)
        if missing.any():
            self._missing.append(int(examples[missing][0]))
            self._n_missing += int(missing.sum())
            return
        self.is_whole &= bool((labels == np.floor(labels)).all())
        parts = self._split.parts(examples)
        self.n_rows += np.bincount(parts, minlength=3)
        self._count(self.n_train, labels[parts != TEST])
        self._count(self.n_test, labels[parts == TEST])
        self._add_to_sample(rows, labels)
        there, first = np.unique(examples, return_index=True)
        is_new = np.isnan(self._by_example[there])
        self._by_example[there[is_new]] = labels[first[is_new]]
        self._is_per_example &= bool((self._by_example[examples] == labels).all())

    def _add_to_sample(self, rows: Numbers, labels: Floats) -> None:
        """Keep labels of rows that a hash chooses, fewer of them as rows go on coming."""
        rows = np.concatenate([self._sample[0], rows])
        labels = np.concatenate([self._sample[1], labels])
        while True:
            is_kept = held_out(rows, fraction=self._share, seed=0) if self._share < 1 else np.ones(len(rows), np.bool_)
            if np.count_nonzero(is_kept) <= 2 * _SAMPLE:
                break
            self._share /= 2
        self._sample = rows[is_kept], labels[is_kept]

    def _count(self, counter: "Counter[float]", labels: Floats) -> None:
        if not self.is_much:
            values, counts = np.unique(labels, return_counts=True)
            counter.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
            self.is_much = len(counter) > _MOST_CLASSES

    def check(self, text: str) -> None:
        """Raise AnalysisError if nothing can be predicted."""
        if self._n_missing:
            raise AnalysisError(
                f"{text!r} has no value in {self._n_missing:,} rows, first in example {self._missing[0]}: leave them "
                "out with a filter, if they are null for example "
                f"with '{text} != null'"
            )
        for count, what in zip(self.n_rows.tolist(), ("fit", "choose the penalty by", "test on"), strict=True):
            if not count:
                n_examples = int(np.isfinite(self._by_example).sum())
                raise AnalysisError(
                    f"no rows are left to {what}: whole examples are held out, and the rows that are chosen belong to "
                    f"{n_examples:,}: use more examples, another seed, or another share for the test"
                )
        if not self.is_much and len(self.n_train) < 2:
            raise AnalysisError(
                f"{text!r} has one value only, {next(iter(self.n_train)):g}, in all rows to learn from: there is "
                "nothing to predict"
            )

    def classes(self, text: str) -> Floats:
        """Return all values, ascending."""
        if self.is_much:
            raise AnalysisError(
                f"{text!r} has more than {_MOST_CLASSES:,} different values: predict it as a number (regression), or "
                f"a condition on it, such as '{text} == 5'"
            )
        return np.array(sorted(self.n_train | self.n_test))

    def control(self) -> Control:
        if self._is_per_example:
            return Control.permuted(self._by_example, self._split.seed)
        return Control.drawn(self._sample[1], self._split.seed)

"""What a probe predicts: a number or a class for every row, selected by one line of text.

The text is one of

* ``token``, ``position`` or ``example`` of the row;
* a column of the example table: one value for all rows of an example, or a list with one value per token;
* a condition, such as ``position > 10 and label == "code"``: true or false.

Before any probe is fitted, `summarise` reads the target of all rows: which values there are, and how many rows have
them. It reads only the rows' columns and the example table.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from residua.analysis.probes.controls import TEST, Control, Split
from residua.analysis.rows.blocks import blocks
from residua.analysis.rows.columns import examples_of, positions_of, row_numbers
from residua.analysis.rows.held_out import held_out
from residua.store.base.errors import AnalysisError, DamagedArchiveError
from residua.store.read.archive import Archive
from residua.store.selection.row_filter import RowFilter

Task: TypeAlias = Literal["classification", "regression"]
Values: TypeAlias = npt.NDArray[Any]
Numbers: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]
Names: TypeAlias = tuple[str | bool, ...] | None

_ROW_COLUMNS = ("token", "position", "example")
_FEW = 16  # a target with at most this many different whole numbers is a classification


class Target(NamedTuple):
    """The values of a target.

    Attributes:
        values: Given row numbers, ascending and close together, returns their values, (rows,): int64, or float64 with
            NaN where there is no value.
        names: What these numbers stand for; None if they are the values themselves.
    """

    values: Callable[[Numbers], Values]
    names: Names


def read_target(archive: Archive, text: str) -> Target:
    """Return the target that `text` selects; see the module's head.

    Raises:
        AnalysisError: There is no such column, it has values that cannot be predicted, or the text cannot be read.
    """
    if text in _ROW_COLUMNS:
        return Target(partial(row_numbers, archive, text), None)
    if text in archive.example_table.column_types() or text in ("n_tokens", "n_rows"):
        return _column_target(archive, text)
    condition = _condition(archive, text)

    def holds(rows: Numbers) -> Values:
        first = int(rows[0])
        return condition.mask(archive, first, int(rows[-1]) + 1)[rows - first].astype(np.int64)

    return Target(holds, (False, True))


def _condition(archive: Archive, text: str) -> RowFilter:
    try:
        condition = RowFilter.parse(text)
    except AnalysisError as error:
        if text.replace("_", "a").isalnum():
            known = ", ".join([*_ROW_COLUMNS, *archive.example_table.column_types()])
            raise AnalysisError(
                f"there is no column {text!r} to predict: choose one of {known}, or a condition such as 'position > 10'"
            ) from None
        raise AnalysisError(f"the target {text!r} is neither a column nor a condition: {error}") from error
    condition.mask(archive, 0, 0)  # raises if a name does not exist
    return condition


def _column_target(archive: Archive, name: str) -> Target:
    column = archive.example_table.table([name])[name].combine_chunks()
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        of_examples, names = _numbers(name, column)
        return Target(lambda rows: np.asarray(of_examples[examples_of(archive, rows)]), names)
    found = pc.call_function("list_value_length", [column]).fill_null(0)
    lengths = found.to_numpy(zero_copy_only=False).astype(np.int64)
    n_tokens = archive.example_table.index().n_tokens
    wrong = np.flatnonzero(lengths != n_tokens)
    if wrong.size:
        raise AnalysisError(
            f"column {name!r} holds lists, which must have one value per token, but example {wrong[0]} has "
            f"{lengths[wrong[0]]:,} values and {n_tokens[wrong[0]]:,} tokens: choose another column"
        )
    of_tokens, names = _numbers(name, column.flatten())
    starts = np.cumsum(lengths) - lengths

    def by_token(rows: Numbers) -> Values:
        examples, positions = examples_of(archive, rows), positions_of(archive, rows)
        if (positions >= n_tokens[examples]).any():
            raise DamagedArchiveError(f"{archive.path}/rows/position has positions beyond the end of their example")
        return np.asarray(of_tokens[starts[examples] + positions])

    return Target(by_token, names)


def _numbers(name: str, column: Any) -> tuple[Values, Names]:
    """Return the values as numbers, and what the numbers stand for if the values are not numbers."""
    types = pa.types
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if types.is_boolean(column.type):
        return _with_gaps(column.cast(pa.int64())), (False, True)
    if types.is_string(column.type) or types.is_large_string(column.type):
        encoded = column.dictionary_encode()
        names = encoded.dictionary.to_pylist()
        ranks = pa.array(np.argsort(np.argsort(names)))  # classes are numbered by name, not by first occurrence
        return _with_gaps(ranks.take(encoded.indices)), tuple(sorted(names))
    if types.is_integer(column.type) or types.is_floating(column.type):
        return _with_gaps(column), None
    raise AnalysisError(
        f"column {name!r} holds {column.type}, but a probe predicts numbers, texts, true or false: choose another"
    )


def _with_gaps(column: Any) -> Values:
    if column.null_count or pa.types.is_floating(column.type):
        return np.asarray(column.cast(pa.float64()).fill_null(np.nan).to_numpy(zero_copy_only=False))
    return np.asarray(column.to_numpy(zero_copy_only=False)).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class TargetSummary:
    """What is known of a target before a probe is fitted.

    Attributes:
        task: What the probe does.
        classes: For a classification, the values of the target, ascending.
        names: The names of the classes.
        n_rows: Number of rows to fit, to choose the penalty by, and to test on.
        majority: Number of the class that most rows of the first two kinds have.
        control: Labels that say nothing about the rows.
    """

    task: Task
    classes: Floats
    names: list[Any]
    n_rows: tuple[int, int, int]
    majority: int
    control: Control


def summarise(
    archive: Archive,
    text: str,
    *,
    where: str | None,
    task: Task | None,
    split: Split,
    most_classes: int = 2048,
    sample_rows: int = 16_384,
) -> TargetSummary:
    """Read the target of all captured rows.

    Args:
        archive: The archive.
        text: The target; see the module's head.
        where: Use only these rows.
        task: What the probe does. None: classification of texts, of true and false, and of up to 16 different whole
            numbers; else regression.
        split: Which examples are held out.
        most_classes: Most classes of a classification.
        sample_rows: Labels, or up to twice as many, that a control draws from if labels differ within an example.

    Raises:
        AnalysisError: The target cannot be predicted because values are missing, all are equal, or there are too many
            classes; or no example is held out.
    """
    target = read_target(archive, text)
    selected = None if where is None else RowFilter.parse(where)
    labels = _Labels(archive, text, split, most_classes, sample_rows)
    for block in blocks(archive):
        rows = np.arange(*block)
        if selected is not None:
            rows = rows[selected.mask(archive, *block)]
        if len(rows):
            labels.add(rows, examples_of(archive, rows), target.values(rows))
    labels.check()
    if task is None:
        is_few = labels.is_whole and not labels.are_too_many and len(labels.n_train + labels.n_test) <= _FEW
        task = "classification" if target.names is not None or is_few else "regression"
    classes = labels.classes() if task == "classification" else np.zeros(0)
    fit, validation, test = labels.n_rows.tolist()
    values = [int(value) if labels.is_whole else value for value in classes.tolist()]
    return TargetSummary(
        task=task,
        classes=classes,
        names=values if target.names is None else [target.names[int(value)] for value in values],
        n_rows=(fit, validation, test),
        majority=int(np.argmax([labels.n_train[value] for value in classes.tolist()] or [0])),
        control=labels.control(),
    )


class _Labels:
    """What one pass over the labels collects."""

    def __init__(self, archive: Archive, text: str, split: Split, most_classes: int, sample_rows: int) -> None:
        self.n_rows = np.zeros(3, np.int64)
        self.n_train: Counter[float] = Counter()
        self.n_test: Counter[float] = Counter()
        self.are_too_many = False  # to be counted
        self.is_whole = True
        self._text = text
        self._split = split
        self._most_classes = most_classes
        self._sample_rows = sample_rows
        self._by_example: Floats = np.full(archive.example_table.index().n_examples, np.nan)
        self._is_per_example = True
        self._first_missing: int | None = None  # example
        self._n_missing = 0
        self._sample: tuple[Numbers, Floats] = np.zeros(0, np.int64), np.zeros(0)  # rows and their labels
        self._sampled_share = 1.0  # of all rows

    def add(self, rows: Numbers, examples: Numbers, values: Values) -> None:
        labels: Floats = values.astype(np.float64)
        missing = ~np.isfinite(labels)
        if missing.any():
            self._first_missing = int(examples[missing][0]) if self._first_missing is None else self._first_missing
            self._n_missing += int(missing.sum())
            return
        self.is_whole &= bool((labels == np.floor(labels)).all())
        subsets = self._split.subsets(examples)
        self.n_rows += np.bincount(subsets, minlength=3)
        self._count(self.n_train, labels[subsets != TEST])
        self._count(self.n_test, labels[subsets == TEST])
        self._add_to_sample(rows, labels)
        present, first = np.unique(examples, return_index=True)
        is_new = np.isnan(self._by_example[present])
        self._by_example[present[is_new]] = labels[first[is_new]]
        self._is_per_example &= bool((self._by_example[examples] == labels).all())

    def _add_to_sample(self, rows: Numbers, labels: Floats) -> None:
        """Keep the labels of rows that a hash selects, a smaller share of them the more rows there are."""
        rows = np.concatenate([self._sample[0], rows])
        labels = np.concatenate([self._sample[1], labels])
        while True:
            share = self._sampled_share
            is_kept = held_out(rows, fraction=share, seed=0) if share < 1 else np.ones(len(rows), np.bool_)
            if np.count_nonzero(is_kept) <= 2 * self._sample_rows:
                break
            self._sampled_share /= 2
        self._sample = rows[is_kept], labels[is_kept]

    def _count(self, counter: "Counter[float]", labels: Floats) -> None:
        if not self.are_too_many:
            values, counts = np.unique(labels, return_counts=True)
            counter.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
            self.are_too_many = len(counter) > self._most_classes

    def check(self) -> None:
        """Raise AnalysisError if nothing can be predicted."""
        if self._n_missing:
            raise AnalysisError(
                f"{self._text!r} has no value in {self._n_missing:,} rows, first in example {self._first_missing}: "
                f"leave them out with a filter, for example '{self._text} != null' if they are null"
            )
        for count, what in zip(self.n_rows.tolist(), ("fit", "choose the penalty by", "test on"), strict=True):
            if not count:
                n_examples = int(np.isfinite(self._by_example).sum())
                raise AnalysisError(
                    f"no rows are left to {what}: examples are held out with all their rows, and the selected rows "
                    f"belong to {n_examples:,} examples. Use more examples, another seed, or another test fraction."
                )
        if not self.are_too_many and len(self.n_train) < 2:
            raise AnalysisError(
                f"{self._text!r} has one value only, {next(iter(self.n_train)):g}, in all rows to learn from, so there "
                "is nothing to predict: choose another target, or another filter"
            )

    def classes(self) -> Floats:
        """Return all values, ascending."""
        if self.are_too_many:
            raise AnalysisError(
                f"{self._text!r} has more than {self._most_classes:,} different values: predict it as a number "
                f"(regression), or predict a condition on it, such as '{self._text} == 5'"
            )
        return np.array(sorted(self.n_train | self.n_test))

    def control(self) -> Control:
        if self._is_per_example:
            return Control.permuted(self._by_example, self._split.seed)
        return Control(self._sample[1], is_per_example=False, seed=self._split.seed)

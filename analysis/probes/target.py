"""What a probe predicts: a number or a class for every row, selected by one line of text.

The text is one of

* ``token``, ``position`` or ``example`` of the row; in an archive with images also its ``modality`` (a class), or
  ``image``, ``view``, ``patch_row`` or ``patch_column``, which only patches have;
* a column of the example table: one value for all rows of an example, or a list with one value per token;
* a condition, such as ``position > 10 and label == "code"``: true or false.

Before any probe is fitted, `summarise` reads the target of all rows: which values there are, and how many rows have
them. It reads only the rows' columns and the example table.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from residua.analysis.probes.controls import TEST, Control, Numbers, Split, Subsets, control_units
from residua.analysis.probes.pooling import Pool, last_rows
from residua.analysis.rows.blocks import blocks
from residua.analysis.rows.columns import examples_of, positions_of, row_numbers, token_numbers
from residua.analysis.rows.held_out import held_out
from residua.store.base.errors import AnalysisError, DamagedArchiveError, few
from residua.store.base.naming import named
from residua.store.examples.token_values import is_list, token_values
from residua.store.format.row_columns import IMAGE_COLUMNS, MODALITIES
from residua.store.read.archive import Archive
from residua.store.selection.evaluate import IS_LAST
from residua.store.selection.row_filter import RowFilter

Task: TypeAlias = Literal["classification", "regression"]
Values: TypeAlias = npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.float64]
Names: TypeAlias = tuple[str | bool | int, ...] | None

_MOST_EXACT = 2**53  # of whole numbers that a float64 can hold
_FEW = 16  # a target with at most this many different whole numbers is a classification


class Target(NamedTuple):
    """The values of a target.

    Attributes:
        values: Given row numbers, ascending and close together, returns their values, (rows,): int64, or float64 with
            NaN where there is no value.
        names: What these numbers stand for; None if they are the values themselves.
        no_sizes: Why the size of a number means nothing, so that nobody regresses it unknowingly; empty if it does.
        present: The condition under which there is a value.
        leaves_out: Whether rows without a value are left out; else they are an error.
    """

    values: Callable[[Numbers], Values]
    names: Names
    no_sizes: str = ""
    present: str = ""
    leaves_out: bool = False


@dataclass(frozen=True, eq=False)
class GivenTarget:
    """Values that the caller has, one for each example or row.

    Attributes:
        name: What results call it.
        values: The values.
        is_of_rows: Whether there is one for each row.
    """

    name: str
    values: pa.Array
    is_of_rows: bool

    @classmethod
    def of(cls, archive: Archive, values: Any) -> "GivenTarget":
        """Return an array, a list, or a series of pandas or polars as a target.

        Raises:
            AnalysisError: It has another length than the examples and the rows, or values that cannot be predicted.
        """
        name = str(getattr(values, "name", None) or "target")
        try:
            found = values.to_arrow() if hasattr(values, "to_arrow") else pa.array(values, from_pandas=True)
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise AnalysisError(f"the target is no list of plain values: {error}") from error
        found = found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found
        index = archive.example_table.index()
        if len(found) not in (index.n_examples, archive.n_rows):
            raise AnalysisError(
                f"the target has {len(found):,} values, and {archive.place} has {index.n_examples:,} examples and "
                f"{archive.n_rows:,} rows: give one for each example, or one for each row"
            )
        of_both = index.n_examples == archive.n_rows and not (index.n_rows == 1).all()
        if of_both:
            raise AnalysisError(
                f"{archive.place} has as many examples as rows, {archive.n_rows:,}, and whether the target is of "
                "examples is not clear: keep it as a column, with archive.annotate"
            )
        return cls(name, found, len(found) != index.n_examples)

    def target(self, archive: Archive) -> Target:
        """Return the values as numbers."""
        numbers = _numbers(self.name, self.values)
        if self.is_of_rows:
            return Target(lambda rows: np.asarray(numbers.values[rows]), *numbers[1:], leaves_out=True)
        of_examples = numbers.values
        return Target(lambda rows: np.asarray(of_examples[examples_of(archive, rows)]), *numbers[1:], leaves_out=True)


def read_target(archive: Archive, text: str | GivenTarget) -> Target:
    """Return the target that `text` selects; see the module's head.

    Raises:
        AnalysisError: There is no such column, it has values that cannot be predicted, or the text cannot be read.
    """
    if isinstance(text, GivenTarget):
        return text.target(archive)
    if text in archive.plan.row_columns:
        return _row_target(archive, text)
    if text in archive.example_table.column_types() or text in ("n_tokens", "n_rows"):
        return _column_target(archive, text)
    condition = _condition(archive, text)

    def holds(rows: Numbers) -> Values:
        first = int(rows[0])
        return condition.mask(archive, first, int(rows[-1]) + 1)[rows - first].astype(np.int64)

    return Target(holds, (False, True))


def _row_target(archive: Archive, name: str) -> Target:
    if name not in IMAGE_COLUMNS:
        return Target(partial(row_numbers, archive, name), None, "token ids" if name == "token" else "")

    def values(rows: Numbers) -> Values:
        found = row_numbers(archive, name, rows)
        if name == "modality":
            if len(found) and not 0 <= int(found.min()) <= int(found.max()) < len(MODALITIES):
                raise DamagedArchiveError(f"{archive.place}/rows/modality holds numbers that are no modality")
            return found
        return np.where(found < 0, np.nan, found)  # only patches have it

    return Target(values, MODALITIES) if name == "modality" else Target(values, None, present=f"{name} >= 0")


def _condition(archive: Archive, text: str) -> RowFilter:
    if text.replace("_", "a").isalnum() and text != IS_LAST:
        known = ", ".join([*archive.plan.row_columns, *archive.example_table.column_types()])
        raise AnalysisError(
            f"there is no column {text!r} to predict: choose one of {known}, or a condition such as 'position > 10'"
        )
    try:
        condition = RowFilter.parse(text)
    except AnalysisError as error:
        raise AnalysisError(f"the target {text!r} is neither a column nor a condition: {error}") from error
    condition.mask(archive, 0, 0)  # raises if a name does not exist
    return condition


def _column_target(archive: Archive, name: str) -> Target:
    table = archive.example_table
    column = table.table([name])[name]
    if not is_list(column.type):
        numbers = _numbers(name, column.combine_chunks())
        return Target(lambda rows: np.asarray(numbers.values[examples_of(archive, rows)]), *numbers[1:])
    values, starts = token_values(name, column, table.index().n_tokens)
    numbers = _numbers(name, values.combine_chunks())

    def by_token(rows: Numbers) -> Values:
        places = token_numbers(archive, starts, examples_of(archive, rows), positions_of(archive, rows))
        return np.asarray(numbers.values[places])

    return Target(by_token, *numbers[1:])


class _Numbers(NamedTuple):
    """The values of a column as numbers, and the other fields of a `Target`."""

    values: Values
    names: Names
    no_sizes: str
    present: str


def _numbers(name: str, column: Any) -> _Numbers:
    """Return the values as numbers, and what the numbers stand for if the values are not numbers."""
    types = pa.types
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    word = name if name.isidentifier() else f"`{name}`"
    present = f"{word} != null"
    if types.is_boolean(column.type):
        return _Numbers(_with_gaps(column.cast(pa.int64())), (False, True), "", present)
    is_text = types.is_string(column.type) or types.is_large_string(column.type)
    if is_text or (types.is_integer(column.type) and _is_huge(column)):
        encoded = column.dictionary_encode()
        names = encoded.dictionary.to_pylist()
        ranks = pa.array(np.argsort(np.argsort(np.array(names, object))))  # numbered by name, not by first occurrence
        why = "texts" if is_text else "whole numbers beyond 2**53, which float64 cannot tell apart"
        return _Numbers(_with_gaps(ranks.take(encoded.indices)), tuple(sorted(names)), why, present)
    if types.is_floating(column.type) and bool(pc.call_function("any", [pc.call_function("is_nan", [column])]).as_py()):
        present = f"{word} > -1e308 and {word} < 1e308"  # neither NaN nor null is less or more than anything
    if types.is_integer(column.type) or types.is_floating(column.type):
        return _Numbers(_with_gaps(column), None, "", present)
    raise AnalysisError(
        f"column {name!r} holds {column.type}, but a probe predicts numbers, texts, true or false: choose another"
    )


def _is_huge(column: Any) -> bool:
    bounds = pc.call_function("min_max", [column]).as_py()
    return any(abs(bound) > _MOST_EXACT for bound in bounds.values() if bound is not None)


def _with_gaps(column: Any) -> Values:
    if column.null_count or pa.types.is_floating(column.type):
        return np.asarray(column.cast(pa.float64()).fill_null(np.nan).to_numpy(zero_copy_only=False))
    return np.asarray(column.to_numpy(zero_copy_only=False)).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class TargetSummary:
    """What is known of a target before a probe is fitted.

    Attributes:
        text: The target.
        task: What the probe does.
        classes: For a classification, the values of the target, ascending.
        names: The names of the classes.
        n_rows: Number of rows to fit, to choose the penalty by, and to test on.
        subsets: Which of the three each example is for, (examples,).
        control: Labels that say nothing about the rows.
    """

    text: str
    task: Task
    classes: Floats
    names: list[Any]
    n_rows: tuple[int, int, int]
    subsets: Subsets
    control: Control

    def names_of(self, chosen: npt.NDArray[np.bool_]) -> list[str]:
        """Return the names of the classes that are true in `chosen`, as texts."""
        return [str(name) for name, is_chosen in zip(self.names, chosen.tolist(), strict=True) if is_chosen]

    def check_classes(self, n_learned: Numbers, n_tested: Numbers, where: str = "") -> None:
        """Raise AnalysisError if fewer than two classes have rows to learn from, or rows to test on.

        Args:
            n_learned: Rows of each class to learn from.
            n_tested: Rows of each class to test on.
            where: What the message adds to "the rows".
        """
        for counts, what in ((n_learned, "learn from"), (n_tested, "test on")):
            present = self.names_of(counts > 0)
            if len(present) < 2:
                lacking = few([repr(name) for name in self.names_of(counts == 0)])
                raise AnalysisError(
                    f"the rows{where} to {what} hold no {self.text!r} but {', '.join(map(repr, present)) or 'none'}: "
                    f"{lacking} have no row there, and a score of one class says nothing. Documents and equal contents "
                    "are held out as a whole, so each class needs two of them or more: add some, leave the class out "
                    "with a filter, or try another seed or test fraction"
                )


def summarise(
    archive: Archive,
    wanted: str | GivenTarget,
    *,
    where: str | None,
    task: Task | None,
    split: Split,
    pool: Pool | None = None,
    as_numbers: bool = False,
    most_classes: int = 2048,
    sample_rows: int = 16_384,
) -> TargetSummary:
    """Read the target of all captured rows.

    Args:
        archive: The archive.
        wanted: The target; see the module's head.
        where: Use only these rows.
        task: What the probe does. None: classification of texts, of token ids, of true and false, and of up to 16
            different whole numbers; else regression.
        split: Which examples are held out.
        pool: How the rows of an example become one; its target is that of its last row.
        as_numbers: Regress token ids, and texts by their alphabetical rank.
        most_classes: Most classes of a classification.
        sample_rows: Labels, or up to twice as many, that a control draws from if labels differ within an example.

    Raises:
        AnalysisError: The target cannot be predicted because values are missing, all are equal, there are too many
            classes, or their numbers have no size; or no example is held out.
    """
    target, text = read_target(archive, wanted), wanted if isinstance(wanted, str) else wanted.name
    labels = _Labels(archive, text, target, most_classes, sample_rows)
    for rows, values in _labelled(archive, target, where, pool):
        labels.add(rows, examples_of(archive, rows), values)
    labels.check()
    if pool in ("mean", "max"):
        _refuse_several(archive, text, labels.by_example, _labelled(archive, target, where, None), pool)
    task = _task(labels, target, task, as_numbers=as_numbers)
    classes = labels.classes() if task == "classification" else np.zeros(0)
    values_of = [int(value) if labels.is_whole else value for value in classes.tolist()]
    groups = split.groups(archive)
    by_class = np.searchsorted(classes, labels.by_example) if len(classes) and labels.is_per_example else None
    subsets = split.subsets(groups, np.flatnonzero(np.isfinite(labels.by_example)), by_class)
    n_rows, n_by_class = np.zeros(3, np.int64), np.zeros((2, len(classes)), np.int64)
    for rows, values in _labelled(archive, target, where, pool):
        of_rows = subsets[examples_of(archive, rows)]
        n_rows += np.bincount(of_rows, minlength=3)
        if len(classes):
            codes = np.searchsorted(classes, values.astype(np.float64))
            for subset, chosen in enumerate((codes[of_rows != TEST], codes[of_rows == TEST])):
                n_by_class[subset] += np.bincount(chosen, minlength=len(classes))
    _check_subsets(n_rows, labels.by_example, groups)
    summary = TargetSummary(
        text=text,
        task=task,
        classes=classes,
        names=values_of if target.names is None else [target.names[int(value)] for value in values_of],
        n_rows=(int(n_rows[0]), int(n_rows[1]), int(n_rows[2])),
        subsets=subsets,
        control=labels.control(split.seed, control_units(archive, split, groups), subsets),
    )
    if len(classes):
        summary.check_classes(n_by_class[0], n_by_class[1])
    return summary


def _labelled(
    archive: Archive, target: Target, where: str | None, pool: Pool | None
) -> Iterator[tuple[Numbers, Values]]:
    """Yield the chosen rows in order, of pooled ones the last of each example, and their values."""
    selected = None if where is None else RowFilter.parse(where)
    last = None if pool is None else last_rows(archive, selected)
    for block in blocks(archive):
        rows = np.arange(*block)
        if last is not None:
            rows = last[slice(*np.searchsorted(last, block).tolist())]
        elif selected is not None:
            rows = rows[selected.mask(archive, *block)]
        if len(rows):
            values = target.values(rows)
            is_there = np.isfinite(values) if target.leaves_out else np.ones(len(rows), np.bool_)
            if is_there.any():
                yield rows[is_there], values[is_there]


def _refuse_several(
    archive: Archive, text: str, by_example: Floats, found: Iterator[tuple[Numbers, Values]], pool: Pool
) -> None:
    """Raise AnalysisError if rows of an example that are pooled have different values."""
    for rows, values in found:
        examples = examples_of(archive, rows)
        if (other := by_example[examples] != values).any():
            raise AnalysisError(
                f"{text!r} has several values in example {int(examples[other][0])}, and the rows of an example are "
                f"pooled to one ({named('pool', pool)}): choose a target of examples, or take the last row "
                f"({named('pool', 'last')})"
            )


def _task(labels: "_Labels", target: Target, task: Task | None, *, as_numbers: bool) -> Task:
    """Return what the probe does; see `summarise`."""
    if task is None:
        is_few = labels.is_whole and not labels.are_too_many and len(labels.counts) <= _FEW
        is_class = target.names is not None or bool(target.no_sizes) or is_few
        task = "classification" if is_class and not as_numbers else "regression"
    if task == "regression" and target.no_sizes:
        is_inexact = target.names is not None and isinstance(target.names[0], int) and target.names != (False, True)
        if is_inexact or not as_numbers:
            way = "" if is_inexact else f", or say that their order has a meaning ({named('as_numbers', True)})"
            raise AnalysisError(
                f"{labels.text!r} holds {target.no_sizes}, so a regression on their size says nothing: predict classes "
                f"({named('task', 'classification')}), or a condition on it{way}"
            )
    return task


def _check_subsets(n_rows: Numbers, by_example: Floats, groups: Numbers) -> None:
    for count, what in zip(n_rows.tolist(), ("fit", "choose the penalty by", "test on"), strict=True):
        if not count:
            present = np.flatnonzero(np.isfinite(by_example))
            n_groups = len(np.unique(groups[present]))
            raise AnalysisError(
                f"no rows are left to {what}: documents and equal contents are held out as a whole, and the selected "
                f"rows belong to {len(present):,} examples of {n_groups:,} different documents; a class needs two of "
                "them or more. Use more documents, another seed, or another test fraction; or say what belongs "
                f"together, such as {named('group', 'source_index')} (documents, even if they are equal)"
            )


class _Labels:
    """What one pass over the labels collects.

    Attributes:
        text: The target.
        counts: Number of rows of each value, until there are too many values.
        are_too_many: Whether there are too many values to be classes.
        is_whole: Whether all values are whole numbers.
        by_example: The value of the first row of each example, NaN if it has no row.
        is_per_example: Whether all rows of each example have the same value.
    """

    def __init__(self, archive: Archive, text: str, target: Target, most_classes: int, sample_rows: int) -> None:
        self.text = text
        self.counts: Counter[float] = Counter()
        self.are_too_many = False
        self.is_whole = True
        self.by_example: Floats = np.full(archive.example_table.index().n_examples, np.nan)
        self.is_per_example = True
        self._target = target
        self._most_classes = most_classes
        self._sample_rows = sample_rows
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
        if not self.are_too_many:
            found, counts = np.unique(labels, return_counts=True)
            self.counts.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))
            self.are_too_many = len(self.counts) > self._most_classes
        self._add_to_sample(rows, labels)
        present, first = np.unique(examples, return_index=True)
        is_new = np.isnan(self.by_example[present])
        self.by_example[present[is_new]] = labels[first[is_new]]
        self.is_per_example &= bool((self.by_example[examples] == labels).all())

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

    def check(self) -> None:
        """Raise AnalysisError if nothing can be predicted."""
        if self._n_missing:
            raise AnalysisError(
                f"{self.text!r} has no value, or NaN or an infinity, in {self._n_missing:,} rows, first in example "
                f"{self._first_missing}: leave them out with the filter '{self._target.present}'"
            )
        if not self.counts:
            raise AnalysisError(f"no rows are selected, so {self.text!r} cannot be predicted: choose another filter")
        if len(self.counts) < 2 and not self.are_too_many:
            (value,) = self.counts
            name = f"{value:g}" if self._target.names is None else repr(self._target.names[int(value)])
            raise AnalysisError(
                f"{self.text!r} has one value only, {name}, in all rows, so there is nothing to predict: choose "
                "another target, or another filter"
            )

    def classes(self) -> Floats:
        """Return all values, ascending."""
        if self.are_too_many:
            way = f"predict a condition on it, such as '{self.text} == 5'"
            if not self._target.no_sizes:
                way = f"predict it as a number ({named('task', 'regression')}), or {way}"
            raise AnalysisError(f"{self.text!r} has more than {self._most_classes:,} different values: {way}")
        return np.array(sorted(self.counts))

    def control(self, seed: int, units: Numbers, subsets: Subsets) -> Control:
        if self.is_per_example:
            return Control.permuted(self.by_example, units, subsets, seed)
        return Control(self._sample[1], is_per_example=False, seed=seed)

"""Passes over the labelled rows of one site: what each pass sums over a leaf, and how the sums come together.

A pass is a sum over the leaves of the site's rows (`residua.analysis.support.cluster.Cluster.sum`). Workers keep the
rows that they have read for the next pass, standardised once the mean and the variance are known.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from residua.analysis.probes.controls import FIT, TEST, VALIDATION
from residua.analysis.probes.logistic import (
    SAMPLE_ROWS,
    Codes,
    Fitted,
    LossSums,
    Problem,
    Products,
    log_losses,
    loss_sums,
    probabilities,
)
from residua.analysis.probes.ridge import Line
from residua.analysis.probes.rows import LabelledRows, SiteRows, labelled_rows
from residua.analysis.support.cluster import Cluster
from residua.analysis.support.moments import Moments
from residua.analysis.support.sums import FieldSums

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]
Sums = TypeVar("Sums")

_MOST_LOGITS = 2**23  # in memory at a time
_SAMPLE_LEAVES = 16  # that the sample of a basis is spread over


class Scale(NamedTuple):
    """Mean and standard deviation of the channels of the training rows, (width,) each."""

    mean: Floats
    scale: Floats


@dataclass
class RowCounts(FieldSums):
    """What one pass over all rows counts.

    Attributes:
        train: Mean and variance of the training rows.
        n_rows: Rows to fit, to choose the penalty by, and to test on, (3,).
        n_left_out: Rows with a NaN or an infinity.
        n_fitted: Rows to fit of each class, by the true labels, (classes,).
        n_learned: Training rows of each class, by the true labels and by the control's, (2, classes).
        n_tested: Held-out rows of each class, likewise.
    """

    train: Moments
    n_rows: Numbers
    n_left_out: int
    n_fitted: Numbers
    n_learned: Numbers
    n_tested: Numbers


@dataclass
class Tested(FieldSums):
    """How a probe and its control do on held-out rows.

    Attributes:
        n_rows: Rows of each class, by the true labels and by the control's, (2, classes).
        n_found: Those of them that are recognised, (2, classes).
        scores: With two classes, the probe's probability of the second one, of each row; rows in order.
        truth: And whether the row is of the second class.
    """

    n_rows: Numbers
    n_found: Numbers
    scores: list[Floats]
    truth: list[npt.NDArray[np.bool_]]


@dataclass
class SplitMoments(FieldSums):
    """Moments of rows to fit and of rows to choose the penalty by, to which their labels were appended.

    Attributes:
        fit: Those of the rows to fit, (width + 2) channels.
        validation: Those of the others.
        n_left_out: Rows with a NaN or an infinity.
        n_test: Held-out rows.
    """

    fit: Moments
    validation: Moments
    n_left_out: int
    n_test: int


@dataclass
class Errors(FieldSums):
    """Squared errors on held-out rows, (2,) for the labels and the control's, and the moments of both labels."""

    squares: Floats
    labels: Moments


class Passes:
    """Makes the passes over the rows of one site.

    Args:
        cluster: Where to compute.
        rows: The rows.
        number: Of the site, so that sites of few leaves go to different workers.
        advance: Called with shares of a pass.
    """

    def __init__(self, cluster: Cluster, rows: SiteRows, *, number: int, advance: Callable[[float], object]) -> None:
        self.rows = rows
        self._cluster, self._number, self._advance = cluster, number, advance
        self._sent = cluster.send(rows)
        self._scale: Any = None

    def standardise(self, scale: Scale) -> None:
        """Standardise the rows by `scale` in the passes that follow."""
        self._scale = self._cluster.send(scale)

    def counts(self) -> RowCounts:
        """Count the rows."""
        return self._sum(_counts, [], RowCounts.merge)

    def products(self, directions: Floats | None) -> Products:
        """Return the products of a sample of the training rows that is spread over the site; see `Products.zero`."""
        leaves = np.unique(np.linspace(0, len(self.rows.leaves) - 1, _SAMPLE_LEAVES).astype(np.int64)).tolist()
        wanted = SAMPLE_ROWS * self.rows.width * len(self.rows.leaves) / len(leaves)
        step = max(1, int(sum(self.rows.summary.n_rows[:TEST]) / wanted))
        width = self.rows.width
        term_bytes = 8 * width * (width if directions is None else directions.shape[1])
        asked = self._cluster.send(directions)
        return self._sum(
            _products, [self._scale, leaves, step, asked], Products.merge, n=len(leaves), term_bytes=term_bytes
        )

    def losses(self, subsets: Sequence[int], problems: Sequence[Problem], weights: Floats) -> LossSums:
        """Return losses and gradients of `problems` at `weights` over the rows of `subsets`."""
        asked = self._cluster.send((tuple(subsets), tuple(problems), weights))
        return self._sum(_losses, [self._scale, asked], LossSums.merge, term_bytes=weights.nbytes)

    def validation_losses(self, tried: Sequence[Fitted], classes: npt.NDArray[np.bool_]) -> Floats:
        """Return the sum of the losses of each probe over the rows of `classes` to choose the penalty by."""
        return self._sum(_validation_losses, [self._scale, self._cluster.send((tuple(tried), classes))], np.add)

    def tested(self, probe: Fitted, control: Fitted) -> Tested:
        """Test a probe and its control on the held-out rows."""
        return self._sum(_tested, [self._scale, self._cluster.send((probe, control))], Tested.merge)

    def moments(self) -> SplitMoments:
        """Return the moments of the training rows and their labels."""
        return self._sum(_moments, [], SplitMoments.merge, term_bytes=16 * (self.rows.width + 2) ** 2)

    def errors(self, probe: Line, control: Line) -> Errors:
        """Return the errors of a probe and its control on the held-out rows."""
        return self._sum(_errors, [(probe, control)], Errors.merge)

    def _sum(
        self,
        term: Callable[..., Sums],
        arguments: Sequence[Any],
        merge: Callable[[Sums, Sums], Sums],
        *,
        n: int | None = None,
        term_bytes: int = 0,
    ) -> Sums:
        return self._cluster.sum(
            term,
            [self._sent, *arguments],
            len(self.rows.leaves) if n is None else n,
            merge=merge,
            label=f"probe of {self.rows.summary.text} on {self.rows.site}",
            term_bytes=term_bytes,
            first_worker=self._number,
            bar=self._advance,
        )


def _codes(rows: SiteRows, labels: Floats) -> Codes:
    return np.searchsorted(rows.summary.classes, labels)


def _standardised(rows: SiteRows, scale: Scale, leaf: int) -> list[LabelledRows]:
    pieces = labelled_rows(rows, leaf)
    for piece in pieces:
        piece.standardise_(*scale)
    return pieces


def _heights(n_rows: int, n_logits: int) -> list[slice]:
    """Divide rows so that their logits fit into memory."""
    height = max(1, _MOST_LOGITS // n_logits)
    return [slice(start, start + height) for start in range(0, n_rows, height)]


def _counts(rows: SiteRows, leaf: int) -> RowCounts:
    n_classes = len(rows.summary.classes)
    learned, tested = np.zeros((2, n_classes), np.int64), np.zeros((2, n_classes), np.int64)
    fitted = np.zeros(n_classes, np.int64)
    found = RowCounts(Moments(rows.width, full=False), np.zeros(3, np.int64), 0, fitted, learned, tested)
    for piece in labelled_rows(rows, leaf):
        found.n_rows += np.bincount(piece.subsets, minlength=3)
        found.n_left_out += piece.n_left_out
        found.train.add(piece.of(FIT, VALIDATION)[0])
        codes, is_test = _codes(rows, piece.labels), piece.subsets == TEST
        found.n_fitted += np.bincount(codes[piece.subsets == FIT, 0], minlength=n_classes)
        for counts, chosen in ((learned, codes[~is_test]), (tested, codes[is_test])):
            for labelling in (0, 1):
                counts[labelling] += np.bincount(chosen[:, labelling], minlength=n_classes)
    return found


def _products(
    rows: SiteRows, scale: Scale, leaves: Sequence[int], step: int, directions: Floats | None, number: int
) -> Products:
    found = Products.zero(rows.width, directions)
    for piece in _standardised(rows, scale, leaves[number]):
        found.add(piece.of(FIT, VALIDATION)[0][::step], directions)
    return found


def _losses(
    rows: SiteRows, scale: Scale, asked: tuple[Sequence[int], Sequence[Problem], Floats], leaf: int
) -> LossSums:
    subsets, problems, weights = asked
    found = LossSums.zero(len(problems), weights.shape)
    for piece in _standardised(rows, scale, leaf):
        values, labels = piece.of(*subsets)
        codes = _codes(rows, labels)
        for part in _heights(len(values), weights.shape[1]):
            found.merge(loss_sums(values[part], codes[part], problems, weights))
    return found


def _validation_losses(
    rows: SiteRows, scale: Scale, asked: tuple[Sequence[Fitted], npt.NDArray[np.bool_]], leaf: int
) -> Floats:
    tried, classes = asked
    found = np.zeros(len(tried))
    for piece in _standardised(rows, scale, leaf):
        values, labels = piece.of(VALIDATION)
        codes = _codes(rows, labels)[:, 0]
        if not (is_wanted := classes[codes]).all():
            values, codes = values[is_wanted], codes[is_wanted]
        for part in _heights(len(values), len(rows.summary.classes)):
            found += [log_losses(_logits(one, values[part], scale), codes[part]).sum() for one in tried]
    return found


def _tested(rows: SiteRows, scale: Scale, probes: tuple[Fitted, Fitted], leaf: int) -> Tested:
    n_classes = len(rows.summary.classes)
    found = Tested(np.zeros((2, n_classes), np.int64), np.zeros((2, n_classes), np.int64), [], [])
    for piece in _standardised(rows, scale, leaf):
        values, labels = piece.of(TEST)
        codes = _codes(rows, labels)
        for part in _heights(len(values), n_classes):
            for labelling, probe in enumerate(probes):
                chances = probabilities(_logits(probe, values[part], scale))
                truth = codes[part, labelling]
                right = truth[chances.argmax(axis=1) == truth]
                found.n_rows[labelling] += np.bincount(truth, minlength=n_classes)
                found.n_found[labelling] += np.bincount(right, minlength=n_classes)
                if n_classes == 2 and labelling == 0:
                    found.scores.append(chances[:, 1])
                    found.truth.append(truth == 1)
    return found


def _logits(probe: Fitted, values: npt.NDArray[np.floating], scale: Scale) -> npt.NDArray[np.floating]:
    """Return the logits of standardised rows, (rows, vectors), in their own dtype."""
    weight, bias = probe.weight * scale.scale, probe.bias + probe.weight @ scale.mean
    return np.asarray(values @ weight.T.astype(values.dtype) + bias.astype(values.dtype))


def _moments(rows: SiteRows, leaf: int) -> SplitMoments:
    found = SplitMoments(Moments(rows.width + 2), Moments(rows.width + 2), 0, 0)
    for piece in labelled_rows(rows, leaf):
        found.n_left_out += piece.n_left_out
        found.n_test += int(np.count_nonzero(piece.subsets == TEST))
        for sums, subset in ((found.fit, FIT), (found.validation, VALIDATION)):
            sums.add(np.column_stack(piece.of(subset)))
    return found


def _errors(rows: SiteRows, lines: tuple[Line, Line], leaf: int) -> Errors:
    found = Errors(np.zeros(2), Moments(2, full=False))
    for piece in labelled_rows(rows, leaf):
        values, labels = piece.of(TEST)
        found.labels.add(labels)
        weights = np.column_stack([line.weight for line in lines])
        guesses = values.astype(np.float64) @ weights + [line.bias for line in lines]
        found.squares += ((guesses - labels) ** 2).sum(axis=0)
    return found

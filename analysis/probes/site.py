"""The probe of one site: choose the penalty, fit, and test, all by passes over the site's rows."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score

from residua.analysis.probes.controls import FIT, TEST, VALIDATION
from residua.analysis.probes.files import SavedProbe
from residua.analysis.probes.logistic import (
    Basis,
    Fitted,
    Problem,
    best_constant,
    fit_logistic,
    has_many_rows,
    scale_of,
)
from residua.analysis.probes.passes import Passes, Scale, Tested
from residua.analysis.probes.progress import Loss
from residua.analysis.probes.ridge import mean_squared_error, solve
from residua.analysis.probes.rows import SiteRows
from residua.store.base.errors import AnalysisError
from residua.store.base.naming import named
from residua.store.format.site_names import parse_site

Numbers = npt.NDArray[np.int64]

LOGISTIC_PENALTIES = tuple(10.0**power for power in range(-5, 2))
RIDGE_PENALTIES = tuple(10.0**power for power in range(-7, 3))
_ROUGH, _FINE = 1e-5, 1e-7  # nats above the minimum: to choose the penalty by, and of the final probe
_CONTROL = 1e-4  # of the control, which is scored and not kept: meaningless labels of many rows take the most passes
_MOST_NUMBERS = 2**22  # weights of the penalties that share passes; of more classes, one penalty starts from the last
_VECTORS = 40  # float64 vectors of a problem that half of the memory must hold: what scipy's L-BFGS takes
_COVARIANCES = 12  # width² float64 arrays that fit into a worker beside the rows that it keeps, half of its memory
_REGRESSION_COVARIANCES = 12  # of two subsets, of leaves that wait for their neighbours, and for a copy


class SiteProbe(NamedTuple):
    """What is found at a site: a line of the table, and the probe."""

    line: dict[str, Any]
    probe: SavedProbe


def check_memory(rows: SiteRows) -> None:
    """Raise AnalysisError if a worker has not the memory for the sums of this site."""
    n_classes, width, memory = len(rows.summary.classes), rows.width, rows.memory
    if rows.summary.task == "regression":
        needed = _REGRESSION_COVARIANCES * 8 * width**2
        if needed > memory:
            raise AnalysisError(
                f"{rows.site} is {width:,} wide: a regression on it needs {needed / 2**30:.1f} GiB, but a worker has "
                f"{memory / 2**30:.1f} GiB: allow more ({named('memory_limit')}), or choose other sites"
            )
        return
    needed = 2 * _VECTORS * 8 * n_classes * (width + 1)  # of the probe and its control
    if needed > memory // 2:
        raise AnalysisError(
            f"{n_classes:,} classes on {rows.site}, {width:,} wide, need {needed / 2**30:.1f} GiB, but a worker has "
            f"only {memory / 2**31:.1f} GiB for them: allow more ({named('memory_limit')}), or probe a condition "
            "instead"
        )


def fits_one_worker(rows: SiteRows) -> bool:
    """Return whether one worker has the memory to fit the probe of this site by itself, with all its rows kept."""
    width, n_classes = rows.width, len(rows.summary.classes)
    if rows.summary.task == "regression":
        needed = _REGRESSION_COVARIANCES * 8 * width**2
    else:
        n_numbers = max(
            2 * n_classes * (width + 1), min(_MOST_NUMBERS, len(LOGISTIC_PENALTIES) * n_classes * (width + 1))
        )
        needed = _VECTORS * 8 * n_numbers + (_COVARIANCES // 2 * 8 * width**2 if _has_many_rows(rows) else 0)
    return rows.bytes_to_keep <= rows.most_kept and rows.bytes_to_keep + needed <= rows.memory * 3 // 4


def _has_many_rows(rows: SiteRows) -> bool:
    """Return whether all eigenvectors pay off, and a worker has the memory to find them."""
    n_vectors = Problem(0, len(rows.summary.classes), 0.0).n_vectors
    pays_off = has_many_rows(sum(rows.summary.n_rows[:TEST]), rows.width, n_vectors)
    return pays_off and _COVARIANCES * 8 * rows.width**2 <= rows.memory


def probe_site(passes: Passes, bar: Loss) -> SiteProbe:
    """Choose the penalty, fit true and control labels to all training rows, and test on held-out examples.

    Raises:
        AnalysisError: A subset has no finite rows.
    """
    return (_classify if passes.rows.summary.task == "classification" else _regress)(passes, bar)


def _classify(passes: Passes, bar: Loss) -> SiteProbe:
    rows, summary = passes.rows, passes.rows.summary
    n_classes = len(summary.classes)
    counts = passes.counts()
    _check_rows(rows, counts.n_rows.tolist())
    summary.check_classes(counts.n_learned[0], counts.n_tested[0], f" on {rows.site}")
    scale = Scale(counts.train.mean, scale_of(counts.train))
    passes.standardise(scale)
    basis = Basis.of(counts.train, passes.products, is_whole=_has_many_rows(rows))
    tried = _candidates(passes, bar, basis, best_constant(counts.n_fitted, rows.width))
    is_fitted = counts.n_fitted > 0
    if not (counts.n_learned[0] - counts.n_fitted)[is_fitted].any():
        is_fitted[:] = True  # no rows are left to choose the penalty by
    best = int(np.argmin(passes.validation_losses(tried, is_fitted)))
    penalty = LOGISTIC_PENALTIES[best]
    probe, control = fit_logistic(
        lambda problems, weights: passes.losses((FIT, VALIDATION), problems, weights),
        [Problem(labelling, n_classes, penalty) for labelling in (0, 1)],
        basis,
        tolerance=(_FINE, _CONTROL),
        starts={0: tried[best], 1: best_constant(counts.n_learned[1], rows.width)},
        on_pass=bar.loss,
    )
    tested = passes.tested(probe, control)
    most_common = int(counts.n_learned[0].argmax())
    n_tested = tested.n_rows[0]
    scores = {
        "accuracy": float(tested.n_found[0].sum() / n_tested.sum()),
        "balanced_accuracy": _balanced(tested, 0),
        "auc": _auc(tested) if n_classes == 2 else None,
        "majority_accuracy": float(n_tested[most_common] / n_tested.sum()),
        "majority_balanced_accuracy": float((n_tested[most_common] > 0) / np.count_nonzero(n_tested)),
        "control_accuracy": float(tested.n_found[1].sum() / tested.n_rows[1].sum()),
        "control_balanced_accuracy": _balanced(tested, 1),
        "control_majority_accuracy": float(tested.n_rows[1][counts.n_learned[1].argmax()] / tested.n_rows[1].sum()),
        "n_classes": n_classes,
        "not_learned": summary.names_of(counts.n_learned[0] == 0),
        "not_tested": summary.names_of(counts.n_tested[0] == 0),
        "converged": probe.is_converged and control.is_converged,
    }
    saved = SavedProbe(
        probe.weight, probe.bias, penalty, summary.names, {"site": rows.site, "target": rows.summary.text}
    )
    return _site_probe(rows, (counts.train.n, int(n_tested.sum())), counts.n_left_out, scores, saved)


def _candidates(passes: Passes, bar: Loss, basis: Basis, start: Fitted) -> list[Fitted]:
    """Fit all penalties, from `start`: many rows in the same passes, as far as the memory allows.

    Of few rows, and of what does not go into the same passes, the largest penalty is fitted first and each next one
    starts from the one before: up to twice as many passes, with less than half of the work.
    """
    n_classes = len(passes.rows.summary.classes)
    grid = [Problem(0, n_classes, penalty) for penalty in LOGISTIC_PENALTIES]
    n_numbers = grid[0].n_vectors * (passes.rows.width + 1)
    n_together = max(1, _MOST_NUMBERS // n_numbers) if _has_many_rows(passes.rows) else 1
    found: dict[int, Fitted] = {}
    for stop in range(len(grid), 0, -n_together):
        first = max(0, stop - n_together)
        fitted = fit_logistic(
            lambda problems, weights: passes.losses((FIT,), problems, weights),
            grid[first:stop],
            basis,
            tolerance=_ROUGH,
            starts=dict.fromkeys(range(stop - first), found.get(stop, start)),
            on_pass=bar.loss,
        )
        found.update(zip(range(first, stop), fitted, strict=True))
    return [found[number] for number in range(len(grid))]


def _check_rows(rows: SiteRows, n_rows: Sequence[int]) -> None:
    if not all(n_rows):
        raise AnalysisError(f"{rows.site} has too few finite rows: leave this site out")


def _auc(tested: Tested) -> float | None:
    truth = np.concatenate(tested.truth)
    return float(roc_auc_score(truth, np.concatenate(tested.scores))) if len(np.unique(truth)) == 2 else None


def _balanced(tested: Tested, labelling: int) -> float:
    """Return the mean over classes of the share of their rows that are recognised."""
    n_rows, n_found = tested.n_rows[labelling], tested.n_found[labelling]
    return float((n_found[n_rows > 0] / n_rows[n_rows > 0]).mean())


def _regress(passes: Passes, _: Loss) -> SiteProbe:
    rows, width = passes.rows, passes.rows.width
    found = passes.moments()
    _check_rows(rows, [found.fit.n, found.validation.n, found.n_test])
    tried = solve(found.fit, width, 0, RIDGE_PENALTIES)
    penalty = RIDGE_PENALTIES[int(np.argmin([mean_squared_error(one, found.validation, 0) for one in tried]))]
    train = found.fit.merge(found.validation)
    probe, control = (solve(train, width, column, [penalty])[0] for column in (0, 1))
    errors = passes.errors(probe, control)
    squares, variances = errors.squares / errors.labels.n, errors.labels.variance
    baselines = variances + (errors.labels.mean - train.mean[width:]) ** 2
    scores = {
        "r2": _explained(squares[0], variances[0]),
        "rmse": float(squares[0]) ** 0.5,
        "baseline_r2": _explained(baselines[0], variances[0]),
        "baseline_rmse": float(baselines[0]) ** 0.5,
        "control_r2": _explained(squares[1], variances[1]),
        "control_baseline_r2": _explained(baselines[1], variances[1]),
    }
    about = {"site": rows.site, "target": rows.summary.text}
    saved = SavedProbe(probe.weight[None], np.array([probe.bias]), penalty, None, about)
    return _site_probe(rows, (train.n, found.n_test), found.n_left_out, scores, saved)


def _explained(error: float, variance: float) -> float | None:
    """Return the share of the variance that is explained, or None if there is no variance."""
    return 1 - float(error) / float(variance) if variance > 0 else None


def _site_probe(
    rows: SiteRows, n_rows: tuple[int, int], n_left_out: int, scores: dict[str, Any], probe: SavedProbe
) -> SiteProbe:
    line = {
        "site": rows.site,
        "layer": parse_site(rows.site).layer,
        "target": rows.summary.text,
        "n_train": n_rows[0],
        "n_test": n_rows[1],
        "n_left_out": n_left_out,
        "penalty": probe.penalty,
        **scores,
    }
    return SiteProbe(line, probe)

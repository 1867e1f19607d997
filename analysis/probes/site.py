"""The probe of one site: choose the penalty, fit, and test; one task of `residua.analysis.probes.probe`."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score

from residua.analysis.probes.controls import FIT, TEST, VALIDATION
from residua.analysis.probes.files import SavedProbe
from residua.analysis.probes.logistic import Basis, Fitted, Problem, fit_logistic, log_losses, probabilities
from residua.analysis.probes.ridge import mean_squared_error, solve
from residua.analysis.probes.rows import Job, ProbeRows
from residua.analysis.support.moments import Moments
from residua.store.base.errors import AnalysisError
from residua.store.base.naming import named
from residua.store.format.site_names import parse_site

Numbers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

LOGISTIC_PENALTIES = tuple(10.0**power for power in range(-5, 2))
RIDGE_PENALTIES = tuple(10.0**power for power in range(-7, 3))
_ROUGH, _FINE = 1e-5, 1e-7  # nats above the minimum: to choose the penalty by, and of the final probe
_MOST_LOGITS = 2**23  # in memory at a time
_VECTORS = 38  # float64 vectors of a problem that half of the memory must hold: what scipy's L-BFGS takes
_COVARIANCES = 12  # width² float64 arrays that a task holds at most: of three subsets, and their eigenvectors


class SiteProbe(NamedTuple):
    """The result of a task: a line of the table, and the probe."""

    line: dict[str, Any]
    probe: SavedProbe


def probe_site(job: Job) -> SiteProbe:
    """Choose the penalty, fit true and control labels to all training rows, and test on held-out examples.

    Raises:
        AnalysisError: The problem does not fit into memory, or a subset has no finite rows.
    """
    return (_classify if job.summary.task == "classification" else _regress)(job, ProbeRows(job))


def _classify(job: Job, rows: ProbeRows) -> SiteProbe:
    summary, width = job.summary, rows.width
    n_classes = len(summary.classes)
    height = max(1, _MOST_LOGITS // (n_classes * len(LOGISTIC_PENALTIES)))
    _check_memory(job, width)

    def batches(*subsets: int) -> Iterator[tuple[npt.NDArray[np.floating], Numbers]]:
        for values, labels in rows.of(*subsets):
            codes = np.searchsorted(summary.classes, labels)
            for start in range(0, len(values), height):
                yield values[start : start + height], codes[start : start + height]

    train = Moments(width, full=_COVARIANCES * 8 * width**2 <= job.memory)
    n_rows = np.zeros(3, np.int64)
    n_learned, n_tested = np.zeros((2, n_classes), np.int64), np.zeros((2, n_classes), np.int64)
    for values, labels, subsets in rows.each():
        n_rows += np.bincount(subsets, minlength=3)
        train.add(values[subsets != TEST])
        codes = np.searchsorted(summary.classes, labels)
        for counts, chosen in ((n_learned, codes[subsets != TEST]), (n_tested, codes[subsets == TEST])):
            for labelling in (0, 1):
                counts[labelling] += np.bincount(chosen[:, labelling], minlength=n_classes)
    _check_rows(job, n_rows.tolist())
    summary.check_classes(n_learned[0], n_tested[0], f" on {job.site}")
    basis = Basis.of(train)
    grid = [Problem(0, n_classes, penalty) for penalty in LOGISTIC_PENALTIES]
    tried = fit_logistic(partial(batches, FIT), grid, basis, tolerance=_ROUGH)
    losses = sum(
        np.array([log_losses(values @ one.weight.T + one.bias, codes[:, 0]).sum() for one in tried])
        for values, codes in batches(VALIDATION)
    )
    penalty = LOGISTIC_PENALTIES[int(np.argmin(losses))]
    finals = [Problem(labelling, n_classes, penalty) for labelling in (0, 1)]
    probe, control = fit_logistic(partial(batches, FIT, VALIDATION), finals, basis, tolerance=_FINE)
    truth, guess, score = _answers(batches(TEST), probe, 0)
    control_truth, control_guess, _ = _answers(batches(TEST), control, 1)
    scores = {
        "accuracy": float((truth == guess).mean()),
        "balanced_accuracy": _balanced(truth, guess),
        "auc": float(roc_auc_score(truth, score)) if n_classes == 2 and len(np.unique(truth)) == 2 else None,
        "majority_accuracy": float((truth == n_learned[0].argmax()).mean()),
        "majority_balanced_accuracy": _balanced(truth, np.full_like(truth, n_learned[0].argmax())),
        "control_accuracy": float((control_truth == control_guess).mean()),
        "control_balanced_accuracy": _balanced(control_truth, control_guess),
        "control_majority_accuracy": float((control_truth == n_learned[1].argmax()).mean()),
        "n_classes": n_classes,
        "not_learned": summary.names_of(n_learned[0] == 0),
        "not_tested": summary.names_of(n_tested[0] == 0),
        "converged": probe.is_converged and control.is_converged,
    }
    saved = SavedProbe(probe.weight, probe.bias, penalty, summary.names, {"site": job.site, "target": job.target})
    return _site_probe(job, rows, (train.n, len(truth)), scores, saved)


def _check_memory(job: Job, width: int) -> None:
    n_classes = len(job.summary.classes)
    needed = _VECTORS * 8 * n_classes * (width + 1) * len(LOGISTIC_PENALTIES)
    if needed > job.memory // 2:
        raise AnalysisError(
            f"{n_classes:,} classes on {job.site}, {width:,} wide, need {needed / 2**30:.1f} GiB, but a worker has "
            f"only {job.memory / 2**31:.1f} GiB for them: allow more ({named('memory_limit')}), or probe a condition "
            "instead"
        )


def _check_rows(job: Job, n_rows: Sequence[int]) -> None:
    if not all(n_rows):
        raise AnalysisError(f"{job.site} has too few finite rows: leave this site out")


def _answers(
    batches: Iterator[tuple[npt.NDArray[np.floating], Numbers]], probe: Fitted, labelling: int
) -> tuple[Numbers, Numbers, Floats]:
    """Return true classes, most likely classes, and the last class's probability, (rows,) each."""
    truth, guess, score = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0)]
    for values, codes in batches:
        chances = probabilities(values @ probe.weight.T + probe.bias)
        truth.append(codes[:, labelling])
        guess.append(chances.argmax(axis=1))
        score.append(chances[:, -1])
    return np.concatenate(truth), np.concatenate(guess), np.concatenate(score)


def _balanced(truth: Numbers, guess: Numbers) -> float:
    """Return the mean over classes of the share of their rows that are recognised."""
    n_rows = np.bincount(truth)
    n_found = np.bincount(truth[truth == guess], minlength=len(n_rows))
    return float((n_found[n_rows > 0] / n_rows[n_rows > 0]).mean())


def _regress(job: Job, rows: ProbeRows) -> SiteProbe:
    width = rows.width
    needed = _COVARIANCES * 8 * width**2
    if needed > job.memory:
        raise AnalysisError(
            f"{job.site} is {width:,} wide: a regression on it needs {needed / 2**30:.1f} GiB, but a worker has "
            f"{job.memory / 2**30:.1f} GiB: allow more ({named('memory_limit')}), or choose other sites"
        )
    moments = {subset: Moments(width + 2) for subset in (FIT, VALIDATION, TEST)}
    for values, labels, subsets in rows.each():
        both = np.column_stack([values, labels])
        for subset, sums in moments.items():
            sums.add(both[subsets == subset])
    _check_rows(job, [sums.n for sums in moments.values()])
    tried = solve(moments[FIT], width, 0, RIDGE_PENALTIES)
    penalty = RIDGE_PENALTIES[int(np.argmin([mean_squared_error(one, moments[VALIDATION], 0) for one in tried]))]
    train, test = moments[FIT].merge(moments[VALIDATION]), moments[TEST]
    probe, control = (solve(train, width, column, [penalty])[0] for column in (0, 1))
    error = mean_squared_error(probe, test, 0)
    variance, control_variance = test.variance[width:]
    baseline, control_baseline = test.variance[width:] + (test.mean[width:] - train.mean[width:]) ** 2
    scores = {
        "r2": _explained(error, variance),
        "rmse": error**0.5,
        "baseline_r2": _explained(baseline, variance),
        "baseline_rmse": float(baseline) ** 0.5,
        "control_r2": _explained(mean_squared_error(control, test, 1), control_variance),
        "control_baseline_r2": _explained(control_baseline, control_variance),
    }
    about = {"site": job.site, "target": job.target}
    saved = SavedProbe(probe.weight[None], np.array([probe.bias]), penalty, None, about)
    return _site_probe(job, rows, (train.n, test.n), scores, saved)


def _explained(error: float, variance: float) -> float | None:
    """Return the share of the variance that is explained, or None if there is no variance."""
    return 1 - float(error) / float(variance) if variance > 0 else None


def _site_probe(
    job: Job, rows: ProbeRows, n_rows: tuple[int, int], scores: dict[str, Any], probe: SavedProbe
) -> SiteProbe:
    line = {
        "site": job.site,
        "layer": parse_site(job.site).layer,
        "target": job.target,
        "n_train": n_rows[0],
        "n_test": n_rows[1],
        "n_left_out": rows.n_left_out,
        "penalty": probe.penalty,
        **scores,
    }
    return SiteProbe(line, probe)

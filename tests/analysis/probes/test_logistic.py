"""Sums of losses over blocks of rows, and the number of passes that a fit takes."""

from typing import Any

import numpy as np

from residua.analysis.probes.logistic import (
    Basis,
    Covariance,
    LossSums,
    Problem,
    fit_logistic,
    log_losses,
    loss_sums,
    scale_of,
    standardised,
)
from residua.analysis.support.moments import Moments


def test_sums_of_blocks_merge_to_the_loss_and_its_gradient() -> None:
    rng = np.random.default_rng(0)
    rows, codes = rng.standard_normal((50, 6)) * 3 + 1, rng.integers(0, (2, 3), (50, 2))
    problems = [Problem(0, 2, 0.1), Problem(1, 3, 0.1)]
    weights = rng.standard_normal((7, 4))

    def losses(at: Any) -> Any:
        logits = rows @ at[:-1] + at[-1]
        return np.array([log_losses(logits[:, :1], codes[:, 0]).sum(), log_losses(logits[:, 1:], codes[:, 1]).sum()])

    sums = LossSums(0, np.zeros(2), np.zeros((7, 4)))
    for block in np.array_split(np.arange(50), 4):
        sums.merge(loss_sums(rows[block], codes[block], problems, weights))
    assert sums.n_rows == 50
    np.testing.assert_allclose(sums.losses, losses(weights), rtol=1e-12)
    steps = 1e-6 * np.eye(28).reshape(28, 7, 4)
    slopes = [(losses(weights + step).sum() - losses(weights - step).sum()) / 2e-6 for step in steps]
    np.testing.assert_allclose(sums.gradients.ravel(), slopes, atol=1e-6)


def test_it_takes_as_few_passes_as_docs_analysis_says() -> None:
    """Correlated channels of very different scales, the worst for the plain coordinates."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((3000, 40)) @ rng.standard_normal((40, 40)) * np.exp(3 * rng.standard_normal(40))
    truth = (rows / rows.std(axis=0)) @ rng.standard_normal(40) + rng.standard_normal(3000) * 4 > 0
    moments, sample = Moments(40, full=False), Covariance.zero(40)
    moments.add(rows)
    scaled = standardised(rows, moments.mean, scale_of(moments))
    sample.add(scaled[::18])  # four for each channel, as in a probe
    n_passes = 0

    def summed(problems: Any, weights: Any) -> LossSums:
        nonlocal n_passes
        n_passes += 1
        return loss_sums(scaled, truth[:, None].astype(np.int64), problems, weights)

    penalties = [10.0**power for power in range(-5, 2)]
    found = fit_logistic(
        summed, [Problem(0, 2, penalty) for penalty in penalties], Basis.of(moments, sample), tolerance=1e-7
    )
    assert all(one.is_converged for one in found)
    assert n_passes <= 40

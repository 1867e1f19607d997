"""Sums of losses over blocks of rows, and the number of passes that a fit takes."""

from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from residua.analysis.probes.logistic import (
    Basis,
    LossSums,
    Problem,
    Products,
    best_constant,
    fit_logistic,
    has_many_rows,
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
    moments, sample = Moments(40, full=False), Products.zero(40)
    moments.add(rows)
    scaled = standardised(rows, moments.mean, scale_of(moments))
    sample.add(scaled[::18])  # four for each channel, as in a probe
    n_passes = 0

    def summed(problems: Any, weights: Any) -> LossSums:
        nonlocal n_passes
        n_passes += 1
        return loss_sums(scaled, truth[:, None].astype(np.int64), problems, weights)

    problems = [Problem(0, 2, 10.0**power) for power in range(-5, 2)]
    basis = Basis.of(moments, lambda _: sample, is_whole=True)
    found = fit_logistic(summed, problems, basis, tolerance=1e-7)
    assert all(one.is_converged for one in found)
    assert n_passes <= 40


def trained_like(n_rows: int, width: int, n_classes: int) -> tuple[Any, Any]:
    """Rows with a few huge directions, a long tail and channels of very different scales, and their classes."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, n_classes, n_rows)
    sizes = np.arange(1, width + 1) ** -1.0
    sizes[:3] *= [300, 100, 30]
    rotation = np.linalg.qr(rng.standard_normal((width, width))).Q
    rows = rng.standard_normal((n_classes, width))[codes] * 0.3 + rng.standard_normal((n_rows, width))
    return (rows * np.sqrt(sizes)) @ rotation * np.exp(rng.standard_normal(width)) + 5, codes


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_leading_directions_are_enough_where_rows_are_few_and_wide(dtype: Any) -> None:
    """The plain coordinates take 176 passes, and scikit-learn, which takes these, 319 steps."""
    n_rows, width, n_classes, penalty = 200, 320, 4, 1e-3
    assert not has_many_rows(n_rows, width, n_classes)
    rows, codes = trained_like(n_rows, width, n_classes)
    rows = rows.astype(dtype)
    moments = Moments(width, full=False)
    moments.add(rows)
    scaled = standardised(rows, moments.mean, scale_of(moments))
    n_passes = 0

    def sampled(directions: Any) -> Products:
        found = Products.zero(width, directions)
        found.add(scaled, directions)
        return found

    def summed(problems: Any, weights: Any) -> LossSums:
        nonlocal n_passes
        n_passes += 1
        return loss_sums(scaled, codes[:, None], problems, weights)

    basis = Basis.of(moments, sampled, is_whole=False)
    assert basis.vectors.shape == (width, 64)
    np.testing.assert_allclose(basis.vectors.T @ basis.vectors, np.eye(64), atol=1e-9)
    values = np.linalg.eigvalsh(scaled.T.astype(np.float64) @ scaled / n_rows)[::-1]
    np.testing.assert_allclose(basis.values[:3], values[:3], rtol=1e-3)
    assert basis.rest * (width - 64) + basis.values.sum() == pytest.approx(width, rel=1e-5)
    start = best_constant(np.bincount(codes), width)
    (found,) = fit_logistic(summed, [Problem(0, n_classes, penalty)], basis, tolerance=1e-8, starts={0: start})
    assert found.is_converged
    assert n_passes <= 80
    exact = scaled.astype(np.float64)
    theirs = LogisticRegression(C=1 / (penalty * n_rows), tol=1e-9, max_iter=10_000).fit(exact, codes)
    weight = found.weight * basis.scale
    np.testing.assert_allclose(weight, theirs.coef_, atol=2e-3 * np.abs(theirs.coef_).max())
    np.testing.assert_allclose(exact @ weight.T, exact @ theirs.coef_.T, atol=2e-2)


def test_the_best_constant_has_the_shares_of_the_classes() -> None:
    bias = best_constant(np.array([6, 0, 2]), 5).bias
    shares = np.exp(bias) / np.exp(bias).sum()
    np.testing.assert_allclose(shares, [0.75, 0, 0.25], atol=1e-6)
    assert best_constant(np.array([30, 10]), 5).bias == pytest.approx([np.log(1 / 3)])

"""The closed form against numpy's least squares in float64, and its whitening against the covariance."""

import numpy as np
import pytest
import torch

from residua.analysis.lens.ridge import Gram, Ridge, solve_ridge
from residua.store.base.errors import AnalysisError

N, D = 700, 12


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs with a channel that is a thousand times the others and hardly varies, as residual streams have."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(N, D, generator=generator) @ torch.randn(D, D, generator=generator)
    inputs[:, 3] = 1000 + 0.1 * inputs[:, 3]
    targets = inputs @ torch.randn(D, D, generator=generator) / 5 + torch.randn(N, D, generator=generator)
    return inputs, targets


def solved(inputs: torch.Tensor, targets: torch.Tensor, held: int = 100) -> Ridge:
    """Sum in two pieces, as two jobs do."""
    origin = inputs[:8].double().mean(0)
    total = Gram.zero(origin)
    for piece in (slice(held, 300), slice(300, None)):
        gram = Gram.zero(origin)
        gram.add_(inputs[piece], targets[piece])
        total.merge_(gram)
    return solve_ridge(total, inputs[:held], targets[:held])


def test_it_is_numpys_least_squares_with_a_penalty_on_the_weight_alone() -> None:
    inputs, targets = rows()
    ridge = solved(inputs, targets)
    x, y = inputs[100:].double().numpy(), targets[100:].double().numpy()
    centred = x - x.mean(0)
    penalty = ridge.penalty * centred.var(0).mean() * len(x)
    stacked = np.concatenate([centred, np.sqrt(penalty) * np.eye(D)])
    weight = np.linalg.lstsq(stacked, np.concatenate([y - y.mean(0), np.zeros((D, D))]), rcond=None)[0]
    np.testing.assert_allclose(ridge.translator.weight, weight, rtol=1e-3, atol=1e-3)
    expected = x @ weight + (y.mean(0) - x.mean(0) @ weight)
    np.testing.assert_allclose(ridge.translator(inputs[100:]), expected, atol=5e-3)


def test_the_penalty_is_the_best_on_held_out_rows() -> None:
    """With hardly more rows than directions a larger one wins than with many."""
    inputs, targets = rows()
    few = solved(inputs[:120], targets[:120])
    assert few.penalty > solved(inputs, targets).penalty
    errors = {}
    for penalty in (few.penalty / 10, few.penalty, few.penalty * 10):
        x, y = inputs[100:120].double(), targets[100:120].double()
        centred = x - x.mean(0)
        scale = centred.var(0, correction=0).mean()
        weight = torch.linalg.solve(
            centred.T @ centred / 20 + penalty * scale * torch.eye(D, dtype=torch.float64), centred.T @ y / 20
        )
        guess = (inputs[:100].double() - x.mean(0)) @ weight + y.mean(0)
        errors[penalty] = (guess - targets[:100]).square().mean().item()
    assert min(errors, key=errors.__getitem__) == few.penalty


def test_whitened_rows_start_at_the_same_map() -> None:
    inputs, targets = rows()
    ridge = solved(inputs, targets)
    white = (inputs[100:] - ridge.mean) @ ridge.whitening
    covariance = (white.T @ white / len(white)).numpy()
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 1e-2
    assert (np.diag(covariance) < 1.01).all()
    np.testing.assert_allclose(
        white @ ridge.whitened[:-1] + ridge.whitened[-1], ridge.translator(inputs[100:]), atol=2e-2
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_no_numbers_are_refused(value: float) -> None:
    inputs, targets = rows()
    inputs[400, 2] = value
    with pytest.raises(AnalysisError, match=r"600 rows.*NaN"):
        solved(inputs, targets)


def test_blocks_of_columns_in_float32_are_the_sums_of_float64() -> None:
    """Products of float32, added up in float64, around an origin near the mean: to six digits of the largest entry."""
    inputs, targets = rows()
    origin = inputs[:8].double().mean(0)
    blocks = []
    for columns in (slice(0, 5), slice(5, 10), slice(10, D)):
        gram = Gram.zero(origin, len(range(D)[columns]))
        for start in range(0, N, 100):
            gram.add_(inputs[start : start + 100], targets[start : start + 100], columns)
        blocks.append(gram)
    total = Gram.joined(blocks)
    x, y = (inputs.double() - total.origin).numpy(), targets.double().numpy()
    for found, expected in ((total.input_input, x.T @ x), (total.input_target, x.T @ y), (total.input_sum, x.sum(0))):
        np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())
    assert total.n_rows.item() == N


def test_a_product_of_8192_rows_in_float32_is_exact_enough_for_every_pair_of_channels() -> None:
    """An entry's error is 5e-7 of its two channels' own sizes, which differ by 10^6: small channels keep digits."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-3, 3, D)
    inputs = torch.randn(3 * 8192, D, generator=generator) * sizes + 20 * sizes
    targets = torch.randn(3 * 8192, D, generator=generator)
    gram = Gram.zero(inputs[:1000].double().mean(0))
    for start in range(0, len(inputs), 8192):
        gram.add_(inputs[start : start + 8192], targets[start : start + 8192])
    x, y = (inputs.double() - gram.origin).numpy(), targets.double().numpy()
    of_x, of_y = np.sqrt((x**2).sum(0)), np.sqrt((y**2).sum(0))
    assert (np.abs(gram.input_input.numpy() - x.T @ x) < 5e-7 * np.outer(of_x, of_x)).all()
    assert (np.abs(gram.input_target.numpy() - x.T @ y) < 5e-7 * np.outer(of_x, of_y)).all()

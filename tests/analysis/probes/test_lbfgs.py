"""Convex functions minimised side by side: the minima, the calls that they share, and how they end."""

import threading
import tracemalloc
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from residua.analysis.probes.lbfgs import minimise
from residua.analysis.probes.site import _VECTORS as L_BFGS_VECTORS

Floats = npt.NDArray[np.float64]
CURVATURES = [np.linspace(0.1, 1, 30), np.ones(5), np.linspace(0.01, 1, 80)]
MINIMA = [np.sin(np.arange(len(curvature)) + 1.0) for curvature in CURVATURES]
STARTS = [np.zeros(len(curvature)) for curvature in CURVATURES]


class Parabolas:
    """Functions with minimum 0 at `MINIMA`, and the calls that evaluated them."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.threads = {threading.get_ident()}

    def __call__(self, numbers: Sequence[int], points: Sequence[Floats]) -> list[tuple[float, Floats]]:
        self.calls.append([*numbers])
        self.threads.add(threading.get_ident())
        gradients = [CURVATURES[i] * (point - MINIMA[i]) for i, point in zip(numbers, points, strict=True)]
        return [(float(g @ (point - MINIMA[i])) / 2, g) for i, point, g in zip(numbers, points, gradients, strict=True)]


def test_it_takes_no_more_memory_than_a_task_counts() -> None:
    n = 50_000
    curvature, minimum = np.exp(np.random.default_rng(0).standard_normal((2, n)))

    def evaluate(numbers: Sequence[int], points: Sequence[Floats]) -> list[tuple[float, Floats]]:
        gradients = [curvature * (point - minimum) / n for point in points]
        return [(float(g @ (point - minimum)) / 2, g) for g, point in zip(gradients, points, strict=True)]

    tracemalloc.start()
    try:
        minimise(evaluate, [np.zeros(n), np.zeros(n)], tolerance=1e-14, most_passes=40)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * n * 8 * L_BFGS_VECTORS


def test_every_function_comes_to_its_minimum_in_calls_that_are_shared() -> None:
    evaluate = Parabolas()
    found = minimise(evaluate, STARTS, tolerance=1e-20, most_passes=300)
    for descent, minimum in zip(found, MINIMA, strict=True):
        np.testing.assert_allclose(descent.point, minimum, atol=1e-8)
        assert descent.is_converged
    assert evaluate.calls[:2] == [[0, 1, 2], [0, 1, 2]]
    assert found[1].n_steps == 1  # its curvature is the identity
    assert len(evaluate.calls) == sum(2 in numbers for numbers in evaluate.calls) < 200  # as many as the slowest needs
    assert evaluate.threads == {threading.get_ident()}


def test_calls_are_limited_and_what_was_found_by_then_is_kept() -> None:
    evaluate = Parabolas()
    found = minimise(evaluate, STARTS, tolerance=1e-20, most_passes=5)
    assert len(evaluate.calls) == 5
    assert [descent.is_converged for descent in found] == [False, True, False]
    start, end = (Parabolas()([2], [point])[0][0] for point in (np.zeros(80), found[2].point))
    assert end < start / 2


def test_a_start_near_the_minimum_saves_calls() -> None:
    near = [minimum + 1e-3 * np.cos(np.arange(len(minimum))) for minimum in MINIMA]
    from_zero, evaluate = Parabolas(), Parabolas()
    minimise(from_zero, STARTS, tolerance=1e-9, most_passes=300)
    found = minimise(evaluate, near, tolerance=1e-9, most_passes=300)
    for descent, minimum in zip(found, MINIMA, strict=True):
        np.testing.assert_allclose(descent.point, minimum, atol=1e-3)
        assert descent.is_converged
    assert len(evaluate.calls) < len(from_zero.calls) / 2


def test_a_function_that_starts_at_its_minimum_takes_no_step() -> None:
    (found,) = minimise(lambda _, points: [(1.0, np.zeros(3))], [np.zeros(3)], tolerance=1e-8, most_passes=10)
    assert (found.n_steps, found.is_converged, found.point.tolist()) == (0, True, [0, 0, 0])


@pytest.mark.parametrize("error", [OSError("the disk is gone"), KeyboardInterrupt()])
def test_an_error_of_the_evaluation_comes_up_and_leaves_no_thread(error: BaseException) -> None:
    before = set(threading.enumerate())
    evaluate = Parabolas()

    def failing(numbers: Sequence[int], points: Sequence[Floats]) -> list[tuple[float, Floats]]:
        if len(evaluate.calls) == 3:
            raise error
        return evaluate(numbers, points)

    with pytest.raises(type(error)) as raised:
        minimise(failing, STARTS, tolerance=1e-20, most_passes=100)
    assert raised.value is error
    assert set(threading.enumerate()) <= before


def test_an_error_in_one_thread_comes_up_and_ends_the_others() -> None:
    before = set(threading.enumerate())
    evaluate = Parabolas()

    def with_a_wrong_gradient(numbers: Sequence[int], points: Sequence[Floats]) -> list[tuple[float, Floats]]:
        answers = dict(zip(numbers, evaluate(numbers, points), strict=True))
        loss, gradient = answers[2]
        return [*(answers | {2: (loss, gradient[:2])}).values()]

    with pytest.raises(ValueError, match="mismatch"):
        minimise(with_a_wrong_gradient, STARTS, tolerance=1e-20, most_passes=100)
    assert set(threading.enumerate()) <= before

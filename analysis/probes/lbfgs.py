"""L-BFGS for several convex functions side by side, so that one pass over the data evaluates all of them.

The algorithm is scipy's (Liu and Nocedal 1989, "On the limited memory BFGS method for large scale optimization"). Each
function is minimised in a thread of its own. When every function that is not done has asked for its loss at a point,
one call evaluates them together.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from threading import Barrier, BrokenBarrierError
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

Floats: TypeAlias = npt.NDArray[np.float64]
Answer: TypeAlias = tuple[float, Floats]
"""Loss and gradient at a point."""

_NOISE = 1e-7  # of the loss at zero: losses may be sums of float32 products, and a smaller rise is no rise
_PAIRS = 8  # of steps and gradients that are kept: more save no pass and take memory

_STEPS_OF_A_START = 4  # before a start other than zero may be the minimum: where losses are low, so is the curvature,
# and what a first step promises is too little


class _Converged(Exception):  # noqa: N818  # no error, but the only way out of scipy's loop before it evaluates
    pass


class Descent:
    """The minimisation of one function.

    Args:
        start: Where it begins, (parameters,).
        size: Size of the terms that the loss is a sum of, which its noise follows; by default the loss at the start.

    Attributes:
        point: The best point so far, (parameters,).
        n_steps: Steps taken.
        is_converged: Whether the loss is as low as was asked for.
    """

    def __init__(self, start: Floats, size: float | None = None) -> None:
        self.point = start
        self.n_steps = 0
        self.is_converged = False
        self._size = size

    def run(self, evaluate: Callable[[Floats], Answer], *, tolerance: float) -> None:
        """Minimise until the next step is expected to lower the loss by no more than `tolerance`.

        The first point that scipy tries in a step is the minimum of its quadratic model of the loss, which is half the
        gradient times the way there below the current loss.
        """
        start = self.point
        first_loss, gradient = evaluate(start)
        noise = _NOISE * abs(first_loss if self._size is None else self._size)
        scale = float(np.linalg.norm(gradient))  # scipy's first step has length 1; in these units it is the gradient
        trial, is_first_trial = start, True

        def loss_at(scaled: Floats) -> Answer:
            nonlocal gradient, trial, is_first_trial
            if not scaled.any():
                return first_loss, gradient * scale
            if is_first_trial:
                expected = float((self.point - (start + scaled * scale)) @ gradient) / 2
                knows_curvature = not start.any() or self.n_steps >= _STEPS_OF_A_START or not expected
                self.is_converged = knows_curvature and expected <= tolerance
                if self.is_converged:
                    raise _Converged
            trial, is_first_trial = start + scaled * scale, False
            loss, gradient = evaluate(trial)
            return loss - noise * (self.n_steps + 1), gradient * scale

        def take_step(_: Floats) -> None:
            nonlocal is_first_trial
            self.point, self.n_steps, is_first_trial = trial, self.n_steps + 1, True

        options = {"ftol": 0, "gtol": 0, "maxcor": _PAIRS}  # it stops for our reason, not for scipy's
        with suppress(_Converged):
            found = minimize(
                loss_at, np.zeros_like(start), jac=True, method="L-BFGS-B", callback=take_step, options=options
            )
            self.is_converged = bool(found.success)


def minimise(
    evaluate: Callable[[Sequence[int], Sequence[Floats]], Sequence[Answer]],
    starts: Sequence[Floats],
    *,
    tolerance: float | Sequence[float],
    most_passes: int,
    size: float | None = None,
) -> list[Descent]:
    """Minimise several convex functions.

    Args:
        evaluate: Given the numbers of some functions and a point for each, returns loss and gradient of each. It is
            called in the calling thread.
        starts: Where to begin with each function.
        tolerance: A function is done when its next step is expected to lower its loss by no more than this: one number,
            or one for each.
        most_passes: Most calls of `evaluate`.
        size: See `Descent`.

    Returns:
        One descent for each function.
    """
    tolerances = np.broadcast_to(tolerance, len(starts)).tolist()
    descents = [Descent(start, size) for start in starts]
    barrier = Barrier(len(descents) + 1)  # the threads, and this one
    asked: dict[int, Floats] = {}
    answers: dict[int, Answer] = {}

    def ask(number: int, point: Floats) -> Answer:
        asked[number] = point
        barrier.wait()
        barrier.wait()
        return answers[number]

    def descend(number: int) -> None:
        try:
            descents[number].run(partial(ask, number), tolerance=tolerances[number])
            while True:
                barrier.wait()
        finally:
            barrier.abort()

    threads: list[Future[None]] = []
    with ThreadPoolExecutor(len(descents)) as pool:
        try:
            threads += [pool.submit(descend, number) for number in range(len(descents))]
            for _ in range(most_passes):
                barrier.wait()
                numbers = sorted(asked)
                if not numbers:
                    break
                answers.update(zip(numbers, evaluate(numbers, [asked.pop(n) for n in numbers]), strict=True))
                barrier.wait()
        except BrokenBarrierError:
            pass  # a thread failed
        finally:
            barrier.abort()
    for thread in threads:
        with suppress(BrokenBarrierError):
            thread.result()  # raises what a thread failed with
    return descents

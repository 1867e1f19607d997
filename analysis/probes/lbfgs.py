"""L-BFGS for several convex problems in lockstep, so that one pass over the data serves all of them.

Each problem is a descent of its own (Nocedal and Wright 2006, algorithms 7.4 and 3.1): it asks for the loss at a trial
point and is told. Step length 1 comes first, and is halved until the loss falls enough (Armijo). Strictly convex
problems always give pairs of positive curvature, so no search for one is needed.
"""

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Evaluate = Callable[[Sequence[int], Sequence[Floats]], Sequence[tuple[float, Floats]]]

_PAIRS = 10
_ARMIJO = 1e-4
_NOISE = 1e-7  # losses may be sums of float32 products: a smaller rise, relative to the loss, is none
_SMALLEST_STEP = 2.0**-20


class Descent:
    """The way down of one problem.

    Args:
        start: Where to begin, (parameters,).
        tolerance: Ends where a step is expected to lower the loss by less.

    Attributes:
        trial: The point whose loss and gradient are asked for.
        point: The best point so far.
        n_steps: Steps taken.
        is_done: Whether nothing more is asked.
        is_converged: Whether the loss is as low as was asked.
    """

    def __init__(self, start: Floats, tolerance: float) -> None:
        self.trial = start
        self.point = start
        self.n_steps = 0
        self.is_done = False
        self.is_converged = False
        self._tolerance = tolerance
        self._loss = np.inf
        self._gradient: Floats = np.zeros(0)
        self._direction: Floats = np.zeros(0)
        self._step = 1.0
        self._pairs: deque[tuple[Floats, Floats]] = deque(maxlen=_PAIRS)

    def tell(self, loss: float, gradient: Floats) -> None:
        """Take loss and gradient at `trial`, and move on."""
        if not self._falls_enough(loss):
            self._step /= 2
            self.is_done = self._step < _SMALLEST_STEP
        else:
            self._move(loss, gradient)
        self.trial = self.point + self._step * self._direction

    def _falls_enough(self, loss: float) -> bool:
        if not self._gradient.size:
            return True
        least = self._loss + _ARMIJO * self._step * float(self._gradient @ self._direction)
        return loss <= least + _NOISE * abs(self._loss)

    def _move(self, loss: float, gradient: Floats) -> None:
        if self._gradient.size:
            moved, turned = self.trial - self.point, gradient - self._gradient
            if moved @ turned > 0:
                self._pairs.append((moved, turned))
            self.n_steps += 1
        self.point, self._loss, self._gradient = self.trial, loss, gradient
        self._direction, self._step = -self._newton(gradient), 1.0
        self.is_done = self.is_converged = float(-self._direction @ gradient) / 2 <= self._tolerance

    def _newton(self, gradient: Floats) -> Floats:
        """Return the inverse of the estimated Hessian times `gradient`: the two-loop recursion."""
        found = gradient.copy()
        weights = []
        for moved, turned in reversed(self._pairs):
            weights.append((moved @ found) / (moved @ turned))
            found -= weights[-1] * turned
        if self._pairs:
            moved, turned = self._pairs[-1]
            found *= (moved @ turned) / (turned @ turned)
        for (moved, turned), weight in zip(self._pairs, reversed(weights), strict=True):
            found += (weight - (turned @ found) / (moved @ turned)) * moved
        return found


def descend(evaluate: Evaluate, starts: Sequence[Floats], *, tolerance: float, most_passes: int) -> list[Descent]:
    """Minimise several problems side by side.

    Args:
        evaluate: Given numbers of problems and a point for each, returns loss and gradient of each.
        starts: Where each problem begins.
        tolerance: A problem is done where half its gradient times the next step, which is how much its loss
            would fall if it were a parabola, is no larger.
        most_passes: Most calls of `evaluate`.

    Returns:
        One descent a problem.
    """
    descents = [Descent(start, tolerance) for start in starts]
    for _ in range(most_passes):
        going = [number for number, descent in enumerate(descents) if not descent.is_done]
        if not going:
            break
        for number, answer in zip(going, evaluate(going, [descents[i].trial for i in going]), strict=True):
            descents[number].tell(*answer)
    return descents

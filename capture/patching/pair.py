"""A clean and a corrupted example, and the metrics of the model's answer to them.

The metrics look at the prediction after the last position. Legend: `C` copies of an example in a batch, `V` vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from residua.capture.edits.action import widen
from residua.capture.replay.metrics import logit_difference, token_divergences
from residua.store.base.errors import PlanError


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two examples of equal length that differ in what is studied.

    Attributes:
        clean: Token ids of the example as it should be.
        corrupted: Token ids of the example that lacks what is studied.
        answer: The token that follows the clean example.
        wrong: The token that follows the corrupted example; None if no metric needs it.

    Raises:
        PlanError: The examples differ in length, or have no token.
    """

    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    answer: int
    wrong: int | None = None

    def __post_init__(self) -> None:
        if len(self.clean) != len(self.corrupted) or not self.clean:
            raise PlanError(
                f"a pair has {len(self.clean)} clean and {len(self.corrupted)} corrupted tokens: every position is "
                "patched from the same position, so both need the same number, at least one"
            )


PairMetric = Callable[[Tensor, Pair, Tensor], Tensor]
"""From logits (C, V), the pair, and the logits of the clean run (V) to one number for each copy, (C)."""


def _logit_difference(logits_CV: Tensor, pair: Pair, _clean_V: Tensor) -> Tensor:
    if pair.wrong is None:
        raise PlanError("logit_difference needs the wrong answer of every pair: give `wrong`, or choose loss")
    return logit_difference(logits_CV, pair.answer, pair.wrong)


def _loss(logits_CV: Tensor, pair: Pair, _clean_V: Tensor) -> Tensor:
    return -widen(logits_CV).log_softmax(-1)[:, pair.answer]


def _probability(logits_CV: Tensor, pair: Pair, _clean_V: Tensor) -> Tensor:
    return widen(logits_CV).softmax(-1)[:, pair.answer]


def _kl(logits_CV: Tensor, _pair: Pair, clean_V: Tensor) -> Tensor:
    return token_divergences(clean_V[None], logits_CV)


_METRICS: dict[str, PairMetric] = {
    "logit_difference": _logit_difference,
    "loss": _loss,
    "kl": _kl,
    "probability": _probability,
}


def pair_metric(name: str) -> PairMetric:
    """Return the metric of that name.

    Raises:
        PlanError: There is none.
    """
    if name not in _METRICS:
        raise PlanError(f"there is no metric {name[:60]!r}: choose one of {', '.join(_METRICS)}")
    return _METRICS[name]

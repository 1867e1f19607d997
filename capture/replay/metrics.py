"""Metrics of a replay's logits: loss, KL divergence from the run without edits, and difference of two logits.

A metric is ``loss``; ``kl``; or ``{"logit_difference": [token, other token], "position": -1}``. All are differentiable
means in float32 at least: over predicted tokens, over tokens, over examples.

Legend: `T` tokens of an example, `V` vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from residua.capture.buffers.row_index import ExampleRows
from residua.capture.edits.action import widen
from residua.store.base.errors import PlanError


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The argument of a metric.

    Attributes:
        logits: Per example, (T, V).
        examples: The examples.
        original: Returns the logits of the same examples without edits.
    """

    logits: Sequence[Tensor]
    examples: Sequence[ExampleRows]
    original: Callable[[], Sequence[Tensor]]


Metric = Callable[[Outcome], Tensor]
MetricSpec = str | Mapping[str, Any] | Metric
"""A name, a name with its arguments, or a Python function of an `Outcome` that returns one number."""


def metric_of(spec: MetricSpec) -> Metric:
    """Return the metric that `spec` names.

    Raises:
        PlanError: There is no such metric, or an argument is missing or wrong.

    Example:
        >>> metric_of("loss") is mean_loss
        True
    """
    if callable(spec):
        return spec
    if isinstance(spec, Mapping) and "logit_difference" in spec:
        return _mean_logit_difference(spec)
    if isinstance(spec, str) and spec in ("loss", "kl"):
        return mean_loss if spec == "loss" else mean_kl
    raise PlanError(
        f"there is no metric {spec!r}: give loss, kl, or {{'logit_difference': [token, other token], 'position': -1}}"
    )


def token_losses(logits_TV: Tensor, example: ExampleRows) -> Tensor:
    """Return the cross-entropy of each next token in nats, (T - 1); NaN for a token without a logit."""
    targets, is_known = _next_tokens(logits_TV, example)
    losses = F.cross_entropy(widen(logits_TV[:-1]), targets, reduction="none")
    return losses.masked_fill(~is_known, torch.nan)


def _next_tokens(logits_TV: Tensor, example: ExampleRows) -> tuple[Tensor, Tensor]:
    """Return each next token, or 0 where the LM head is smaller than the vocabulary, and whether it has a logit."""
    targets = torch.from_numpy(example.input_ids[1:].astype(np.int64)).to(logits_TV.device)
    is_known = targets < logits_TV.shape[-1]
    return targets * is_known, is_known


def token_divergences(original_TV: Tensor, logits_TV: Tensor) -> Tensor:
    """Return KL(original || other) of each position in nats, (T)."""
    return _divergences(*(widen(logits).log_softmax(-1) for logits in (original_TV, logits_TV)))


def token_changes(original_TV: Tensor, logits_TV: Tensor, example: ExampleRows) -> tuple[Tensor, Tensor, Tensor]:
    """Return `token_divergences`, and `token_losses` of the second and of the first run, from one softmax of each."""
    log_p, log_q = (widen(logits).log_softmax(-1) for logits in (original_TV, logits_TV))
    targets, is_known = _next_tokens(log_p, example)
    before, after = (
        -logs[:-1].gather(1, targets[:, None])[:, 0].masked_fill(~is_known, torch.nan) for logs in (log_p, log_q)
    )
    return _divergences(log_p, log_q), after, before


def _divergences(log_p_TV: Tensor, log_q_TV: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vecdot(log_p_TV.exp(), log_p_TV - log_q_TV)
    return found


def mean_loss(outcome: Outcome) -> Tensor:
    """Return the mean cross-entropy of next tokens in nats, over all that the LM head has a logit of."""
    pairs = list(zip(outcome.logits, outcome.examples, strict=True))
    losses = torch.cat([token_losses(*pair) for pair in pairs])
    return losses[torch.cat([_next_tokens(*pair)[1] for pair in pairs])].mean()


def mean_kl(outcome: Outcome) -> Tensor:
    """Return the mean divergence from the run without edits in nats, over all tokens."""
    divergences = [token_divergences(*pair) for pair in zip(outcome.original(), outcome.logits, strict=True)]
    return torch.cat(divergences).mean()


def logit_difference(logits: Tensor, token: int, other: int) -> Tensor:
    """Return the logit of `token` minus that of `other`, from (..., V) to (...).

    Both logits are widened to float32 at least before they are subtracted.
    """
    return widen(logits[..., token]) - widen(logits[..., other])


def _mean_logit_difference(spec: Mapping[str, Any]) -> Metric:
    chosen, position = spec["logit_difference"], spec.get("position", -1)
    is_pair = isinstance(chosen, list | tuple) and len(chosen) == 2 and all(isinstance(i, int) for i in chosen)
    if not is_pair or not isinstance(position, int) or set(spec) - {"logit_difference", "position"}:
        raise PlanError(f"a logit difference needs two token ids, and may have a position; found {dict(spec)!r}")
    token, other = chosen

    def difference(outcome: Outcome) -> Tensor:
        for logits_TV in outcome.logits:
            n_tokens, n_logits = logits_TV.shape
            if not -n_tokens <= position < n_tokens or not 0 <= min(chosen) <= max(chosen) < n_logits:
                raise PlanError(f"{dict(spec)!r}: an example has {n_tokens} tokens of a vocabulary of {n_logits}")
        differences = [logit_difference(logits_TV[position], token, other) for logits_TV in outcome.logits]
        return torch.stack(differences).mean()

    return difference

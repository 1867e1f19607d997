"""Measuring what rounding in the store does to the model: stored rows put back, against the run as it is."""

from collections.abc import Callable
from os import PathLike

import torch
from transformers import PreTrainedModel

from residua.capture.metrics import token_divergences
from residua.capture.replayer import Replayer
from residua.capture.samemodel import running_as_captured
from residua.pipelines.captured_batches import sample_batches
from residua.pipelines.models import captured_model
from residua.pipelines.settings import CaptureSettings
from residua.store.archive import Archive
from residua.store.errors import CaptureError, PlanError
from residua.store.fidelity import Fidelity, SiteFidelity, write_fidelity
from residua.store.sitenames import parse_site

_STREAM = ("resid_pre", "resid_mid", "resid_post", "final")


def fidelity(
    archive: str | PathLike[str],
    model: str | PathLike[str] | PreTrainedModel,
    *,
    n_batches: int = 16,
    seed: int = 0,
    device: str = "auto",
    on_batch: Callable[[int, int], None] = lambda *_: None,
) -> Fidelity:
    """Measure by replay what the rounding of stored residual streams does to the model's output.

    At each stored site of the residual stream whose rows are rounded, they take the place of the computed ones, and
    the output is compared with that of the model left alone. The figures are written to ``fidelity.json`` in the
    archive, where `residua info` finds them.

    Args:
        archive: Folder of the archive.
        model: The model that was captured: a transformers model, or a hub id or folder of one.
        n_batches: How many of the plan's batches run; they are chosen at random from those that are captured.
        seed: Seed of the choice.
        device: Device of the model, if it is loaded here.
        on_batch: Called with the batches done and in all, after each.

    Returns:
        Divergence and agreement by site.

    Raises:
        PlanError: The model is not the one that was captured, or no stored residual stream is rounded.
        NotCapturedError: Nothing is captured yet.

    Example:
        >>> found = residua.fidelity("acts.zarr", "models/pydoc-1m")  # doctest: +SKIP
        >>> found.sites["resid_post.3"].kl_mean  # doctest: +SKIP
    """
    opened = Archive(archive)
    names = _rounded(opened)
    batches = sample_batches(opened, n_batches, seed)
    loaded = captured_model(opened, model, CaptureSettings(device=device))
    sums = {name: _Sums() for name in names}
    n_examples = n_tokens = 0
    with running_as_captured(opened, loaded):
        plain = Replayer(loaded, opened)
        stored = {name: Replayer(loaded, opened, at=[name], checked=plain.checked) for name in names}
        for done, batch in enumerate(batches, start=1):
            made = plain.batch(batch.examples.tolist())
            original = _logits(plain.run(made).logits)
            for name, replayer in stored.items():
                sums[name].add(original, _logits(replayer.run(made).logits))
            n_examples += len(made.rows)
            n_tokens += len(original)
            on_batch(done, len(batches))
    found = Fidelity(
        sites={name: counted.result(n_tokens) for name, counted in sums.items()},
        n_examples=n_examples,
        n_tokens=n_tokens,
    )
    write_fidelity(opened.path, opened.plan, found)
    return found


class _Sums:
    """What was found at one site so far."""

    def __init__(self) -> None:
        self._kl = 0.0
        self._most = 0.0
        self._same = 0

    def add(self, original: torch.Tensor, logits: torch.Tensor) -> None:
        kl = token_divergences(original, logits).clamp_min(0)  # which rounding may miss by the last bit
        self._kl += float(kl.double().sum())
        self._most = max(self._most, float(kl.max()))
        self._same += int((original.argmax(-1) == logits.argmax(-1)).sum())

    def result(self, n_tokens: int) -> SiteFidelity:
        return SiteFidelity(kl_mean=self._kl / n_tokens, kl_max=self._most, top1_agreement=self._same / n_tokens)


def _logits(parts: list[torch.Tensor] | None) -> torch.Tensor:
    if parts is None:
        raise CaptureError("the model gave no logits: it has no language modelling head in this process")
    return torch.cat(parts)


def _rounded(archive: Archive) -> list[str]:
    stream = [name for name in archive.sites if parse_site(name).kind in _STREAM]
    plans = [archive.plan.site(name) for name in stream]
    dtype = archive.plan.model["dtype"]
    found = [plan.name for plan in plans if plan.codec not in ("raw", "fast", "small") or plan.dtype != dtype]
    if not found:
        raise PlanError(
            f"{archive.path} has no residual stream that is rounded ({', '.join(stream) or 'none is stored'}): "
            "there is nothing to measure"
        )
    return found

"""`residua.fidelity`: what the rounding of stored rows does to the output of the model, measured by replay."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from transformers import PreTrainedModel

from residua.capture.identity.padding import runs_alike
from residua.capture.identity.provenance import running_as_captured
from residua.capture.replay.engine import Replayer
from residua.capture.replay.metrics import token_divergences
from residua.capture.replay.notes import is_rounded
from residua.pipelines.capture.captured_batches import refuse_replay, sample_batches
from residua.pipelines.jobs.sharing import SharedWork
from residua.pipelines.jobs.workers import working_together
from residua.pipelines.setup.capture_settings import CaptureSettings
from residua.pipelines.setup.models import model_first, replayed_model
from residua.store.base.errors import PlanError
from residua.store.format.sidecars import Fidelity, SiteFidelity, write_fidelity
from residua.store.format.site_names import parse_site
from residua.store.read.archive import Archive
from residua.store.read.stacks import archives_of, main_archive, open_archive
from residua.store.storage.destination import Destination
from residua.store.storage.place import try_result_place

_STREAM = ("resid_pre", "resid_mid", "resid_post", "final")


def fidelity(
    model: str | PathLike[str] | PreTrainedModel | PipelineScheduleSingle,
    archive: Archive | str | PathLike[str],
    *,
    n_batches: int = 16,
    seed: int = 0,
    device: str = "auto",
    tp: int = 1,
    pp: int = 1,
    storage_options: Mapping[str, Any] | None = None,
    on_batch: Callable[[int, int], None] = lambda *_: None,
) -> Fidelity:
    """Measure by replay what the rounding of stored residual streams does to the model's output.

    For each stored site of the residual stream whose rows are rounded, the stored rows replace the computed ones, and
    the output is compared with that of the unchanged model. The figures are written to ``fidelity.json`` in the
    archive; `residua info` shows them. The processes of a launch share the batches; see docs/distributed.md.

    Args:
        model: The model that was captured: a transformers model, or a hub id or folder of one; or the schedule of a
            torch pipeline, as `residua.replay` takes it.
        archive: The archive, or its path or its address in a bucket.
        n_batches: How many batches of the plan run; they are chosen at random from the captured ones.
        seed: Seed of the choice.
        device: Device of the model, if it is loaded here.
        tp: Number of processes of tensor parallelism, if it is loaded here.
        pp: Number of pipeline stages, if it is loaded here.
        storage_options: For an address, as for `residua.open`.
        on_batch: Called after each batch with the numbers of finished batches and of all batches.

    Returns:
        Divergence and agreement by site.

    Raises:
        PlanError: The model is not the captured one, no stored residual stream is rounded, or the archive was captured
            during a replay.
        NotCapturedError: Nothing is captured yet.
        CaptureError: The model gave no logits, or another process that shares the work is gone.

    Example:
        >>> found = residua.fidelity("models/pydoc-1m", "acts.zarr")  # doctest: +SKIP
        >>> found.sites["resid_post.3"].kl_mean  # doctest: +SKIP
    """
    model, archive = model_first(model, archive, "residua.fidelity")
    place = open_archive(archive, storage_options=storage_options)
    opened = main_archive(place)
    refuse_replay(opened, "residua fidelity")
    names = _rounded_streams(place)
    place.refuse_losses(names, "residua fidelity")
    of_stacks = [(one, own) for one in archives_of(place) if (own := [name for name in names if name in one.sites])]
    places = [try_result_place(one.place, one.storage_options).out for one, _ in of_stacks]
    batches = [batch.examples.tolist() for batch in sample_batches(opened, n_batches, seed)]
    settings = CaptureSettings(device=device, tp=tp, pp=pp)
    with (
        working_together(None, settings, job=f"fidelity {archive}") as membership,
        replayed_model(opened, model, settings) as loaded,
        ExitStack() as stack,
    ):
        for one in archives_of(place):
            stack.enter_context(running_as_captured(one, loaded))
        plain = Replayer(loaded, place)
        if plain.lacks_logits:
            raise PlanError(plain.lacks_logits)
        stored = {name: Replayer(loaded, place, at=name, checked=plain.checked) for name in names}
        shared = SharedWork(membership, loaded, alike=runs_alike(loaded))
        shared.agree_on({"archive": opened.plan.digest, "batches": batches})
        found = shared.found(
            len(batches),
            lambda number: _compare(batches[number], plain, stored),
            close=lambda everything: _write(zip(places, of_stacks, strict=True), _total(everything)),
            on_unit=on_batch,
        )
    return _total(found)


def _compare(examples: Sequence[int], plain: Replayer, stored: Mapping[str, Replayer]) -> dict[str, Any]:
    """Compare the output of one batch, from the stored rows of each site, with that of the unchanged model."""
    batch = plain.batch(examples)
    original = torch.cat(plain.run(batch).require_logits())
    sites = {}
    for name, replayer in stored.items():
        sites[name] = _compared(original, torch.cat(replayer.run(batch).require_logits()))
    return {"n_examples": len(batch.rows), "n_tokens": len(original), "sites": sites}


def _compared(original: torch.Tensor, logits: torch.Tensor) -> dict[str, float]:
    """Return sum and maximum of the divergences of a batch's tokens, and how many tokens have the same top 1."""
    kl = token_divergences(original, logits).clamp_min(0)  # rounding may make it negative by the last bit
    same = int((original.argmax(-1) == logits.argmax(-1)).sum())
    return {"kl": float(kl.double().sum()), "kl_max": float(kl.max()), "same": same}


def _write(of_stacks: Iterable[tuple[Destination, tuple[Archive, Sequence[str]]]], found: Fidelity) -> None:
    """Write to each archive the figures of its own sites."""
    for out, (archive, names) in of_stacks:
        own = replace(found, sites={name: found.sites[name] for name in names})
        write_fidelity(out, archive.plan, own)


def _total(found: Sequence[Mapping[str, Any]]) -> Fidelity:
    """Sum over the batches in their order, so that the sums do not depend on the number of processes."""
    n_tokens = sum(batch["n_tokens"] for batch in found)
    sites = {}
    for name in found[0]["sites"]:
        batches = [batch["sites"][name] for batch in found]
        sites[name] = SiteFidelity(
            kl_mean=sum(batch["kl"] for batch in batches) / n_tokens,
            kl_max=max(batch["kl_max"] for batch in batches),
            top1_agreement=sum(batch["same"] for batch in batches) / n_tokens,
        )
    return Fidelity(sites=sites, n_examples=sum(batch["n_examples"] for batch in found), n_tokens=n_tokens)


def _rounded_streams(archive: Archive) -> list[str]:
    """Return the stored sites of the residual stream whose rows are rounded."""
    stream = [name for name in archive.sites if parse_site(name).kind in _STREAM]
    plans = {name: archive.of_sites(name).plan for name in stream}
    found = [name for name, plan in plans.items() if is_rounded(plan.site(name), plan.model["dtype"])]
    if not found:
        raise PlanError(
            f"{archive.place} has no residual stream that is rounded ({', '.join(stream) or 'none is stored'}), so "
            "there is nothing to measure"
        )
    return found

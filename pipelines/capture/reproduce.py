"""Reproducing: capture a sample of an archive's batches again and compare, so that others can check an archive."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike

from transformers import PreTrainedModel

from residua.capture.forward.batches import BatchRunner
from residua.capture.identity.compare import RowComparison, SiteComparison
from residua.capture.identity.provenance import check_model, running_as_captured
from residua.capture.replay.recorded_inputs import RecordedInputs
from residua.capture.runtime.sharded import without_gradients
from residua.capture.sites.names_to_modules import resolve_sites
from residua.capture.taps.reading import reading
from residua.pipelines.capture.captured_batches import refuse_replay, sample_batches
from residua.pipelines.setup.capture_settings import CaptureSettings
from residua.pipelines.setup.models import captured_model, model_first
from residua.store.base.errors import PlanError, few
from residua.store.read.archive import Archive
from residua.store.read.stacks import open_archive


@dataclass(frozen=True, kw_only=True, repr=False)
class Reproduction:
    """What a reproduction found.

    Attributes:
        sites: Per site, how its rows compare.
        n_batches: Batches that were run again.
        differences: Conditions that differ from those of the capture, one sentence each.
    """

    sites: dict[str, SiteComparison]
    n_batches: int
    differences: tuple[str, ...]

    def __repr__(self) -> str:
        unequal = [name for name, site in self.sites.items() if site.equal_rows != site.rows]
        found = f"{few(unequal)} differ" if unequal else "every row is equal bit for bit"
        return f"<Reproduction of {len(self.sites)} sites in {self.n_batches} batches: {found}>"

    @property
    def is_exact(self) -> bool:
        """Whether every compared row is equal bit for bit."""
        return all(site.equal_rows == site.rows for site in self.sites.values())


def reproduce(
    model: str | PathLike[str] | PreTrainedModel,
    archive: Archive | str | PathLike[str],
    *,
    n_batches: int = 4,
    seed: int = 0,
    device: str = "auto",
    on_batch: Callable[[int, int], None] = lambda *_: None,
) -> Reproduction:
    """Run a sample of an archive's batches through `model` again and compare every site with what is stored.

    Args:
        model: The model that was captured: a transformers model, or a hub id or folder of one.
        archive: The archive, or its path or address.
        n_batches: How many batches to run; they are chosen at random from those that are captured in full.
        seed: Seed of the choice.
        device: Device of the model, if it is loaded here.
        on_batch: Called with the batches done and in all, after each.

    Returns:
        How the rows compare. On one kind of machine, with the same versions and threads, they are equal bit for bit
        (lossy presets aside).

    Raises:
        PlanError: The model is not the one that was captured, or the archive has no batches of its own, is one of a
            replay, or has examples with images, which are not stored.
        NotCapturedError: Nothing is captured yet.
    """
    model, archive = model_first(model, archive, "residua.reproduce")
    opened = open_archive(archive)
    refuse_replay(opened, "residua reproduce")
    plan = opened.plan
    if plan.n_rows is None and not plan.batch_tokens:
        raise PlanError(f"{archive} was recorded in a loop of its user's: its batches are not known, nothing to repeat")
    batches = sample_batches(opened, n_batches, seed)
    model = captured_model(opened, model, CaptureSettings(device=device))
    RecordedInputs(opened, model).require([example for batch in batches for example in batch.examples.tolist()])
    infos = resolve_sites(model, list(opened.sites))
    comparison = RowComparison(opened)
    runner = BatchRunner(model, plan, opened.example_table, comparison)
    with ExitStack() as stack:
        stack.enter_context(running_as_captured(opened, model))
        check = check_model(opened, model, exact=True)
        stack.enter_context(without_gradients(model))
        taps = stack.enter_context(reading(model, infos, runner.put))
        for done, batch in enumerate(batches, start=1):
            for _ in runner.run(batch):
                taps.end_forward()
            on_batch(done, len(batches))
    return Reproduction(sites=comparison.sites, n_batches=len(batches), differences=check.notes)

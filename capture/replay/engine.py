"""Running batches of an archive's examples through the model again, from stored rows and with edits.

`Replayer` is the machinery below `residua.replay`, for one batch after another: everything that does not depend on
the batch is resolved and checked once, and every pass attaches its hooks and takes exactly these away again.

Legend: `B` examples in the batch, `T` padded positions, `V` vocabulary.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from residua.capture.buffers.row_index import batch_rows
from residua.capture.edits.prepare import edits_at
from residua.capture.edits.stored_rows import StoredRows
from residua.capture.forward.inputs import forward_kwargs
from residua.capture.forward.plan_batch import PlanBatch, microbatches, plan_batch
from residua.capture.identity.provenance import ModelCheck, check_model
from residua.capture.replay.notes import attention_notes, check_injection, storage_notes, why_in_full
from residua.capture.replay.passes import Pass, kept_rows, token_logits
from residua.capture.replay.skipping import Skip, skip_below, skipping
from residua.capture.replay.start import start_of
from residua.capture.replay.steps import Step, graph_begins, stored_rows_in
from residua.capture.runtime.devices import input_device
from residua.capture.runtime.pipeline_schedule import runnable, staged_of
from residua.capture.runtime.process_groups import tensor_parallel_group
from residua.capture.runtime.wrappers import core_of
from residua.capture.sites.anatomy import Anatomy
from residua.capture.sites.attention import eager_where_needed
from residua.capture.sites.pipeline_stages import target_of
from residua.capture.sites.reference_model import whole_anatomy, whole_sites
from residua.capture.sites.site import SiteInfo
from residua.capture.taps.pipeline_gradients import end_here
from residua.capture.taps.tap import tap
from residua.store.base.errors import NotCapturedError, PlanError
from residua.store.edits.edit import Edit
from residua.store.edits.selection import RowChooser
from residua.store.read.archive import Archive


class Replayer:
    """Runs batches from stored rows, with edits.

    Args:
        model: The model that was captured, wrapped and spread as it likes, in evaluation mode.
        archive: The archive.
        at: Sites whose stored rows go in; none, and the model runs in full.
        edits: What is changed, in order.
        force: Take a model that is not the one that was captured.
        tensor_parallel: As for `tap`.
        checked: What comparing the model with the archive found, if that was done already.

    Attributes:
        checked: What comparing the model with the archive found.
        notes: What a reader of the results has to know, one sentence each.

    Raises:
        PlanError: An edit, a site or the model does not fit the archive; nothing has run by then.
        UnknownSiteError: The model or the archive does not have a site.
    """

    def __init__(
        self,
        model: nn.Module,
        archive: Archive,
        *,
        at: Iterable[str] = (),
        edits: Sequence[Edit] = (),
        force: bool = False,
        tensor_parallel: ProcessGroup | DeviceMesh | None = None,
        checked: ModelCheck | None = None,
    ) -> None:
        self.archive = archive
        self.stored = StoredRows(archive)
        self.edits = tuple(edits)
        self.model = model
        self.group = tensor_parallel
        self._anatomy = _language_model(model)
        self.start = start_of(self._injected(at), self._anatomy)
        self._infos: dict[str, SiteInfo] = {}
        infos = self.known(self.start.sites)
        split_over = tensor_parallel_group(self.core, tensor_parallel)
        is_owner = split_over is None or dist.get_rank(split_over) == 0
        self._read_here = frozenset(target_of(model).here(infos)) if is_owner else frozenset()
        for name, info in infos.items():
            check_injection(archive, name, info)
        self.chooser = RowChooser(archive)
        self.edits_at = edits_at(edits, self.core, self.stored, self.chooser)
        for edit in self.edits_at:
            self._infos |= edit.infos
            for name in edit.actions:
                self.refuse_below(name, f"edit {edit.number} ({edit.edit.kind} at {name})")
        self.checked = check_model(archive, model, force=force) if checked is None else checked
        self._changed = [info for edit in self.edits_at for info in edit.infos.values()]
        told = (*self.checked.notes, *storage_notes(archive, infos, self.edits_at))
        self.notes = tuple(dict.fromkeys([*told, *attention_notes(self.core, self._changed)]))

    @property
    def core(self) -> PreTrainedModel:
        """The model inside wrappers."""
        return self._anatomy.model

    def _injected(self, at: Iterable[str]) -> tuple[str, ...]:
        wanted = list(at)
        return self.archive.select(wanted) if wanted else ()

    def known(self, names: Iterable[str]) -> dict[str, SiteInfo]:
        """Return what is known of sites; each is looked up once, which for some models means running them."""
        wanted = list(names)
        if unknown := [name for name in wanted if name not in self._infos]:
            self._infos |= whole_sites(self.core, unknown)
        return {name: self._infos[name] for name in wanted}

    def refuse_below(self, name: str, what: str) -> None:
        """Raise PlanError if a site lies below the rows that are put in, so that nothing of it reaches the logits."""
        if self.start.is_below(name, self._anatomy):
            raise PlanError(
                f"{what}: it lies below {self.start.site}, where the stored rows go in, so it has no part in what "
                "follows. Put rows in further down with at= or --at, or leave that out and put in none."
            )

    def sites(self, patterns: str | Iterable[str]) -> tuple[str, ...]:
        """Return the model's sites that `patterns` name.

        Raises:
            UnknownSiteError: The model has no such site.
            PlanError: A site lies below the rows that are put in, or has no rows.
        """
        words = [patterns] if isinstance(patterns, str) else list(patterns)
        infos = whole_sites(self.core, words) if words else {}
        for name, info in infos.items():
            self.refuse_below(name, f"{name} was asked for")
            if not info.per_token or info.site.top is not None:
                raise PlanError(f"{name} does not hold one entry a token that could be read; choose another site")
        self._infos |= infos
        return tuple(infos)

    def batch(self, examples: Sequence[int], *, padding: str | None = None) -> PlanBatch:
        """Return the batch of some examples, in this order.

        Raises:
            PlanError: There are none, or no such example.
            NotCapturedError: The archive is still being recorded, and an example is not whole yet.
        """
        table = self.archive.example_table
        wrong = [number for number in examples if not 0 <= number < len(table)]
        if wrong or not examples:
            raise PlanError(f"examples {wrong[:3]}: the archive has {len(table):,}, counted from 0; name at least one")
        side = self.archive.plan.padding if padding is None else padding
        made = plan_batch(table, examples, side="left" if side == "left" else "right", device=input_device(self.core))
        for example in made.rows:
            stop = example.first_row + len(example.positions)
            if stop > self.archive.n_rows:
                raise NotCapturedError(f"example {example.example} is not captured whole yet: choose an earlier one")
        return made

    def prefetch(self, batch: PlanBatch) -> None:
        """Begin to read the rows that go in, in the process that puts them in: no other ever needs them."""
        for site in self._read_here:
            self.stored.prefetch(site, batch_rows(batch.rows, batch.n_positions).row)

    def starts_at(self, batch: PlanBatch) -> tuple[Skip, str]:
        """Return the blocks that `batch` does without, and why it is none of them where it could be."""
        why = why_in_full(self.start, self._anatomy, batch)
        if why or not self.start.block:
            return Skip(()), why
        found = skip_below(self._anatomy, self.start.block)
        model = type(self.core).__name__
        return found, f"{model} cannot leave out its lower blocks: {found.problem}" if found.problem else ""

    def run(
        self,
        batch: PlanBatch,
        keep: Sequence[str] = (),
        *,
        edited: bool = True,
        needs_logits: bool = True,
        grad: bool = False,
    ) -> Pass:
        """Run one batch.

        Args:
            batch: As `batch` makes it.
            keep: Sites whose rows come back, as `sites` gives them.
            edited: Whether the edits apply.
            needs_logits: Whether logits come back.
            grad: Whether logits and kept rows are parts of autograd's graph, which begins at the injected rows; at
                the embeddings, if none are.

        Raises:
            PlanError: Gradients of a torch pipeline were asked for.
        """
        staged = staged_of(self.core)
        if staged is None:
            return self._pass(batch, keep, edited=edited, needs_logits=needs_logits, grad=grad)
        if grad:
            raise PlanError(
                "gradients were asked for of a torch pipeline, whose schedule alone runs backward passes: tap its "
                "stage with backward=True, or replay the model in one process or in transformers' own pipeline"
            )
        parts = [
            self._pass(part, keep, edited=edited, needs_logits=needs_logits, grad=False)
            for part in microbatches(batch, staged.n_microbatches)
        ]
        met = dict.fromkeys(name for part in parts for name in part.sites)
        sites = {name: [rows for part in parts for rows in part.sites[name]] for name in met}
        logits = [rows for part in parts for rows in part.logits or ()]
        return Pass(logits=staged.to_all(logits) if needs_logits else None, sites=sites, nodes={}, end=())

    def _pass(self, batch: PlanBatch, keep: Sequence[str], *, edited: bool, needs_logits: bool, grad: bool) -> Pass:
        """Run one forward pass."""
        kept: dict[str, list[Tensor]] = {}
        nodes: dict[str, Tensor] = {}
        steps = self.steps(batch, edited=edited, leaves=nodes if grad else None)
        skip, _ = self.starts_at(batch)  # before anything is tapped: it may have to try the model

        def pass_by(name: str, tensor: Tensor) -> Tensor | None:
            new = tensor
            for step in steps.get(name, ()):
                new = step(new)
            if name in keep:
                kept[name] = kept_rows(batch, new, name)
                nodes.setdefault(name, new)
            return new if name in steps or grad else None

        with torch.set_grad_enabled(grad), ExitStack() as stack:
            stack.enter_context(eager_where_needed(self.core, self._changed))  # without edits too, to compare alike
            wanted = self.known(dict.fromkeys([*steps, *keep]))
            if wanted:
                stack.enter_context(tap(self.model, wanted, pass_by, differentiable=grad, tensor_parallel=self.group))
            stack.enter_context(skipping(skip))
            output = runnable(self.model)(**self.kwargs(batch, needs_logits=needs_logits))
        logits = token_logits(batch, output) if needs_logits and target_of(self.model).gives_logits else None
        return Pass(logits=logits, sites=kept, nodes=nodes if grad else {}, end=end_here(self.model) if grad else ())

    def check(self, batches: Iterable[PlanBatch]) -> tuple[str, ...]:
        """Look at everything that `run` needs for some batches, so that it fails before the model runs or never.

        Returns:
            One sentence for each edit that means none of their tokens.

        Raises:
            PlanError: An edit needs stored rows that there are not, or the model's type cannot hold what goes in.
            NotCapturedError: Rows are not captured yet.
        """
        n_changed = {edit.number: 0 for edit in self.edits_at}
        for batch in batches:
            self.steps(batch, edited=False)
            for edit in self.edits_at:
                chosen = edit.chosen(batch)
                n_changed[edit.number] += len(chosen.source)
                edit.steps(chosen)
        return tuple(
            f"edit {edit.number} ({edit.edit.kind} at {', '.join(edit.edit.sites)}) changes nothing: none of the "
            "tokens that run is one that it means"
            for edit in self.edits_at
            if not n_changed[edit.number]
        )

    def kwargs(self, batch: PlanBatch, *, needs_logits: bool = True) -> dict[str, Tensor | bool | int]:
        """Return the arguments of the model's forward for a batch, as a capture makes them."""
        padded = batch.padded
        return forward_kwargs(runnable(self.core), padded.input_ids, padded.attention_mask, needs_logits=needs_logits)

    def steps(
        self, batch: PlanBatch, *, edited: bool, leaves: dict[str, Tensor] | None = None
    ) -> dict[str, list[Step]]:
        """Return what is done at each site, in order, to its (B, T, *row) tensor.

        Args:
            batch: As `batch` makes it.
            edited: Whether the edits apply.
            leaves: Where the tensors go at which autograd's graph begins; it has none unless given.

        Raises:
            PlanError: An edit needs stored rows that there are not, or the model's type cannot hold what goes in.
            NotCapturedError: Rows that go in are not captured yet.
        """
        steps: dict[str, list[Step]] = {
            name: [stored_rows_in(self.stored, name, batch, self._infos[name].dtype)] for name in self.start.sites
        }
        if leaves is not None:
            for name in steps or ["embed"]:
                steps[name] = [*steps.get(name, []), graph_begins(name, leaves)]
        for edit in self.edits_at if edited else ():
            for name, step in edit.steps(edit.chosen(batch)).items():
                steps.setdefault(name, []).append(step)
        return steps


def _language_model(model: nn.Module) -> Anatomy:
    anatomy = whole_anatomy(model)
    if anatomy is None:
        raise PlanError(f"{type(core_of(model)).__name__} is no language model over token ids, which replay needs")
    return anatomy

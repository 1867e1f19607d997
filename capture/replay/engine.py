"""How runs and replays run: batches of examples through the model, from stored rows if there are any, with edits.

`Replayer` checks and resolves everything that does not depend on the batch, once. `Replayer.changing` is one replay
pass: while the model runs inside, stored rows go in, edits apply and skipped blocks do nothing; leaving takes away
exactly what was attached. `Replayer.run` makes a pass and returns logits and rows.

Legend: `B` examples in the batch, `T` padded positions, `H` heads, `K` keys, `V` vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from residua.capture.buffers.host_buffers import torch_dtype
from residua.capture.buffers.row_index import Indices, batch_rows
from residua.capture.edits.action import SiteRows, Step, refuse_overflow
from residua.capture.edits.prepare import prepare_edits, with_rows
from residua.capture.edits.stack_rows import ModelRows, StackRows
from residua.capture.forward.inputs import forward_kwargs, pair_arguments
from residua.capture.forward.plan_batch import PlanBatch, microbatches, one_by_one, plan_batch, some_of
from residua.capture.hooks.attention import eager_where_needed
from residua.capture.hooks.site import SiteInfo
from residua.capture.identity.padding import RAN_ALONE, padding_leaks
from residua.capture.identity.prediction import no_loss, prediction_of
from residua.capture.identity.provenance import ModelCheck, check_model
from residua.capture.layout.process_layout import spans_processes
from residua.capture.replay.notes import Reach, attention_notes, batch_note, reach_notes, storage_notes
from residua.capture.replay.passes import Pass, in_order, joined, kept_rows, logits_of_batch
from residua.capture.replay.prompts import Prompts
from residua.capture.replay.recorded_inputs import RecordedInputs
from residua.capture.replay.start import Skip, skip_for, skipping, start_of
from residua.capture.runtime.collectives import all_gather_objects
from residua.capture.runtime.devices import input_device
from residua.capture.runtime.pipeline_schedule import runnable, stage_model_of
from residua.capture.runtime.process_groups import pipeline_group, tensor_parallel_group
from residua.capture.runtime.sharded import is_sharded
from residua.capture.runtime.wrappers import core_of
from residua.capture.sites.anatomy import Anatomy, n_logits_of
from residua.capture.sites.pipeline_stages import target_of
from residua.capture.sites.reference_model import unsharded_anatomy, unsharded_sites
from residua.capture.sites.stacks import PAIR_STACKS, anatomies_in_stacks, is_encoder_decoder
from residua.capture.taps.pipeline_gradients import end_here
from residua.capture.taps.tap import tap
from residua.store.base.errors import NotCapturedError, PlanError, few
from residua.store.base.naming import named
from residua.store.edits.edit import Edit
from residua.store.read.archive import Archive
from residua.store.read.stacks import main_archive

BatchT = TypeVar("BatchT")


class Replayer:
    """Runs batches of one archive, or of prompts, with one model, start and list of edits.

    Args:
        model: The model, in evaluation mode; it may be wrapped and spread over processes. With an archive, the model
            that was captured.
        source: The archive, or the prompts of a run; of an encoder-decoder the folder of both stacks, or the archive of
            one.
        at: Sites whose stored rows go in; without any, the model runs in full.
        edits: The edits, in order.
        force: Accept a model that is not the captured one, and examples whose further inputs are not stored.
        inputs: Further inputs of the model, by name, for the examples of a batch in their order.
        tensor_parallel: As for `tap`.
        checked: The result of comparing the model with the archive, if that was done already.
        stored: Rows for edits that bring some in: those of the archive unless given; prompts need them.

    Attributes:
        source: The archive or the prompts whose positions the logits are of: in an encoder-decoder the decoder's.
        rows: The rows that go in, and those that edits bring in, of all stacks.
        edits: The prepared edits.
        model: The model as it was given.
        core: The model inside wrappers.
        group: `tensor_parallel`.
        recorded: What examples were recorded with beside tokens and mask.
        start: Where the stored rows go in.
        checked: The result of comparing the model with the archive; it says nothing for prompts.
        gives_example_logits: Whether the model is a classifier of whole examples.
        notes: What a reader of the results has to know, one sentence each.

    Raises:
        PlanError: An edit, a site or the model does not fit the archive. The model has not run.
        UnknownSiteError: The model or the archive does not have a site.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Archive | Prompts,
        *,
        at: str | Iterable[str] | None = None,
        edits: Sequence[Edit] = (),
        force: bool = False,
        tensor_parallel: ProcessGroup | DeviceMesh | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        checked: ModelCheck | None = None,
        stored: SiteRows | None = None,
    ) -> None:
        self.model = model
        self.group = tensor_parallel
        anatomies = _stacks_of_blocks(model)
        self.core: PreTrainedModel = next(iter(anatomies.values())).model
        if isinstance(source, Archive) and not is_encoder_decoder(self.core):  # a tower's rows go into no run
            source = main_archive(source)
        self.rows = ModelRows(source, self.core, stored)
        self.source = main_archive(source) if isinstance(source, Archive) else source
        archive = self.source if isinstance(self.source, Archive) else None
        self.recorded = RecordedInputs(archive, self.core, given=inputs, force=force)
        places = [] if at is None else [at] if isinstance(at, str) else list(at)
        all_rows = source if isinstance(source, Archive) else self.rows.main.archive if places else None
        self.start = start_of(all_rows.select(places) if all_rows is not None and places else (), anatomies)
        self._infos: dict[str, SiteInfo] = {}
        infos = self.infos(self.start.sites)
        split_over = tensor_parallel_group(self.core, tensor_parallel)
        is_owner = split_over is None or dist.get_rank(split_over) == 0
        self._read_here = frozenset(target_of(model).here(infos)) if is_owner else frozenset()
        for name, info in infos.items():
            _check_injection(self.rows.of([info]).archive, name, info)
        self.edits = prepare_edits(edits, self.core, self.rows.of)
        for edit in self.edits:
            self._infos |= edit.infos
            for name in edit.actions:
                self.refuse_below(name, f"edit {edit.number} ({edit.edit.kind} at {name})")
        if checked is None and archive is not None:
            checked = check_model(archive, model, force=force)
        self.checked = checked or ModelCheck(identity={}, notes=())
        if is_sharded(model):
            padding_leaks(model)  # now, when all workers are here: their batches may differ
        self.gives_example_logits = _gives_example_logits(model, self.core)
        self._edited_infos = [info for edit in self.edits for info in edit.infos.values()]
        notes = [*self.checked.notes, *self.recorded.notes]
        for one in self.rows.sources:
            of_one = {name: info for name, info in infos.items() if self.rows.of([info]).source is one}
            notes += storage_notes(one, of_one, self.edits)
        self.notes = tuple(dict.fromkeys([*notes, *attention_notes(self.core, self._edited_infos)]))

    @property
    def archive(self) -> Archive:
        """The archive.

        Raises:
            PlanError: The examples are those of a run.
        """
        return self.rows.main.archive

    @property
    def changed_sites(self) -> tuple[str, ...]:
        """The sites that take stored rows, and those that are edited."""
        return (*self.start.sites, *(name for edit in self.edits for name in edit.actions))

    @property
    def predicts_next(self) -> bool:
        """Whether the model's logits predict the next token; some models run to find out, on all processes."""
        return not no_loss(self.model, prediction_of(self.model))

    def require_loss(self) -> None:
        """Raise PlanError if the model's logits do not predict the next token."""
        if lacks := no_loss(self.model, prediction_of(self.model)):
            raise PlanError(f"a loss was asked for, and {lacks}. Use kl, logit_difference or the logits")

    def infos(self, names: Iterable[str]) -> dict[str, SiteInfo]:
        """Return what is known of sites; each is looked up once, because for some models this runs them."""
        wanted = list(names)
        if unknown := [name for name in wanted if name not in self._infos]:
            self._infos |= unsharded_sites(self.core, unknown)
        return {name: self._infos[name] for name in wanted}

    def refuse_below(self, name: str, what: str) -> None:
        """Raise PlanError if a site lies below the rows that go in, so that nothing of it reaches the logits."""
        above = self.start.above(name)
        if above is not None:
            raise PlanError(
                f"{what}: it lies below {above}, where the stored rows go in, so it has no effect on what "
                f"follows. Put rows in at a lower site with {named('at')}, or leave it out and put in none."
            )

    def readable_sites(self, patterns: Sequence[str]) -> tuple[str, ...]:
        """Return the model's sites that `patterns` name.

        Raises:
            UnknownSiteError: The model has no such site.
            PlanError: A site lies below the rows that go in, or has no rows.
        """
        infos = unsharded_sites(self.core, list(patterns)) if patterns else {}
        for name, info in infos.items():
            self.refuse_below(name, f"{name} was asked for")
            if not info.per_token or info.site.top is not None:
                raise PlanError(f"{name} does not hold one entry per token that could be read; choose another site")
            self.rows.of([info])
        self._infos |= infos
        return tuple(infos)

    def batch(self, examples: Sequence[int], *, padding: Literal["left", "right"] | None = None) -> PlanBatch:
        """Return the batch of some examples, in this order, padded as the plan says unless `padding` is given.

        Raises:
            PlanError: No example is named, one does not exist, or one was recorded with inputs that are not stored.
            NotCapturedError: The archive is still being recorded, and an example is not complete yet.
        """
        table = self.source.example_table
        wrong = [number for number in examples if not 0 <= number < len(table)]
        if wrong or not examples:
            raise PlanError(
                f"examples {wrong[:3]}: {self.source.place} has {len(table):,}, counted from 0; name at least one"
            )
        self.recorded.require(examples)
        side = padding or (self.source.plan.padding if isinstance(self.source, Archive) else "right")
        batch = plan_batch(table, examples, side=side, device=input_device(self.core))
        if self.gives_example_logits:
            batch = _padded_with(batch, getattr(self.core.config, "pad_token_id", None))
        for example in batch.rows:
            if example.first_row + len(example.positions) > self.source.n_rows:
                raise NotCapturedError(
                    f"example {example.example} is not captured completely yet: choose an earlier one"
                )
        return replace(batch, inputs=self.recorded.of(batch), source=self._sources(batch))

    def _sources(self, batch: PlanBatch) -> PlanBatch | None:
        """Return the batch of the sources; with the places of their rows if these are stored."""
        encoder = self.rows.get("encoder")
        if batch.source is None or encoder is None:
            return batch.source
        table, examples = encoder.source.example_table, [example.example for example in batch.rows]
        found = plan_batch(table, examples, side="right", device=batch.padded.input_ids.device)
        if not torch.equal(found.padded.input_ids, batch.source.padded.input_ids):
            raise PlanError(
                f"examples {few(examples)} have other sources in {encoder.source.place} than in {self.source.place}: "
                "the two archives are not of one capture"
            )
        return found

    def check(self, batch: PlanBatch) -> None:
        """Check everything that `run` needs for a batch, so that it fails before the model runs or never.

        Raises:
            PlanError: An edit needs stored rows that do not exist, or the model's type cannot hold what goes in.
            NotCapturedError: Rows are not captured yet.
        """
        self.steps(batch, edited=True)

    def reach(self, batch: PlanBatch) -> Reach:
        """Return how many tokens of a batch each edit changes, and how many of its next tokens have no logit."""
        n_logits = n_logits_of(self.core)
        lost = [0 if n_logits is None else int((one.input_ids[1:] >= n_logits).sum()) for one in batch.rows]
        return Reach(n_changed=[len(edit.choose(batch).source) for edit in self.edits], n_lost=sum(lost))

    def reach_notes(self, reach: Reach) -> list[str]:
        """Return one sentence for each edit that changes none of the tokens, and one if next tokens have no logit."""
        return reach_notes(reach, self.edits, n_logits_of(self.core))

    def prefetch(self, batch: PlanBatch) -> None:
        """Start to read the rows that go in, if this is the process that puts them in, and they go in at once."""
        if len(self.passes(batch)) > 1:
            return
        for site in self._read_here:
            here = self.batch_of(site, batch)
            self._rows_of(site).stored.prefetch(site, batch_rows(here.rows, here.n_positions).row)

    def prefetching(self, batches: Iterable[BatchT], batch_of: Callable[[BatchT], PlanBatch]) -> Iterator[BatchT]:
        """Yield batches, of which `batch_of` gives the examples; the rows of the next one are read meanwhile."""
        waiting: list[BatchT] = []
        for batch in batches:
            if waiting:
                self.prefetch(batch_of(batch))
                yield waiting.pop()
            waiting.append(batch)
        yield from waiting

    def passes(self, batch: PlanBatch, *, grad: bool = False) -> list[PlanBatch]:
        """Return the batches in which the examples of `batch` run: one, unless padding would change their rows.

        The model may run over a few tokens to find that out.

        Raises:
            PlanError: Gradients are asked for, which need one pass, and there would have to be several.
        """
        n_lengths = max(len({len(example.input_ids) for example in one.rows}) for one in (batch, batch.source or batch))
        ran_alone = isinstance(self.source, Archive) and self.source.plan.batch_tokens == 1
        if len(batch.rows) == 1:
            return [batch]
        groups = self.groups(batch)
        if len(groups) > 1:
            self._refuse_groups(groups, grad=grad)
            return [one for group in groups for one in self.passes(group)]
        if n_lengths == 1 and (grad or not ran_alone):
            return [batch]
        if not padding_leaks(self.model) and not (self.gives_example_logits and not _marks_padding(self.core, batch)):
            return [batch]
        if self.recorded.given:
            raise PlanError(
                f"inputs of {len(batch.rows)} examples were given, and padding changes the rows of this model, so they "
                "have to run one by one: replay one example at a time"
            )
        if grad:
            raise PlanError(
                f"gradients of {len(batch.rows)} examples of {n_lengths} lengths were asked for, and padding changes "
                "the rows of this model, which does not keep to the attention mask: replay one example at a time, or "
                "examples of equal length"
            )
        return one_by_one(batch)

    def groups(self, batch: PlanBatch) -> list[PlanBatch]:
        """Return the batches that prompts run in, each padded to its longest; those of an archive run in one."""
        if not isinstance(self.source, Prompts):
            return [batch]
        place_of = {example.example: place for place, example in enumerate(batch.rows)}
        groups = ([place_of[number] for number in numbers if number in place_of] for numbers in self.source.batches)
        found = [places for places in groups if places]
        return [batch] if len(found) == 1 else [some_of(batch, places) for places in found]

    def _refuse_groups(self, groups: Sequence[PlanBatch], *, grad: bool) -> None:
        if grad:
            raise PlanError(
                f"gradients need one forward pass, and the examples run in {len(groups)}: raise {named('batch_tokens')}"
                ", or give fewer examples"
            )
        if self.recorded.given:
            raise PlanError(
                f"{few(list(self.recorded.given))} was given for all examples, and they run in {len(groups)} batches: "
                f"raise {named('batch_tokens')}, or give fewer examples"
            )

    def batch_notes(self, batch: PlanBatch) -> dict[str, str]:
        """Return, by kind, how the passes of `batch` differ from the capture's, and whether its examples run alone."""
        passes = self.passes(batch)
        if isinstance(self.source, Prompts):
            other = ""
        else:
            stacks = [self.rows.main, *(self._rows_of(name) for name in self.start.sites)]
            archives = {one.stack: one.archive for one in stacks}.values()
            numbers = [[example.example for example in one.rows] for one in passes]
            others = (batch_note(archive, examples) for archive in archives for examples in numbers)
            other = next(filter(None, others), "")
        notes = {"other batch": other, "alone": RAN_ALONE if len(passes) > len(self.groups(batch)) else ""}
        return {kind: note for kind, note in notes.items() if note}

    def skip(self, batch: PlanBatch) -> Skip:
        """Return the blocks that `batch` skips, and why it has to run in full if it could skip some."""
        return skip_for(self.start, batch)

    def run(
        self,
        batch: PlanBatch,
        keep: Sequence[str] = (),
        *,
        edited: bool = True,
        grad: bool = False,
    ) -> Pass:
        """Run one batch.

        Args:
            batch: The batch, as `batch` makes it.
            keep: Sites whose rows are returned, as `readable_sites` gives them.
            edited: Whether the edits apply.
            grad: Whether logits and kept rows are part of autograd's graph, which starts at the injected rows, or at
                the embeddings if no rows go in.

        Raises:
            PlanError: Gradients of a torch pipeline were asked for, or of examples that have to run one by one.
        """
        stage_model = stage_model_of(self.core)
        if stage_model is None:
            passes = self.passes(batch, grad=grad)
            found = joined([self._pass(one, keep, edited=edited, grad=grad) for one in passes])
            return in_order(found, passes, batch)
        if batch.inputs or self.recorded.given:
            raise PlanError(
                f"a torch pipeline takes tokens alone, and these examples ran with "
                f"{few([*batch.inputs, *self.recorded.given])}: replay the model in one process"
            )
        if grad:
            raise PlanError(
                "gradients were asked for of a torch pipeline, whose schedule alone runs backward passes: tap its "
                "stage with backward=True, or replay the model in one process or in transformers' own pipeline"
            )
        found = joined(
            [
                self._pass(microbatch, keep, edited=edited, grad=False)
                for microbatch in microbatches(batch, stage_model.n_microbatches)
            ]
        )
        return replace(found, logits=stage_model.to_all(found.logits))

    def _pass(self, batch: PlanBatch, keep: Sequence[str], *, edited: bool, grad: bool) -> Pass:
        """Run one forward pass."""
        kept: dict[str, list[Tensor]] = {}
        nodes: dict[str, Tensor] = {}

        def to_host(rows: Tensor) -> Tensor:
            """Keep the results of a run in host memory, whose limit the run was checked against."""
            return rows.cpu() if isinstance(self.source, Prompts) and not grad else rows

        def on_kept(name: str, tensor: Tensor) -> None:
            kept[name] = [to_host(rows) for rows in kept_rows(self.batch_of(name, batch), tensor, name)]
            nodes.setdefault(name, tensor)

        kwargs = self._arguments(batch)
        if self.recorded.given or self.recorded.has_images:
            kwargs.pop("position_ids", None)  # images and the like have a say in positions
        kwargs |= {**batch.inputs, **self.recorded.given}
        with (
            torch.set_grad_enabled(grad),
            self.changing(batch, edited=edited, keep=keep, on_kept=on_kept, leaves=nodes if grad else None),
        ):
            output = runnable(self.model)(**kwargs)
        gives = target_of(self.model).gives_logits and not self.lacks_logits
        logits = logits_of_batch(batch, output, of_examples=self.gives_example_logits) if gives else None
        logits = None if logits is None else [to_host(rows) for rows in logits]
        end = end_here(self.model) if grad else ()
        return Pass(logits=logits, sites=kept, nodes=nodes if grad else {}, end=end, lacks=self.lacks_logits)

    def _arguments(self, batch: PlanBatch) -> dict[str, Tensor | bool | int]:
        """Return the arguments of a forward call, without what the examples ran with beside tokens."""
        core, stack = runnable(self.core), self.rows.main.stack
        if not stack:
            return forward_kwargs(core, batch.padded.input_ids, batch.padded.attention_mask)
        return pair_arguments(core)(batch.padded, None if batch.source is None else batch.source.padded, stack)

    @property
    def lacks_logits(self) -> str:
        """Why a replay has no logits of the examples' tokens, as a sentence; empty if nothing speaks against it."""
        if self.rows.main.stack != "encoder":
            return ""
        return (
            f"{self.source.place} has rows of the encoder alone, and logits are of the decoder's tokens, which it "
            "does not have: capture sites of both stacks, and give the folder of both archives"
        )

    def batch_of(self, name: str, batch: PlanBatch) -> PlanBatch:
        """Return the batch that has the positions of a site's rows."""
        return batch.of_stack(self._rows_of(name).stack)

    def _rows_of(self, name: str) -> StackRows:
        """Return the rows of the stack of a site."""
        return self.rows.of(self.infos([name]).values())

    @contextmanager
    def changing(
        self,
        batch: PlanBatch,
        *,
        edited: bool = True,
        keep: Sequence[str] = (),
        on_kept: Callable[[str, Tensor], None] = lambda *_: None,
        leaves: dict[str, Tensor] | None = None,
        skips: bool = True,
    ) -> Iterator[None]:
        """Put the stored rows in, edit and skip blocks while the model runs on `batch` inside.

        Args:
            batch: The batch, as `batch` makes it.
            edited: Whether the edits apply.
            keep: Sites that are read.
            on_kept: Called with the name and the (B, T, *row) tensor of each of them, after the changes there.
            leaves: With gradients: receives the tensors at which autograd's graph starts.
            skips: Whether blocks that need not run are skipped.

        Raises:
            PlanError: An edit needs stored rows that do not exist, or the model's type cannot hold what goes in.
            NotCapturedError: Rows that go in are not captured yet.
        """
        steps = self.steps(batch, edited=edited, leaves=leaves)
        skip = self.skip(batch) if skips else Skip(())  # before anything is attached: it may have to run the model
        sites = self.infos(dict.fromkeys([*steps, *keep]))
        has_grad = leaves is not None

        def change(name: str, tensor: Tensor) -> Tensor | None:
            for step in steps.get(name, ()):
                tensor = step(tensor)
            if name in keep:
                on_kept(name, tensor)
            return tensor if name in steps or has_grad else None

        tapped = tap(self.model, sites, change, differentiable=has_grad, tensor_parallel=self.group)
        with self.attention(), tapped if sites else nullcontext(), skipping(skip):
            yield

    def attention(self) -> AbstractContextManager[None]:
        """Return a context in which the model has eager attention if an edit needs it, whichever tokens it changes.

        Runs with and without edits, batches that an edit leaves alone and captures of a replay then compare.
        """
        return eager_where_needed(self.core, self._edited_infos)

    def steps(
        self, batch: PlanBatch, *, edited: bool, leaves: dict[str, Tensor] | None = None
    ) -> dict[str, list[Step]]:
        """Return the steps at each site, in order; arguments and errors are those of `changing`."""
        steps: dict[str, list[Step]] = {name: [self._injection(name, batch)] for name in self.start.sites}
        if leaves is not None:
            for name in steps or [".".join(filter(None, (self.rows.main.stack, "embed")))]:
                steps[name] = [*steps.get(name, []), _graph_start(name, leaves)]
        for edit in self.edits if edited else ():
            for name, step in edit.steps(edit.choose(batch)).items():
                steps.setdefault(name, []).append(step)
        return steps

    def _injection(self, name: str, batch: PlanBatch) -> Step:
        """Return the step that puts the stored rows of a batch in; only the process that has the site reads them."""
        here = self.batch_of(name, batch)
        rows = batch_rows(here.rows, here.n_positions)
        self._rows_of(name).stored.require(name, rows.row, torch_dtype(self._infos[name].dtype or "float32"))
        return lambda tensor: self.put_in(name, tensor, source=rows.source, row=rows.row)

    def put_in(self, name: str, tensor: Tensor, *, source: Indices, row: Indices) -> Tensor:
        """Return the (B, T, *row) tensor of a site with stored rows in it.

        Args:
            name: The site.
            tensor: Its tensor.
            source: Increasing indices into the first two axes of the tensor.
            row: For each of them the row of the archive.
        """
        stored = self._rows_of(name).stored.read(name, row)
        converted = stored.to(tensor)
        refuse_overflow(name, stored, converted)
        return with_rows(source, tensor, converted)


def _graph_start(name: str, leaves: dict[str, Tensor]) -> Step:
    """Return the step that starts autograd's graph at a site, and puts the tensor there into `leaves`."""

    def start(tensor: Tensor) -> Tensor:
        leaves[name] = tensor.detach().requires_grad_()
        return leaves[name]

    return start


def _gives_example_logits(model: nn.Module, core: PreTrainedModel) -> bool:
    """Return whether a model classifies whole examples; some without an LM head run to find out, on all processes."""
    has_size = n_logits_of(core) is not None  # on the stage of a pipeline that has the head
    return not any(all_gather_objects(pipeline_group(core), has_size)) and prediction_of(model) == "examples"


def _stacks_of_blocks(model: nn.Module) -> dict[str, Anatomy]:
    """Return the blocks of each stack of a model over tokens; one that has a single stack gives it without a name."""
    anatomy, name = unsharded_anatomy(model), type(core_of(model)).__name__
    if anatomy is not None:
        return {"": anatomy}
    found = anatomies_in_stacks(model)
    if len(found) != len(PAIR_STACKS):
        raise PlanError(f"{name} is no language model over token ids, which replay needs")
    if spans_processes(model) or is_sharded(model):
        raise PlanError(
            f"{name} is an encoder-decoder that several processes hold, and its replay needs all of it in one process"
        )
    return found


def _check_injection(archive: Archive, name: str, info: SiteInfo) -> None:
    """Raise PlanError if the stored rows of a site cannot be put in."""
    if info.site.is_pattern or info.site.top is not None or not info.per_token:
        raise PlanError(f"stored rows of {name} cannot be put in; put in those of the residual stream, q, k, v or z")
    shape = archive.plan.site(name).row_shape
    if shape != (info.row_shape or (1,)):
        raise PlanError(f"{name} has rows of shape {shape} in {archive.place}, and of {info.row_shape} in the model")


def _padded_with(batch: PlanBatch, token: object) -> PlanBatch:
    """Return the batch with the model's own padding token, by which classifiers find the last token of an example."""
    if not isinstance(token, int) or token < 0:
        return batch
    ids = batch.padded.input_ids.masked_fill(batch.padded.attention_mask == 0, token)
    return replace(batch, padded=replace(batch.padded, input_ids=ids))


def _marks_padding(core: PreTrainedModel, batch: PlanBatch) -> bool:
    """Return whether a classifier of whole examples can tell their tokens from padding in a batch."""
    return getattr(core.config, "pad_token_id", None) is not None and bool(batch.padded.attention_mask[:, 0].all())

"""Recording in the user's own loop: every call of the model appends rows to one archive.

    with residua.Recorder(model, sites="resid_post.*", out="acts.zarr") as recorder:
        for batch in loader:
            recorder.annotate(columns={"label": batch.pop("label")})
            model(**batch)

Rows follow the calls: examples in batch order, tokens in their order, without the positions that `attention_mask`
masks. `residua.capture.recording.arguments` says which arguments of a call are understood, and which are refused. A
loop that goes on with a cache, and ``generate``, add to the examples of its first call
(`residua.capture.recording.running`). The first call shows what a row is; then the archive is made. Leaving the context
seals it. After an exception the archive stays unsealed; it has every shard that was committed, and these can be read.

The recorder reads each site after every tap and hook there, whether these were attached before it or inside its
context. So what is stored is what the model goes on with.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedTokenizerBase

from residua.capture.forward.inputs import first_position
from residua.capture.hooks.attention import eager_where_needed
from residua.capture.hooks.forward_call import is_probing, move_last
from residua.capture.hooks.site import SiteInfo, check_storage, plan_site, refuse_repeated, site_notes
from residua.capture.identity.few_tokens import FewTokens
from residua.capture.identity.lm_head import lm_head_files, lm_head_problem
from residua.capture.identity.module_settings import ModelState
from residua.capture.identity.output import output_sample
from residua.capture.identity.prediction import Prediction, no_loss, prediction_of
from residua.capture.identity.provenance import identify_model
from residua.capture.identity.sidecars import attention_files, attention_notes
from residua.capture.layout.layouts import Layout
from residua.capture.layout.local_shards import LocalShards, full_row_shape
from residua.capture.layout.process_layout import ProcessLayout, process_layout_in_loop, spans_processes
from residua.capture.recording.arguments import (
    Bools,
    Ids,
    cached_positions,
    given_arguments,
    opens_loop,
    read_call,
    read_pass,
)
from residua.capture.recording.call import Call, Column, SameCalls, are_of_examples
from residua.capture.recording.generation import Generation, recording_generation
from residua.capture.recording.growing_archive import GrowingArchive, with_replica_hint
from residua.capture.recording.left_padding import counting_tokens, pads_source_left, refuse_if_counted
from residua.capture.recording.running import Pass, RunningExamples, cache_of
from residua.capture.recording.stack import parameter_names, refuse_encoder_outputs, stack_of
from residua.capture.runtime.collectives import all_gather_objects, device_of
from residua.capture.runtime.pipeline_schedule import PIPELINE_TYPES
from residua.capture.runtime.process_groups import declared_group, pipeline_group
from residua.capture.runtime.streams import writer_threads
from residua.capture.runtime.wrappers import core_of, refuse_compiled, uncompiled_loop
from residua.capture.scheduling.membership import Membership
from residua.capture.sites.anatomy import takes_pixels
from residua.capture.sites.frames import n_frame_positions, takes_frames
from residua.capture.sites.names_to_modules import resolve_sites
from residua.capture.sites.reference_model import unsharded_sites
from residua.capture.taps.reading import reading
from residua.store.base.errors import CaptureError, PlanError, few
from residua.store.base.sizes import Size, n_bytes
from residua.store.encoding.codecs import DEFAULT_PRESET
from residua.store.format.archive_metadata import ROOT
from residua.store.format.plan import HOST_MEMORY_BYTES, Plan, SitePlan, choose_rows_per_shard
from residua.store.format.sidecars import NO_LM_HEAD
from residua.store.format.site_names import is_pattern
from residua.store.storage.address import is_remote
from residua.store.storage.destination import BucketFolder
from residua.store.storage.place import try_archive_place

_EXISTS = "exists: a recorder makes a new archive; choose another place"
_EACH_CALL = 4  # calls that each look whether the model has changed; later ones do when their number has doubled


class Recorder:
    """Appends the rows of every call of `model` to a new archive. A context; see the module's docstring.

    Args:
        model: Any torch module; canonical sites need a transformers model.
        sites: Site names or patterns, for example ``"resid_post.*, attn_out.3"``.
        out: Folder of the new archive, or its address in a bucket (``s3://``, ``gs://``, ``az://``).
        storage_options: For an address, as for `residua.open`.
        dtype: Data type in which floating-point sites are stored; None keeps the model's.
        codec: Codec preset.
        rows_per_shard: Height of a shard, a power of two; None chooses it by the widest site.
        host_memory: Memory that host buffers may take together: bytes, or a text such as ``4GiB``.
        tokenizer: Stored in the archive, so that rows can be shown as text.
        max_length: Most tokens of an example; needed for `pattern` sites only, whose rows are that wide.
        threads: Encoder threads; None takes 1, and up to 4 with a GPU.
        head: Store the LM head (final norm and unembedding), which lenses need.
        tensor_parallel: The ranks over which the model's activations are split, or their mesh, where the model does
            not show it because it was split by hand.

    Attributes:
        out: Where the archive is written.

    Raises:
        FileExistsError: `out` exists already.
        StorageError: A bucket is not there, or may not be written.
        UnknownSiteError: The model lacks a site.
        CaptureError: The model is compiled, or a pipeline of torch's.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sites: str | Iterable[str],
        out: str | PathLike[str],
        storage_options: Mapping[str, Any] | None = None,
        dtype: str | None = None,
        codec: str = DEFAULT_PRESET,
        rows_per_shard: int | None = None,
        host_memory: Size = HOST_MEMORY_BYTES,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
        threads: int | None = None,
        head: bool = True,
        tensor_parallel: ProcessGroup | DeviceMesh | None = None,
    ) -> None:
        if not is_remote(out) and Path(out).exists():
            raise FileExistsError(with_replica_hint(f"{out} {_EXISTS}"))
        self.out = try_archive_place(out, storage_options, locks=False).out
        if isinstance(self.out, BucketFolder) and self.out.n_bytes(ROOT) is not None:
            raise FileExistsError(with_replica_hint(f"{self.out} {_EXISTS}"))
        if isinstance(model, PIPELINE_TYPES):
            raise CaptureError(
                f"Recorder got a {type(model).__name__}, and in a loop over torch pipelines only the first stage sees "
                "the tokens: give schedule and dataset to residua.capture_dataset, or read sites with residua.tap"
            )
        refuse_compiled(model)
        check_storage(codec=codec, dtype=dtype, rows_per_shard=rows_per_shard, threads=threads)
        self._model = model
        self._given = tensor_parallel
        with declared_group(model, tensor_parallel):
            self._sites = (unsharded_sites if spans_processes(model) else resolve_sites)(
                model, sites if isinstance(sites, str) else list(sites)
            )
            refuse_repeated(self._sites)
            _refuse_patches(model, self._sites)
            self._has_whole_examples = are_of_examples(self._sites)
            self._stack_called = stack_of(model, self._sites)
            self._attention = attention_files(model, self._sites)
            with eager_where_needed(model, self._sites.values()):
                few_run = FewTokens(model, head=head)
                self.output = output_sample(model, few_run)
            self._head_problem = lm_head_problem(model, few_run) if head else ""
            self._predicts: Prediction | None = None if self._has_whole_examples else prediction_of(model)
        self._state: ModelState | None = ModelState(model)
        self._n_calls = 0
        self._called = model if self._stack_called is None else self._stack_called
        self._parameters = parameter_names(self._called)
        self._first_position = first_position(core_of(self._called))
        self._caches = bool(getattr(getattr(core_of(self._called), "config", None), "use_cache", True))
        self._dtype = dtype
        self._codec = codec
        self._rows_per_shard = rows_per_shard
        self._host_memory = n_bytes(host_memory, "host_memory")
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._threads = threads or writer_threads(model)
        self._head = head
        self._stack = ExitStack()
        self._membership: Membership | None = None
        self._process_layout: ProcessLayout | None = None
        self._archive: GrowingArchive | None = None
        self._computed: Mapping[str, str] = {}
        self._held: dict[str, tuple[Tensor, Layout]] = {}
        self._call: Call | None = None
        self._keep: npt.NDArray[np.bool_] | None = None
        self._columns: Mapping[str, Column] = {}
        self._running: RunningExamples | None = None
        self._generation: Generation | None = None
        self._cache: object = None  # that the call which runs was given

    def __repr__(self) -> str:
        return f"<Recorder of {few(list(self._sites))} into {self.out}>"

    def annotate(self, *, columns: Mapping[str, Column] | None = None, keep: torch.Tensor | None = None) -> None:
        """Describe the next call, and the examples that go on from it.

        Args:
            columns: One value per example, by name, as a sequence, tensor or array; stored in the example table. Where
                a call packs several documents into a sequence, one value per document or one per sequence.
            keep: Which positions become rows, bool, (sequences, positions); masked positions never do.
        """
        self._columns = dict(columns or {})
        self._keep = None if keep is None else keep.cpu().numpy().astype(bool)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(declared_group(self._model, self._given))
            stack.enter_context(uncompiled_loop())
            self._membership, self._process_layout = stack.enter_context(
                process_layout_in_loop(self._model, self._sites)
            )
            # by all sites, so that stages without a pattern site switch too
            stack.enter_context(eager_where_needed(self._model, self._sites.values()))
            here = self._sites if self._process_layout is None else self._process_layout.sites
            self._shards = LocalShards(here, self._group)
            self._same_calls = SameCalls(self._model)
            if isinstance(self.out, BucketFolder) and (self._membership is None or not self._membership.number):
                stack.enter_context(self.out.locked())
            stack.push(self._close)
            following = recording_generation(
                self._model,
                refuse=self._refuse_generation,
                begin=self._begin_generation,
                end=self._end_generation,
                abandon=self._abandon,
            )
            stack.enter_context(following)
            begin = self._model.register_forward_pre_hook(self._begin, with_kwargs=True)
            stack.callback(begin.remove)
            before = self._called.register_forward_pre_hook(self._before, with_kwargs=True)
            stack.callback(before.remove)
            self._taps = stack.enter_context(reading(self._model, here, self._put))
            self._last = self._model.register_forward_hook(self._after)
            stack.callback(self._last.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _close(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if error is None:
            self._store_running()
        if self._archive is not None:
            self._archive.close(error)
        elif error is None:
            raise CaptureError("the model was not called inside the recorder, so there are no rows: call it inside")

    @property
    def _group(self) -> ProcessGroup | None:
        return None if self._process_layout is None else self._process_layout.group

    def _begin(self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let the recorder read last, so that what it stores is what flows on, whoever changed it."""
        if is_probing():  # another part of the product runs the model, on tokens that are not the user's
            return
        self._call = None
        self._taps.begin_forward()
        self._held = {}
        move_last(self._last)
        if self._stack_called is not None and kwargs.get("encoder_outputs") is not None:
            refuse_encoder_outputs(self._model, self._called)

    def _before(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if is_probing():
            return None
        given = given_arguments(self._parameters, args, kwargs)
        if self._goes_on(given):
            return self._before_pass(given, args, kwargs)
        self._store_running()
        call = read_call(self._parameters, args, kwargs, first_position=self._first_position, caches=self._caches)
        if takes_frames(self._called):
            call = call.by_position(n_frame_positions(self._called))
        if self._stack_called is not None:
            if call.pads_left or pads_source_left(kwargs):
                refuse_if_counted(self._model)
        elif call.pads_left:
            args, kwargs, note = counting_tokens(self._called, self._parameters, call, args, kwargs)
            call = replace(call, notes=(*call.notes, *([note] if note else [])))
        self._call = call.by_example() if self._has_whole_examples else call
        self._note_changes()
        self._same_calls.check(self._call, self._keep)
        self._begin_call(self._call, opens=opens_loop(given))
        return args, kwargs

    def _begin_call(self, call: Call, *, opens: bool) -> None:
        """Begin a call with examples of its own; if it opens a loop, later ones may go on from it."""
        is_packed = call.starts is not None and bool((call.starts.sum(-1) > 1).any())
        if opens and not self._no_loop() and call.input_ids is not None and not is_packed:
            call.examples(self._keep, self._columns)  # refuses what does not fit, before the model runs
            self._open(call)
            self._running_examples.begin(Pass(start=0, input_ids=call.input_ids, mask=call.mask), None)
        elif self._archive is not None:
            self._archive.begin(call, self._keep, self._columns)

    def _goes_on(self, given: Mapping[str, object]) -> bool:
        """Return whether a call goes on with the running examples, or is one of ``generate``."""
        self._cache = given.get("past_key_values")
        start = cached_positions(given)
        if start and (reason := self._no_loop()):
            raise CaptureError(
                f"past_key_values holds {start} positions of earlier calls, and this recorder takes no loop that goes "
                f"on: {reason}. Call the model on full sequences"
            )
        return self._generation is not None or bool(start and self._running is not None)

    def _before_pass(
        self, given: Mapping[str, object], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Begin a call that goes on with the running examples, or one of ``generate``."""
        start = cached_positions(given)
        before = np.zeros((0, 0), np.bool_)
        if self._generation is not None:
            before = self._generation.mask
        elif self._running is not None:
            before = self._running.mask()
        if self._running is not None and (self._keep is not None or self._columns):
            raise CaptureError(
                "annotate describes the first call of a loop that goes on with a cache, and was called in the middle "
                "of one"
            )
        ids, mask = read_pass(
            self._parameters,
            given,
            start=start,
            before=before,
            first_position=self._first_position,
            is_ours=self._generation is not None,
        )
        one = Pass(start=start, input_ids=ids, mask=mask)
        pads_left = "position_ids" not in given and bool((mask.any(-1) & ~mask[:, 0]).any())
        call = Call(input_ids=ids, mask=mask, pads_left=pads_left)
        if pads_left:
            args, kwargs, note = counting_tokens(self._called, self._parameters, call, args, kwargs, n_new=one.shape[1])
            call = replace(call, notes=(note,) if note else ())
        self._note_changes()
        if self._running is None:
            self._open(call)
        self._running_examples.begin(one, self._cache)
        self._call = Call(input_ids=ids, mask=mask[:, start:])
        return args, kwargs

    def _no_loop(self) -> str:
        """Return why calls of this recorder cannot go on from each other; empty if they can."""
        if self._stack_called is not None:
            return "the model is an encoder-decoder, whose decoder begins anew with each target"
        if self._process_layout is not None:
            return "several processes hold the model together"
        if self._has_whole_examples:
            return "a row is a whole example"
        if pattern := next(filter(is_pattern, self._sites), ""):
            return f"{pattern} has rows that are as wide as the example, which is not known until it ends"
        return ""

    def _refuse_generation(self) -> str:
        if problem := self._no_loop():
            return problem
        if core_of(self._model) is not self._model:
            inside = type(core_of(self._model)).__name__
            return f"it runs the {inside} inside the {type(self._model).__name__} that is recorded: record that"
        logits = next((name for name, info in self._sites.items() if info.site.kind.startswith("logits")), "")
        return (
            f"{logits} is computed for the last position only, so it has no row for a prompt's tokens" if logits else ""
        )

    @property
    def _running_examples(self) -> RunningExamples:
        if self._running is None:
            raise RuntimeError("no examples are running")
        return self._running

    def _open(self, first: Call) -> None:
        """Let the examples of a call run: later ones go on from it."""
        self._running = RunningExamples(
            first=first,
            keep=self._keep,
            columns=self._columns,
            most_bytes=self._host_memory,
            in_generate=self._generation is not None,
        )
        self._keep, self._columns = None, {}

    def _begin_generation(self, generation: Generation) -> None:
        if self._keep is not None:
            raise CaptureError(
                "annotate was given keep, and which positions generate makes is not known yet: leave keep out, and "
                "choose rows of the archive with a condition"
            )
        n_sequences = len(generation.mask)
        for name, values in self._columns.items():
            if len(values) not in (n_sequences, n_sequences // generation.n_sequences):
                raise CaptureError(
                    f"column {name!r} has {len(values)} values, and generate gets "
                    f"{n_sequences // generation.n_sequences} prompts: give one per prompt, or one per sequence"
                )
        self._store_running()
        self._generation = generation

    def _end_generation(self, generation: Generation, output: Any) -> None:
        """Store the examples that ``generate`` gave, with the tokens that it chose last, which have no row."""
        running = self._running_examples
        ids, is_token, ran = generation.tokens(output)
        known = min(running.length, ids.shape[1])
        wrong = ((running.tokens()[:, :known] != ids[:, :known]) & is_token[:, :known]).any(0)
        if wrong.any() and generation.drops_passes:
            running.cut(int(np.argmax(wrong)))
        n_missing = int((ran[:, running.length :]).sum())
        if n_missing or (wrong.any() and not generation.drops_passes):
            raise CaptureError(
                "generate returned other tokens than the model ran on, or more of them, so it is not clear which rows "
                "are theirs: generate outside the recorder, then call the model on the full sequences inside"
            )
        self._store(ids, is_token, ran, n_copies=generation.n_sequences)
        self._generation = None

    def _abandon(self) -> None:
        """Forget the running examples of a ``generate`` that failed."""
        self._running, self._generation = None, None

    def _store_running(self) -> None:
        """Store the running examples, if there are any: the loop is done with them."""
        if self._running is None or not self._running.length:
            self._running = None
            return
        ids, mask = self._running.tokens(), self._running.mask()
        self._store(ids, mask, mask)

    def _store(self, ids: Ids, is_token: Bools, ran: Bools, *, n_copies: int = 1) -> None:
        """Store running examples as one call.

        Args:
            ids: Their tokens, (sequences, positions).
            is_token: Which of them belong to the examples.
            ran: Which of these have rows.
            n_copies: Sequences of each prompt.
        """
        running, self._running = self._running_examples, None
        call, keep = running.whole(ids, is_token, ran)
        columns = {
            name: [each for each in _listed(values) for _ in range(n_copies)]
            if len(_listed(values)) * n_copies == len(ids)
            else values
            for name, values in running.columns.items()
        }
        rows = running.rows(ids.shape[1])
        if self._archive is None:
            self._held = {site: (tensor, Layout()) for site, tensor in rows.items()}
            self._archive = self._first_archive(call, keep, columns)
        else:
            self._archive.begin(call, keep, columns)
            for site, tensor in rows.items():
                self._archive.put(site, tensor, Layout())
        self._archive.finish()
        self._archive.note(call.notes)

    def _note_changes(self) -> None:
        """Note whether the model is still the one of the first call; not each call looks, since this takes time."""
        self._n_calls += 1
        is_due = self._n_calls <= _EACH_CALL or self._n_calls & (self._n_calls - 1) == 0
        if self._state is None or not is_due:
            return
        if self._archive is None:
            if changes := self._state.changes():
                self.output = f"the model was changed after the recorder was made: {'; '.join(changes)}"
                self._state = ModelState(self._model)
        elif changes := self._state.changes():
            self._archive.note(
                [
                    f"the model was changed while it was recorded ({'; '.join(changes)}), found in call {self._n_calls}"
                    ": rows are of several states of it, and the archive describes that of the first call"
                ]
            )
            self._state = None

    def _put(self, site: str, tensor: Tensor) -> None:
        if self._call is None:
            raise CaptureError(f"{site} fired outside a call of the recorded model: call the model itself")
        if self._running is not None:
            self._running.put(site, self._sites[site].site.kind, tensor)
            return
        local, layout = self._shards.of(site, tensor, self._call.shape)
        if self._archive is None:
            # in host memory: all sites of one call may need more than the device has
            self._held[site] = (local.to("cpu", copy=True), layout)
        else:
            self._archive.put(site, local, layout)

    def _after(self, _module: nn.Module, _args: tuple[Any, ...], output: object) -> None:
        if is_probing():
            return
        self._taps.end_forward()
        if self._call is None:
            raise CaptureError(
                "a call of the recorded model ended without a beginning: call the model itself, once per batch, and "
                "the part of it that has the sites with it"
            )
        if self._running is not None:
            self._running.end(self._cache if self._cache is not None else cache_of(output))
            self._call = None
            return
        if self._archive is None:
            self._archive = self._first_archive(self._call, self._keep, self._columns)
        self._archive.finish()
        self._archive.note(self._call.notes)
        self._call, self._keep, self._columns = None, None, {}

    def _first_archive(self, call: Call, keep: Bools | None, columns: Mapping[str, Column]) -> GrowingArchive:
        """Make the archive, now that the first call has shown what a row is, and put the rows of that call into it."""
        archive = GrowingArchive(
            self.out,
            self._model,
            self._plan(call),
            output=self.output,
            computed=self._computed,
            sidecars={
                **(lm_head_files(self._model) if self._head and not self._head_problem else {}),
                **self._attention,
            },
            tokenizer=self._tokenizer,
            shards=self._shards,
            membership=self._membership,
            process_layout=self._process_layout,
            first_rows=int(call.mask.sum()),
            host_memory=self._host_memory,
            threads=self._threads,
            predicts=self._predicts,
        )
        archive.note(attention_notes(self._attention))
        archive.note(site_notes(self._sites))
        archive.note(filter(None, [no_loss(self._model, self._predicts)]))
        if self._head_problem:
            archive.note([f"{NO_LM_HEAD}: {self._head_problem}"])
        archive.begin(call, keep, columns)
        for site, (local, layout) in self._held.items():
            archive.put(site, local if self._group is None else local.to(device_of(self._group)), layout)
        self._held = {}
        return archive

    def _plan(self, call: Call) -> Plan:
        mine = {
            site: (full_row_shape(site, local, layout, call.shape), str(local.dtype).removeprefix("torch."))
            for site, (local, layout) in self._held.items()
        }
        found = {
            site: row for stage in all_gather_objects(pipeline_group(self._model), mine) for site, row in stage.items()
        }
        sites = tuple(self._site_plan(site, *found[site]) for site in self._sites)
        self._computed = {site: dtype for site, (_, dtype) in found.items()}
        height = self._rows_per_shard or choose_rows_per_shard(
            [site.row_bytes for site in sites],
            batch_rows=int(call.mask.sum()),
            most_rows_per_example=int(call.mask.sum()),
            host_memory_bytes=self._host_memory,
        )
        return Plan(
            model=identify_model(self._model), dataset={}, rules={"loop": "user"}, sites=sites, rows_per_shard=height
        )

    def _site_plan(self, site: str, row_shape: tuple[int, ...], computed: str) -> SitePlan:
        if is_pattern(site):
            if self._max_length is None:
                raise PlanError(f"{site} has rows as wide as the longest example: pass max_length to Recorder")
            row_shape = (*row_shape[:-1], self._max_length)
        return plan_site(site, row_shape, computed, dtype=self._dtype, codec=self._codec)


def _listed(values: Column) -> Sequence[object]:
    return values.tolist() if isinstance(values, torch.Tensor | np.ndarray) else values


def _refuse_patches(model: nn.Module, sites: Mapping[str, SiteInfo]) -> None:
    """Raise PlanError for rows of patches: a call's pixels alone do not say where a patch lies."""
    for name, info in sites.items():
        if info.site.stack == "vision":
            raise PlanError(
                f"{name} has rows of patches of images, and calls of {type(core_of(model)).__name__} say which token a "
                "row is: give a dataset with an image column to residua.capture_dataset, or record module: sites, "
                "where a row is a whole image"
            )
    named = next((name for name, info in sites.items() if info.site.kind != "module"), None)
    if named is not None and takes_pixels(model):
        raise PlanError(
            f"{named} of {type(core_of(model)).__name__} has a row for each patch of an image, and a recorder does not "
            "know places in images: give a dataset with an image column to residua.capture_dataset, or record module: "
            "sites, where a row is a whole image"
        )

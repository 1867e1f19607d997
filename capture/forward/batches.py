"""Running the batches of a plan through a model, exactly as the plan composes them."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from residua.capture.buffers.row_index import BatchRows, batch_rows, by_position
from residua.capture.forward.example_inputs import InputSource
from residua.capture.forward.inputs import forward_arguments, padded_batch, pair_arguments
from residua.capture.forward.plan_batch import PlanBatch, batches_with_inputs, microbatches, plan_batch
from residua.capture.layout.process_layout import ProcessLayout
from residua.capture.runtime.collectives import failed_together
from residua.capture.runtime.compat import accelerate_hook
from residua.capture.runtime.devices import input_device
from residua.capture.runtime.pipeline_schedule import runnable, stage_model_of
from residua.capture.runtime.sharded import is_sharded
from residua.capture.sites.anatomy import takes_pixels
from residua.capture.sites.pixels import image_arguments, runs_alone
from residua.store.base.errors import CaptureError
from residua.store.base.naming import named
from residua.store.examples.schedule import Batch
from residua.store.examples.table import ExampleTable
from residua.store.format.plan import STACK_RULE, Plan
from residua.store.format.site_names import parse_site

Around = Callable[[Sequence[int]], AbstractContextManager[None]]
"""Takes the numbers of the examples of a forward pass; the pass runs inside the context that it returns."""


class RowSink(Protocol):
    """Takes the rows of batches: `begin` announces a batch, `put` takes one site's tensor, (B, T, *row)."""

    def begin(self, batch: BatchRows, /) -> None:
        """Announce the rows of the next forward pass."""

    def put(self, site: str, tensor: torch.Tensor, /) -> None:
        """Take one site's tensor; copy what is kept before returning."""


class _EnoughError(Exception):
    """Every site has fired, so nobody needs the rest of the forward pass."""


def _arguments(
    model: nn.Module, stack: str, *, needs_logits: bool
) -> Callable[[PlanBatch], dict[str, torch.Tensor | bool | int]]:
    """Return the function that makes the arguments of a forward call, for rows of `stack` if it has several."""
    if stack:
        both = pair_arguments(model)
        return lambda batch: both(batch.padded, None if batch.source is None else batch.source.padded, stack)
    plain = forward_arguments(model, needs_logits=needs_logits)
    return lambda batch: plain(batch.padded.input_ids, batch.padded.attention_mask)


class BatchRunner:
    """Runs batches through a model; the taps of the sites call `put` during each pass.

    Nothing is computed that no site needs: the forward pass ends when the last site has fired, and logits that no site
    needs are left out. Neither changes a bit of what is captured.

    Args:
        model: The model, on its device.
        plan: The plan that the batches belong to.
        table: The examples.
        sink: Takes the rows.
        sites: The sites that are read here; all of the plan's unless given.
        process_layout: What this process holds of a model that several processes share.
        changed: Sites that are changed while a batch runs.
        inputs: Makes what examples have beside tokens, such as pixels; None if they have tokens alone.

    Attributes:
        n_rows: Rows of the batches so far. Of the processes that share a model only the leader counts; others have 0.
        n_tokens: Their tokens, without padding; counted likewise.
        forward_seconds: Time in the forward passes, taps included.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        table: ExampleTable,
        sink: RowSink,
        *,
        sites: Collection[str] | None = None,
        process_layout: ProcessLayout | None = None,
        changed: Collection[str] = (),
        inputs: InputSource | None = None,
    ) -> None:
        self._inputs = inputs
        self._takes_pixels = takes_pixels(model)
        self._runs_alone = inputs is not None and runs_alone(model)
        self._dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
        self._model = runnable(model)
        stage_model = stage_model_of(model)
        self._n_microbatches = 1 if stage_model is None else stage_model.n_microbatches
        self._plan = plan
        self._table = table
        self._sink = sink
        self._device = input_device(model)
        self._shape = (0, 0)
        self._n_sites = len(plan.sites if sites is None else sites)
        self._n_missing = 0
        self._spans_processes = process_layout is not None
        self._in_step = is_sharded(model)
        self._counts = process_layout is None or process_layout.worker_group.is_leader
        self._is_wanted = True
        # hooks of accelerate and FSDP must see their forward end, and the next pipeline stage needs its input
        hooked = any(accelerate_hook(module) is not None for module in model.modules())
        self._ends_early = not (hooked or self._in_step or (process_layout is not None and process_layout.is_stage))
        kinds = {parse_site(name).kind for name in (*(site.name for site in plan.sites), *changed)}
        needs_logits = any(kind == "module" or kind.startswith("logits") for kind in kinds)
        self._arguments = _arguments(self._model, str(plan.rules.get(STACK_RULE, "")), needs_logits=needs_logits)
        self.n_rows = 0
        self.n_tokens = 0
        self.forward_seconds = 0.0

    def run(self, batch: Batch | None, around: Around | None = None) -> Iterator[bool]:
        """Run one batch; yields after every forward pass.

        A torch pipeline has one pass per microbatch, and a batch of images one per size, or per image.

        Where forward passes are collectives of all workers, every batch has the same number of passes. A worker that
        has no batch left runs None. Missing passes are made with one token, whose rows are dropped.

        Args:
            batch: The batch.
            around: Makes the context of each forward pass.

        Yields:
            Whether the pass belonged to the batch.
        """
        n_passes = 0
        for microbatch in [] if batch is None else self._microbatches(batch):
            self._forward(microbatch, around)
            n_passes += 1
            yield True
        while self._in_step and n_passes < self._n_microbatches:
            self._forward_one_token()
            n_passes += 1
            yield False

    def _microbatches(self, batch: Batch) -> list[PlanBatch]:
        if self._inputs is not None:
            numbers = batch.examples.tolist()
            return batches_with_inputs(
                self._table, numbers, self._inputs, device=self._device, dtype=self._dtype, alone=self._runs_alone
            )
        made = plan_batch(self._table, batch.examples.tolist(), side=self._plan.padding, device=self._device)
        return microbatches(made, self._n_microbatches)

    def _forward(self, batch: PlanBatch, around: Around | None) -> None:
        padded, rows = batch.padded, batch.rows
        n_examples, n_positions = padded.input_ids.shape
        self._shape = (n_examples, n_positions)
        self._sink.begin(batch_rows(rows, n_positions))
        self._n_missing = self._n_sites
        started = time.perf_counter()
        kwargs = self._arguments_of(batch)
        try:
            with nullcontext() if around is None else around([example.example for example in rows]):
                self._model(**kwargs)
        except _EnoughError:
            pass
        except CaptureError:
            raise
        except torch.OutOfMemoryError as error:
            raise CaptureError(
                f"{self._device} has too little memory for a batch of {n_examples} examples of {n_positions} tokens: "
                f"lower {named('batch_tokens')}, or shorten the examples with {named('max_length')}"
            ) from error
        except RuntimeError as error:
            if not (self._spans_processes or self._in_step):
                raise
            raise failed_together(error) from error
        self.forward_seconds += time.perf_counter() - started
        if self._counts:
            self.n_rows += sum(len(example.positions) for example in rows)
            self.n_tokens += sum(len(example.input_ids) for example in rows)

    def _arguments_of(self, batch: PlanBatch) -> dict[str, Any]:
        """Return the arguments of a forward pass."""
        if batch.inputs is not None and self._takes_pixels:
            return image_arguments(self._model, batch.inputs)
        arguments: dict[str, Any] = self._arguments(batch)
        if batch.inputs:
            arguments.pop("position_ids", None)  # images may have positions of their own, which the model works out
        return {**arguments, **(batch.inputs or {})}

    def _forward_one_token(self) -> None:
        one = padded_batch([[0]], device=self._device)
        self._is_wanted = False
        try:
            self._model(**self._arguments(PlanBatch(padded=one, rows=[])))
        except RuntimeError as error:
            raise failed_together(error) from error
        self._is_wanted = True

    def put(self, site: str, tensor: torch.Tensor) -> None:
        """Take one site's tensor from its tap."""
        if not self._is_wanted:
            return
        self._sink.put(site, tensor if self._spans_processes else by_position(site, tensor, *self._shape))
        self._n_missing -= 1
        if not self._n_missing and self._ends_early:
            raise _EnoughError

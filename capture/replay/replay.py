"""`residua.replay`: stored or edited activations back into the model, for some examples of an archive.

    with residua.replay(model, "acts.zarr", examples=[3], at="resid_post.5", edits=[...]) as run:
        run.logits          # per example, (tokens, vocabulary)
        run["resid_post.7"] # per example, (rows, width)

The stored rows go in at ``at``, the edits apply, and only the blocks above run. The model runs when a result is first
asked for, and results are kept. Between and after the passes the model is as it was. `residua.capture.replay.engine`
holds the passes themselves.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from residua.capture.identity.provenance import running_as_captured
from residua.capture.replay.engine import Pass, Replayer, kept_rows
from residua.capture.replay.generation import generate
from residua.capture.replay.metrics import MetricSpec, Outcome, metric_of, token_losses
from residua.capture.replay.notes import attention_notes
from residua.capture.runtime.collectives import on_rank
from residua.capture.runtime.pipeline_schedule import PIPELINE_TYPES, as_model
from residua.capture.runtime.process_groups import declared_group
from residua.store.base.errors import CaptureError, PlanError, few
from residua.store.edits.parser import EditSource, parse_edits
from residua.store.read.archive import Archive
from residua.store.read.stacks import open_archive


class Replay:
    """What `replay` yields: logits and sites of some examples, computed when they are first asked for.

    Attributes:
        examples: Numbers of the examples, in the order of every list here.
        notes: What a reader of the results has to know, one sentence each: conditions that differ from the capture,
            rows that were rounded, blocks that could not be skipped.
        skipped_blocks: How many blocks do not run.
    """

    def __init__(self, replayer: Replayer, examples: Sequence[int], keep: Sequence[str], *, grad: bool) -> None:
        self.examples = tuple(examples)
        self._replayer = replayer
        self._batch = replayer.batch(self.examples)
        self._keep = replayer.readable_sites(keep)
        self._grad = grad
        self._asked: set[str] = set()
        self._sites: dict[str, list[Tensor]] = {}
        self._first: Pass | None = None
        self._original: Pass | None = None
        self._is_open = True
        kept = attention_notes(replayer.core, replayer.infos(self._keep).values())
        replayer.check(self._batch)  # before anything runs
        reached = replayer.reach_notes(replayer.reach(self._batch))
        replayer.passes(self._batch, grad=grad)  # raises if there would have to be several with gradients
        skip = replayer.skip(self._batch)
        self.skipped_blocks = len(skip.blocks)
        notes = [*replayer.notes, *kept, *reached, skip.problem, *replayer.batch_notes(self._batch).values()]
        self.notes = tuple(note for note in dict.fromkeys(notes) if note)

    @property
    def logits(self) -> list[Tensor]:
        """Logits of every token of each example, (tokens, vocabulary), in the model's type and on its device.

        A classifier of whole examples gives (1, classes); question answering gives start and end, (tokens, 2).

        Raises:
            CaptureError: The replay ended before they were computed, or another process has them.
        """
        return (self._first or self._run(self._keep)).require_logits()

    def __getitem__(self, site: str) -> list[Tensor]:
        """Return the rows of a site at or above the start, with the edits, (rows, *row) for each example.

        Raises:
            UnknownSiteError: The model has no such site.
            PlanError: The site lies below the stored rows.
            CaptureError: The replay ended before they were computed, or another process has them.
        """
        (name,) = self._replayer.readable_sites([site])
        if name not in self._asked:  # and not _sites: a process without the site must not run again alone
            self._run([*self._keep, name])
        if name not in self._sites:
            raise CaptureError(f"another process than this one{on_rank()} has {name} and its rows")
        return self._sites[name]

    def __repr__(self) -> str:
        return f"<Replay of examples {few(self.examples)} of {self._replayer.archive.place}>"

    @property
    def losses(self) -> list[Tensor]:
        """Cross-entropy of every next token of each example in nats, (tokens - 1).

        Raises:
            PlanError: The model's logits do not predict the next token.
        """
        self._replayer.require_loss()
        pairs = zip(self.logits, self._batch.rows, strict=True)
        return [token_losses(logits, example) for logits, example in pairs]

    @property
    def original_logits(self) -> list[Tensor]:
        """Logits of the same examples, from the same stored rows, without the edits and without a graph."""
        if self._original is None:
            self._require_open()
            self._original = self._replayer.run(self._batch, edited=False)
        return self._original.require_logits()

    def metric(self, metric: MetricSpec) -> Tensor:
        """Return a metric of the logits, one number; `residua.capture.replay.metrics` lists the metrics.

        Raises:
            PlanError: There is no such metric, or it is a loss and the model's logits do not predict the next token.
        """
        if metric == "loss":
            self._replayer.require_loss()
        outcome = Outcome(logits=self.logits, examples=self._batch.rows, original=lambda: self.original_logits)
        return metric_of(metric)(outcome)

    def gradients(self, metric: MetricSpec) -> dict[str, list[Tensor]]:
        """Return the gradients of a metric with respect to the injected rows and to every site in ``keep``.

        Gradients of the injected rows are those before the edits there. If no rows go in, ``embed`` takes their place.

        Args:
            metric: As for `metric`.

        Returns:
            From site to the gradient of the rows of each example, (rows, *row).

        Raises:
            PlanError: The replay was opened without ``grad=True``, or the metric does not depend on a site.
        """
        if not self._grad:
            raise PlanError("gradients were asked for: open the replay with grad=True")
        first = self._first or self._run(self._keep)
        wanted = [*first.nodes.values(), *first.end]
        found = torch.autograd.grad(self.metric(metric), wanted, retain_graph=True, allow_unused=True)
        gradients = {}
        for (name, node), gradient in zip(first.nodes.items(), found, strict=False):
            full = torch.zeros_like(node) if gradient is None else gradient
            gradients[name] = kept_rows(self._batch, full, name)
        return gradients

    def generate(
        self, max_new_tokens: int, *, edit_new_tokens: bool = False, seed: int = 0, **options: Any
    ) -> list[list[int]]:
        """Continue the examples as prompts, with their stored rows and edits, by tokens that the model chooses.

        The blocks below the stored rows run too, because new tokens need their keys and values.

        Args:
            max_new_tokens: Maximum number of new tokens of an example.
            edit_new_tokens: Whether edits that apply to every token, and need no stored row, change new tokens too.
            seed: Seed of the sampling; the state of torch's generator stays as it was.
            **options: For transformers' ``generate``, such as ``do_sample=True, temperature=0.7`` or a
                ``generation_config``. Rows and edits are placed by position, also without a cache, in chunks, in beams
                and with candidates of an assistant.

        Returns:
            The new tokens of each example, including the token that ended it, if any.

        Raises:
            PlanError: The model does not generate, an edit is at the logits, an example would get several sequences, or
                an option makes transformers run the model on other tokens. The model has not run.
            CaptureError: The model was run on other tokens all the same, for example by a logits processor.
        """
        self._require_open()
        return generate(
            self._replayer,
            self.examples,
            max_new_tokens=max_new_tokens,
            edit_new_tokens=edit_new_tokens,
            seed=seed,
            options=options,
        )

    def _run(self, keep: Sequence[str]) -> Pass:
        """Make a pass. Logits and gradients belong to the first one; later ones are for one more site each."""
        self._require_open()
        found = self._replayer.run(self._batch, list(dict.fromkeys(keep)), grad=self._grad)
        self._first = self._first or found
        self._sites.update(found.sites)
        self._asked.update(keep)
        return found

    def _require_open(self) -> None:
        if not self._is_open:
            raise CaptureError("this replay is over: ask for logits and sites inside the with block")

    def close(self) -> None:
        """Refuse further passes; computed results stay."""
        self._is_open = False
        self._replayer.stored.close()


@contextmanager
def replay(
    model: nn.Module | PipelineScheduleSingle,
    archive: Archive | str | PathLike[str],
    *,
    examples: Sequence[int],
    at: str | Iterable[str] | None = None,
    edits: EditSource = (),
    keep: str | Iterable[str] = (),
    grad: bool = False,
    force: bool = False,
    inputs: Mapping[str, Tensor] | None = None,
    tensor_parallel: ProcessGroup | DeviceMesh | None = None,
) -> Iterator[Replay]:
    """Put stored rows of some examples back into the model, edit, and run only the layers above.

    The examples run in one batch, padded and numbered as in the capture; one by one if padding changes the model's
    rows, which a note says. Without edits, logits and later sites equal
    the captured ones bit for bit if the examples are a batch of the plan, the rows are stored without loss, and dtype,
    attention implementation and threads are those of the capture; `notes` says what differs.

    If several processes hold the model, all of them make the same replay; see `residua.tap`.

    Args:
        model: The model that was captured; it may be wrapped and spread over processes. Or the schedule of a torch
            pipeline, GPipe or 1F1B, whose stages hold the model: they run its forward passes, and every stage returns
            the logits.
        archive: The archive, or its folder.
        examples: Numbers of examples.
        at: Where stored rows go in: one or more sites. Below a site of the residual stream nothing is computed. None
            puts no rows in and runs the model in full.
        edits: Edits in order, as `residua.store.edits.edit` lists them: dictionaries, or a YAML or JSON file.
        keep: Sites that the first pass keeps; each other one costs a pass when it is asked for.
        grad: Run with gradients, for ``run.gradients``. Logits and kept rows are then part of autograd's graph; the
            gradients of the parameters stay untouched.
        force: Accept a model that is not the captured one, and note it.
        inputs: What the examples ran with beside tokens and mask and the archive does not keep, such as
            ``pixel_values``: tensors by name, for `examples` in their order. The model then numbers positions itself,
            unless ``position_ids`` are among them.
        tensor_parallel: The ranks over which activations are split, if the model does not show them.

    Yields:
        The replay.

    Raises:
        PlanError: An edit does not fit, rows do not exist, or the model is another one. The model has not run.
        UnknownSiteError: The model or the archive does not have a site.
        NotCapturedError: Rows are not captured yet.

    Example:
        >>> with residua.replay(model, "acts.zarr", examples=[0], at="resid_post.3") as run:  # doctest: +SKIP
        ...     run.logits[0].shape
    """
    opened = open_archive(archive)
    parsed = parse_edits(edits)
    with ExitStack() as stack:
        if isinstance(model, PIPELINE_TYPES):
            model = stack.enter_context(as_model(model))
        stack.enter_context(declared_group(model, tensor_parallel))
        stack.enter_context(running_as_captured(opened, model))
        replayer = Replayer(
            model, opened, at=at, edits=parsed, force=force, inputs=inputs, tensor_parallel=tensor_parallel
        )
        run = Replay(replayer, examples, [keep] if isinstance(keep, str) else list(keep), grad=grad)
        stack.callback(run.close)
        yield run

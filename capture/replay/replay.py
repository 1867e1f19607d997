"""The results of a run or of a replay: logits and sites of some examples, with edits, computed when first asked for.

The model runs when a result is first asked for, and results are kept. Between and after the passes the model is as it
was. `residua.capture.replay.engine` holds the passes themselves.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from transformers import PreTrainedModel

from residua.capture.replay.engine import Replayer
from residua.capture.replay.generation import GenerationOptions, generate
from residua.capture.replay.metrics import MetricSpec, Outcome, metric_of, token_losses
from residua.capture.replay.notes import attention_notes
from residua.capture.replay.passes import Pass, kept_rows
from residua.capture.replay.prompts import Prompts
from residua.capture.replay.result_memory import ResultMemory
from residua.capture.runtime.collectives import on_rank
from residua.capture.runtime.pipeline_schedule import PIPELINE_TYPES, as_model, runnable
from residua.capture.runtime.process_groups import declared_group
from residua.capture.runtime.wrappers import evaluating, running_uncompiled
from residua.capture.sites.anatomy import n_logits_of
from residua.store.base.errors import CaptureError, PlanError, UnknownSiteError, few
from residua.store.format.site_aliases import BySite


class Replay:
    """Logits and sites of some examples, computed when they are first asked for.

    Args:
        replayer: Runs the model.
        examples: Numbers of the examples.
        keep: Sites that the first pass keeps.
        grad: Whether logits and kept rows are part of autograd's graph.
        ready: Puts the model into the state in which it runs, and back; the caller has done that unless given.
        memory: What the results may take of host memory; no limit unless given.

    Attributes:
        examples: Numbers of the examples, in the order of every list here.
        notes: What a reader of the results has to know, one sentence each: conditions that differ from the capture,
            rows that were rounded, blocks that could not be skipped.
        skipped_blocks: How many blocks do not run.
    """

    def __init__(
        self,
        replayer: Replayer,
        examples: Sequence[int],
        keep: Sequence[str],
        *,
        grad: bool,
        ready: Callable[[], AbstractContextManager[object]] = nullcontext,
        memory: ResultMemory | None = None,
    ) -> None:
        self.examples = tuple(examples)
        self._replayer = replayer
        self._ready = ready
        self._memory = memory or ResultMemory()
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
        reach = replayer.reach(self._batch)
        reached = replayer.reach_notes(reach)
        replayer.passes(self._batch, grad=grad)  # raises if there would have to be several with gradients
        if isinstance(replayer.source, Prompts) and 0 in reach.n_changed:
            raise PlanError(f"{reached[0]}: name tokens, positions or examples that are there, or leave the edit out")
        self._refuse_too_much(self._keep)
        skip = replayer.skip(self._batch)
        self.skipped_blocks = len(skip.blocks)
        notes = [*replayer.notes, *kept, *reached, skip.problem, *replayer.batch_notes(self._batch).values()]
        self.notes = tuple(note for note in dict.fromkeys(notes) if note)

    @property
    def model(self) -> PreTrainedModel:
        """The model, without its wrappers."""
        return self._replayer.core

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites whose rows are kept from the first pass on, in the model's order."""
        return self._keep

    @property
    def tokens(self) -> list[list[int]]:
        """Token ids of each example."""
        return [example.input_ids.tolist() for example in self._batch.rows]

    @property
    def logits(self) -> list[Tensor]:
        """Logits of every token of each example, (tokens, vocabulary), in the model's type.

        They are on the model's device in a replay and in a run with gradients, and in host memory in any other run.
        A classifier of whole examples gives (1, classes); question answering gives start and end, (tokens, 2).

        Raises:
            CaptureError: The replay ended before they were computed, or another process has them.
        """
        return self._computed().require_logits()

    def __getitem__(self, site: str) -> list[Tensor]:
        """Return the rows of a site at or above the start, with the edits, (rows, *row) for each example.

        Raises:
            UnknownSiteError: The model has no such site.
            PlanError: The site lies below the stored rows.
            CaptureError: The replay ended before they were computed, or another process has them.
        """
        (name,) = (site,) if site in self._asked else self._replayer.readable_sites([site])
        if name not in self._asked:  # and not _sites: a process without the site must not run again alone
            self._run([*self._keep, name])
        if name not in self._sites:
            raise CaptureError(f"another process than this one{on_rank()} has {name} and its rows")
        return self._sites[name]

    def has_sites(self, kind: str) -> bool:
        """Return whether the model has sites of a kind, such as ``attn_out``, in any block."""
        try:
            return bool(self._replayer.readable_sites([f"{kind}.*"]))
        except UnknownSiteError:
            return False

    def rows(self, sites: str | Iterable[str]) -> dict[str, list[Tensor]]:
        """Return the rows of several sites, by name, from one pass for all that were not kept.

        Args:
            sites: Names or patterns.

        Raises:
            UnknownSiteError: The model has no such site.
            CaptureError: The replay ended before they were computed, or another process has them.
        """
        names = self._replayer.readable_sites([sites] if isinstance(sites, str) else list(sites))
        if missing := [name for name in names if name not in self._asked]:
            self._run([*self._keep, *missing])
        return BySite({name: self[name] for name in names})

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of examples {few(self.examples)} of {self._replayer.source.place}>"

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
        found = self._original
        if found is None:
            self._refuse_too_much([], n_logits=2)
            with self._running():
                found = self._original = self._replayer.run(self._batch, edited=False)
        return found.require_logits()

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
            From site to the gradient of the rows of each example, ``(rows, *row)``.

        Raises:
            PlanError: The replay was opened without ``grad=True``, or the metric does not depend on a site.
        """
        if not self._grad:
            raise PlanError("gradients were asked for: open the replay with grad=True")
        first = self._computed()
        wanted = [*first.nodes.values(), *first.end]
        found = torch.autograd.grad(self.metric(metric), wanted, retain_graph=True, allow_unused=True)
        gradients = BySite[list[Tensor]]()
        for (name, node), gradient in zip(first.nodes.items(), found, strict=False):
            full = torch.zeros_like(node) if gradient is None else gradient
            gradients[name] = kept_rows(self._replayer.batch_of(name, self._batch), full, name)
        return gradients

    def generate(
        self, max_new_tokens: int, *, edit_new_tokens: bool = False, seed: int = 0, **options: Unpack[GenerationOptions]
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
        with self._running():
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
        with self._running():
            self._refuse_too_much([name for name in keep if name not in self._asked])
            found = self._replayer.run(self._batch, list(dict.fromkeys(keep)), grad=self._grad)
        self._first = self._first or found
        self._sites.update(found.sites)
        self._asked.update(keep)
        return found

    def compute(self) -> None:
        """Run the model for the first pass, unless it did."""
        self._computed()

    def _computed(self) -> Pass:
        """Return the first pass, which is made now unless it was."""
        return self._first or self._run(self._keep)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Put the model into the state in which it runs, inside.

        Raises:
            CaptureError: The replay is over.
        """
        if not self._is_open:
            raise CaptureError("this replay is over: ask for logits and sites inside the with block")
        with self._ready():
            yield

    def _refuse_too_much(self, names: Iterable[str], *, n_logits: int = 1) -> None:
        """Raise PlanError if the results so far, these sites and the logits do not fit into host memory."""
        infos, lengths = self._replayer.infos(dict.fromkeys([*self._sites, *names])), self._lengths()
        core = self._replayer.core
        logits_bytes = n_logits * sum(lengths) * (n_logits_of(core) or 0) * core.dtype.itemsize
        self._memory.require(list(infos.values()), lengths, logits_bytes=logits_bytes)

    def _lengths(self) -> list[int]:
        return [len(example.input_ids) for example in self._batch.rows]

    def close(self) -> None:
        """Refuse further passes; computed results stay."""
        self._is_open = False
        self._replayer.rows.close()


@contextmanager
def ready_to_run(
    model: nn.Module | PipelineScheduleSingle, tensor_parallel: ProcessGroup | DeviceMesh | None
) -> Iterator[nn.Module]:
    """Let a model run uncompiled and in evaluation mode inside; yield it, or the model of this stage of a pipeline.

    Args:
        model: The model, or the schedule of a torch pipeline.
        tensor_parallel: The ranks over which activations are split, if the model does not show them.
    """
    with ExitStack() as stack:
        if isinstance(model, PIPELINE_TYPES):
            model = stack.enter_context(as_model(model))
        stack.enter_context(declared_group(model, tensor_parallel))
        called = runnable(model)
        stack.enter_context(running_uncompiled(called))
        stack.enter_context(evaluating(called))
        yield model

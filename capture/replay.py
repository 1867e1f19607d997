"""Stored or edited activations back into the model, for some examples of an archive, interactively.

    with residua.replay(model, "acts.zarr", examples=[3], at="resid_post.5", edits=[...]) as run:
        run.logits          # per example, (tokens, vocabulary)
        run["resid_post.7"] # per example, (rows, width)

The stored rows go in at ``at``, the edits apply, and only the blocks above run. Nothing runs before it is asked for;
what was computed is kept. Between and after the passes the model is as it was.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from residua.capture.attention import eager_attention
from residua.capture.compiled import running_uncompiled
from residua.capture.probing import evaluating
from residua.capture.ranks import on_rank
from residua.capture.replayer import Replayer, unlike_the_plan
from residua.capture.samemodel import computes_otherwise
from residua.capture.wrappers import core_of
from residua.store.archive import Archive
from residua.store.editparse import EditSource, parse_edits
from residua.store.errors import CaptureError


class Replay:
    """What `replay` gives: the logits and sites of some examples, computed when they are first asked for.

    Attributes:
        examples: Numbers of the examples, in the order of every list here.
        notes: What a reader of the results has to know, one sentence each: conditions that differ from those of the
            capture, rows that were rounded, blocks that could not be left out.
        skipped_blocks: How many blocks did not run.
    """

    def __init__(self, replayer: Replayer, examples: Sequence[int], keep: Sequence[str]) -> None:
        self.examples = tuple(examples)
        self._replayer = replayer
        self._batch = replayer.batch(self.examples)
        self._keep = replayer.sites(keep)
        self._sites: dict[str, list[Tensor]] = {}
        self._logits: list[Tensor] | None = None
        self._is_open = True
        replayer.steps(self._batch, edited=True)  # what does not fit these examples is said before anything runs
        skip, problem = replayer.starts_at(self._batch)
        self.skipped_blocks = len(skip.blocks)
        notes = [*replayer.notes, problem, unlike_the_plan(replayer.archive, self.examples)]
        self.notes = tuple(note for note in notes if note)

    @property
    def logits(self) -> list[Tensor]:
        """Logits of every token of each example, (tokens, vocabulary), in the model's type and on its device.

        Raises:
            CaptureError: The context was left before they were computed, or another process has them.
        """
        if self._logits is None:
            self._run(self._keep)
        if self._logits is None:
            raise CaptureError(f"the model gave no logits{on_rank()}: it has no language modelling head here")
        return self._logits

    def __getitem__(self, site: str) -> list[Tensor]:
        """Return the rows of a site above the stored ones, (rows, *row) an example, edits included.

        Raises:
            UnknownSiteError: The model has no such site.
            PlanError: The site lies below the stored rows.
            CaptureError: The context was left before they were computed, or another process has them.
        """
        (name,) = self._replayer.sites(site)
        if name not in self._sites:
            self._run([*self._keep, name])
        if name not in self._sites:
            raise CaptureError(f"{name} was met in another process than this one{on_rank()}, which has its rows")
        return self._sites[name]

    def __repr__(self) -> str:
        return f"<Replay of examples {list(self.examples)} of {self._replayer.archive.path}>"

    def _run(self, keep: Sequence[str]) -> None:
        self._require_open()
        found = self._replayer.run(self._batch, list(dict.fromkeys(keep)))
        self._logits = found.logits
        self._sites.update(found.sites)

    def _require_open(self) -> None:
        if not self._is_open:
            raise CaptureError("this replay is over: ask for logits and sites inside the with block")

    def close(self) -> None:
        """Run nothing any more; what was computed stays."""
        self._is_open = False
        self._replayer.stored.close()


@contextmanager
def replay(
    model: nn.Module,
    archive: Archive | str | PathLike[str],
    *,
    examples: Sequence[int],
    at: str | Iterable[str] | None = None,
    edits: EditSource = (),
    keep: str | Iterable[str] = (),
    force: bool = False,
    tensor_parallel: ProcessGroup | DeviceMesh | None = None,
) -> Iterator[Replay]:
    """Put stored rows of some examples back into the model, edit, and run only the layers above.

    The examples run together in one batch, padded and numbered as the capture did it. Without edits, logits and later
    sites are those of the captured run bit for bit if the examples are a batch of the plan, the rows were stored
    without loss, and dtype, attention implementation and threads are those of the capture; what differs is in `notes`.

    On a model that is spread over several processes all of them have to replay, alike; see `residua.tap`.

    Args:
        model: The model that was captured, wrapped and spread as it likes.
        archive: The archive, or its folder.
        examples: Numbers of examples.
        at: Where stored rows go in: a site of the residual stream, below which nothing is computed, or any other, or
            several. None puts nothing in and runs the model in full.
        edits: Edits in order, as `residua.store.edits` lists them: dictionaries, or a YAML or JSON file.
        keep: Sites that are kept by the first pass; others cost a pass each when they are asked for.
        force: Go on with a model that is not the one that was captured, and note it.
        tensor_parallel: The ranks over which activations are split, where this cannot be told from the model.

    Yields:
        The replay.

    Raises:
        PlanError: An edit does not fit, rows do not exist, the model is another. Nothing has run by then.
        UnknownSiteError: The model or the archive does not have a site.
        NotCapturedError: Rows are not captured yet.

    Example:
        >>> with residua.replay(model, "acts.zarr", examples=[0], at="resid_post.3") as run:  # doctest: +SKIP
        ...     run.logits[0].shape
    """
    opened = archive if isinstance(archive, Archive) else Archive(archive)
    parsed = parse_edits(edits)
    places = [] if at is None else [at] if isinstance(at, str) else list(at)
    with ExitStack() as stack:
        stack.enter_context(running_uncompiled(model))
        stack.enter_context(evaluating(model))
        core = core_of(model)
        if isinstance(core, PreTrainedModel) and computes_otherwise(opened, model):
            stack.enter_context(eager_attention(core))
        replayer = Replayer(model, opened, at=places, edits=parsed, force=force, tensor_parallel=tensor_parallel)
        run = Replay(replayer, examples, [keep] if isinstance(keep, str) else list(keep))
        stack.callback(run.close)
        yield run

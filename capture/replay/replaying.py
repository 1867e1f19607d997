"""The forward passes of a capture that replays another archive: from its stored rows, with edits."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
from torch import Tensor

from residua.capture.buffers.row_index import Indices
from residua.capture.forward.plan_batch import PlanBatch
from residua.capture.replay.engine import Replayer
from residua.capture.replay.skipping import skipping
from residua.capture.taps.reading import Taps
from residua.capture.taps.tap import tap
from residua.store.examples.schedule import Batch


def changed_sites(replayer: Replayer) -> tuple[str, ...]:
    """Return the sites that rows go into, and those that are edited."""
    return (*replayer.start.sites, *(name for edit in replayer.edits_at for name in edit.actions))


class Replaying:
    """What is done around each forward pass of `record`.

    Args:
        replayer: Knows the rows that go in, and the edits.
        examples: From the number of an example in the new archive to its number in the one that is replayed.

    Attributes:
        changed: The sites that rows go into, and those that are edited.
    """

    def __init__(self, replayer: Replayer, examples: Indices) -> None:
        self.changed = changed_sites(replayer)
        self._replayer = replayer
        self._examples = examples

    def read_ahead(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches; while the model is at work on one, the rows of the next are read."""
        waiting: Batch | None = None
        for batch in batches:
            if waiting is not None:
                self._replayer.prefetch(self._made(batch.examples))
                yield waiting
            waiting = batch
        if waiting is not None:
            yield waiting

    def _made(self, examples: Indices) -> PlanBatch:
        return self._replayer.batch(self._examples[examples].tolist())

    @contextmanager
    def of(self, taps: Taps, examples: Sequence[int]) -> Iterator[None]:
        """Put rows in and edit while the model runs on a batch inside; `taps` read what has become of each site.

        Args:
            taps: Not attached yet.
            examples: Numbers of the examples that run together, in the new archive.

        Raises:
            PlanError: An edit needs stored rows that there are not.
        """
        replayer = self._replayer
        made = self._made(np.asarray(examples))
        steps = replayer.steps(made, edited=True)
        skip, _ = replayer.starts_at(made)  # before anything is tapped: it may have to try the model

        def pass_by(name: str, tensor: Tensor) -> Tensor:
            for step in steps[name]:
                tensor = step(tensor)
            return tensor

        with ExitStack() as stack:
            if steps:
                sites = replayer.known(steps)
                stack.enter_context(tap(replayer.model, sites, pass_by, tensor_parallel=replayer.group))
            stack.enter_context(skipping(skip))
            stack.enter_context(taps.attached())  # last, so that they read what the edits have left
            yield

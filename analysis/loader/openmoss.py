"""Batches for OpenMOSS Language-Model-SAEs (`llamascopium`, before that `lm_saes`): its trainer's activation stream."""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from residua.analysis.loader.division import State
from residua.analysis.loader.feed import named, renamed, require_columns, require_package
from residua.analysis.loader.loader import Loader
from residua.analysis.support.device import Batch

_TRAINER = "OpenMOSS"


def for_openmoss(loader: Loader, hooks: Mapping[str, str] | None = None) -> "OpenMOSSFeed":
    """Return the ``activation_stream`` of OpenMOSS's `Trainer.fit`.

    A batch is ``{hook: (batch, *row shape), "tokens": (batch,), "mask": (batch,)}``; all of the mask is true, because
    archives hold no padding.

    >>> feed = residua.analysis.for_openmoss(archive.loader(site, batch_size=2048, columns=["token"]))  # doctest: +SKIP
    >>> sae.set_dataset_average_activation_norm(feed.mean_norms())  # doctest: +SKIP
    >>> trainer.fit(sae, feed)  # doctest: +SKIP

    Args:
        loader: A loader with the column ``token``; it may end, as OpenMOSS's own streams do.
        hooks: The hook points of the configuration by site; by default they are the sites' names.

    Raises:
        MissingPackageError: Neither package is installed.
        AnalysisError: The loader has no column ``token``, or `hooks` does not fit its sites.
    """
    require_package(["llamascopium", "lm_saes"], _TRAINER, "pip install llamascopium")
    require_columns(loader, ["token"], _TRAINER)
    return OpenMOSSFeed(loader, named(loader, hooks, _TRAINER))


class OpenMOSSFeed:
    """Batches for OpenMOSS; made by `for_openmoss`.

    Its trainer looks at the first batch of a stream before it trains on the stream. So the first batch comes again
    if the stream is asked anew before a second one was taken; later, the stream goes on where it was.

    Attributes:
        loader: The loader.
    """

    def __init__(self, loader: Loader, names: Mapping[str, str]) -> None:
        self.loader = loader
        self._names = names
        self._batches: Iterator[Batch] | None = None
        self._first: Batch | None = None  # while no second one was taken

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self._first is not None:
            yield self._form(self._first)
        if self._batches is None:
            self._batches = iter(self.loader)
            if (first := next(self._batches, None)) is not None:
                self._first = first
                yield self._form(first)
        batches = self._batches
        for batch in batches:
            self._first = None
            yield self._form(batch)
        self._batches = self._first = None

    def mean_norms(self) -> dict[str, float]:
        """Return the mean norm of rows by hook, from stored rows, as ``norm_activation="dataset-wise"`` needs it."""
        constants = self.loader.constants("mean_norm")
        return {
            name: prod(self.loader.row_shape(site)) ** 0.5 * constants[site].inverse.item()
            for site, name in self._names.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the batch that was returned last; see `Loader.state_dict`."""
        return self.loader.state_dict()

    def load_state_dict(self, state: State | Sequence[State]) -> None:
        """Continue after the batch at which `state` was made; see `Loader.load_state_dict`."""
        self.loader.load_state_dict(state)
        self._batches = self._first = None

    def _form(self, batch: Batch) -> dict[str, Tensor]:
        tokens = batch["token"]
        return {**renamed(batch, self._names), "tokens": tokens, "mask": torch.ones_like(tokens, dtype=torch.bool)}

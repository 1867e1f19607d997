"""Batches for `trainSAE` of dictionary_learning: an iterator of tensors, also for crosscoders over sites or models."""

from typing import Self

import torch
from torch import Tensor

from residua.analysis.loader.feed import Feed, require_endless, require_package
from residua.analysis.loader.loader import Loader
from residua.analysis.support.device import Batch
from residua.store.base.errors import AnalysisError, few

_TRAINER = "dictionary_learning's trainSAE"


def for_train_sae(loader: Loader, *, steps: int | None = None) -> "TrainSAEFeed":
    """Return the ``data`` of `trainSAE`: tensors, ``(batch, *row shape)``, or ``(batch, sites, *row shape)``.

    >>> feed = residua.analysis.for_train_sae(archive.loader(site, batch_size=8192, epochs=None))  # doctest: +SKIP
    >>> trainSAE(data=feed, trainer_configs=[...], steps=10_000)  # doctest: +SKIP

    Args:
        loader: The loader, with ``epochs=None``; of several sites, batches are stacked. One of `PairedRows` gives
            (batch, 2, width), for crosscoders of two models.
        steps: Batches of an iteration, equal to the ``steps`` of `trainSAE`. It takes one batch more than it trains on
            where it can, which a training that is resumed would miss.

    Raises:
        MissingPackageError: dictionary_learning is not installed.
        AnalysisError: The loader has an end, or sites of different widths.
    """
    require_package(["dictionary_learning"], _TRAINER, "pip install dictionary-learning, or put its source on the path")
    require_endless(loader, _TRAINER)
    return TrainSAEFeed(loader, steps)


class TrainSAEFeed(Feed[Tensor]):
    """Tensors for `trainSAE`; made by `for_train_sae`.

    Attributes:
        loader: The loader.
        config: What `trainSAE` writes into its ``config.json`` under ``buffer``.
    """

    def __init__(self, loader: Loader, steps: int | None) -> None:
        if len({loader.row_shape(site) for site in loader.sites}) > 1:
            raise AnalysisError(
                f"{few(loader.sites)} have rows of different shapes, which one tensor cannot hold: choose sites of one "
                "width"
            )
        super().__init__(loader, self._stacked)
        self._steps, self._n_left = steps, steps
        self.config = {"residua": loader.settings()}

    def __iter__(self) -> Self:
        self._n_left = self._steps
        return self

    def __next__(self) -> Tensor:
        if self._n_left is not None:
            if not self._n_left:
                raise StopIteration
            self._n_left -= 1
        return super().__next__()

    def _stacked(self, batch: Batch) -> Tensor:
        sites = self.loader.sites
        return batch[sites[0]] if len(sites) == 1 else torch.stack([batch[site] for site in sites], dim=1)

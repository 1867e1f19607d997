"""Batches as saev's data loaders give them, with the attributes that its training reads from them."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from residua.analysis.loader.division import State
from residua.analysis.loader.feed import only_site, require_columns
from residua.analysis.loader.loader import Loader
from residua.analysis.support.device import Batch

_TRAINER = "saev"


def for_saev(loader: Loader) -> "SaevFeed":
    """Return what trains in place of saev's `ShuffledDataLoader`.

    A batch is ``{"act": (batch, width) float32, "example_idx": (batch,) int32, "token_idx": (batch,) int32}``; the
    token's index is its position in the example.

    >>> feed = residua.analysis.for_saev(
    ...     archive.loader(site, batch_size=16384, columns=["example", "position"])
    ... )  # doctest: +SKIP

    Args:
        loader: A loader of one site with the columns ``example`` and ``position``.

    Raises:
        AnalysisError: The loader has several sites, or not these columns.
    """
    only_site(loader, _TRAINER)
    require_columns(loader, ["example", "position"], _TRAINER)
    return SaevFeed(loader)


class SaevFeed:
    """Batches for saev; made by `for_saev`. Each iteration is the next epoch, in an order of its own.

    Attributes:
        loader: The loader.
        batch_size: Rows of a batch.
        drop_last: Whether rows that fill no batch are left out.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self.batch_size, self.drop_last = loader.batch_size, loader.drop_last

    def __len__(self) -> int:
        return self.loader.batches_per_epoch

    @property
    def n_batches(self) -> int:
        """Number of batches of an epoch."""
        return len(self)

    @property
    def n_samples(self) -> int:
        """Number of rows of an epoch, of all ranks together."""
        return self.loader.n_rows

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.loader:
            yield self._form(batch)
        self.loader.set_epoch(self.loader.state_dict()["epoch"] + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the batch that was returned last; see `Loader.state_dict`."""
        return self.loader.state_dict()

    def load_state_dict(self, state: State | Sequence[State]) -> None:
        """Continue after the batch at which `state` was made; see `Loader.load_state_dict`."""
        self.loader.load_state_dict(state)

    def _form(self, batch: Batch) -> dict[str, Tensor]:
        return {
            "act": batch[self.loader.sites[0]].float(),
            "example_idx": batch["example"].int(),
            "token_idx": batch["position"].int(),
        }

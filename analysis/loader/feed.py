"""What trainers of other packages are given: a loader's batches in their form, and the loader's place.

Each of them asks for batches in its own way (`sae_lens`, `dictionary_learning`, `openmoss`, `saev`). None of these
packages is needed to read this one.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Generic, Self, TypeVar

from torch import Tensor

from residua.analysis.loader.division import State
from residua.analysis.loader.loader import Loader
from residua.analysis.support.device import Batch
from residua.store.base.errors import AnalysisError, MissingPackageError, few
from residua.store.format.site_aliases import canonical

T = TypeVar("T")


class Feed(Iterator[T], Generic[T]):
    """The batches of a loader, each in the form of a trainer; it has the loader's state.

    Args:
        loader: The loader.
        form: Makes of a loader's batch what the trainer asks for.

    Attributes:
        loader: The loader.
    """

    def __init__(self, loader: Loader, form: Callable[[Batch], T]) -> None:
        self.loader = loader
        self._form = form
        self._batches: Iterator[Batch] | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        if self._batches is None:
            self._batches = iter(self.loader)
        return self._form(next(self._batches))

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the batch that was returned last; see `Loader.state_dict`."""
        return self.loader.state_dict()

    def load_state_dict(self, state: State | Sequence[State]) -> None:
        """Continue after the batch at which `state` was made; see `Loader.load_state_dict`."""
        self.loader.load_state_dict(state)
        self._batches = None


def require_package(names: Sequence[str], trainer: str, install: str) -> None:
    """Raise MissingPackageError unless one of the packages `names` is there.

    Args:
        names: Packages that have the trainer, each under its import name.
        trainer: The trainer, for the message.
        install: What to do, for the message.
    """
    if not any(name in sys.modules or find_spec(name) is not None for name in names):
        raise MissingPackageError(f"batches for {trainer} need {names[0]}, which is not installed: {install}")


def require_endless(loader: Loader, trainer: str) -> None:
    """Raise AnalysisError unless a loader's batches have no end, as `trainer` expects."""
    if not loader.is_endless:
        raise AnalysisError(
            f"{trainer} asks for batches until it has seen enough, and {loader} ends after {len(loader):,}: create the "
            "loader with epochs=None"
        )


def require_columns(loader: Loader, names: Sequence[str], trainer: str) -> None:
    """Raise AnalysisError unless a loader's batches have the columns `names`."""
    if lacking := [name for name in names if name not in loader.columns]:
        raise AnalysisError(
            f"batches for {trainer} have the {' and the '.join(lacking)} of each row, which {loader} does not read: "
            f"create the loader with columns={[*loader.columns, *lacking]}"
        )


def only_site(loader: Loader, trainer: str) -> str:
    """Return the site of a loader that has one; else raise AnalysisError."""
    if len(loader.sites) != 1:
        raise AnalysisError(
            f"{trainer} trains on one site, and {loader} has {few(loader.sites)}: create a loader of one of them"
        )
    return loader.sites[0]


def named(loader: Loader, hooks: Mapping[str, str] | None, trainer: str) -> dict[str, str]:
    """Return the name that a trainer has for each site; by default the site's own.

    Raises:
        AnalysisError: `hooks` names a site that the loader does not have, or two sites have one name.
    """
    given = {canonical(site): name for site, name in (hooks or {}).items()}
    found = {site: site for site in loader.sites} | given
    if unknown := sorted(set(found) - set(loader.sites)):
        raise AnalysisError(f"{trainer}: hooks= names {few(unknown)}, but {loader} has {few(loader.sites)}")
    if len(set(found.values())) < len(found):
        raise AnalysisError(f"{trainer}: hooks= gives two sites one name: {found}")
    return found


def renamed(batch: Batch, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the values of a batch's sites under the names that a trainer has for them."""
    return {name: batch[site] for site, name in names.items()}

"""Rows of two models over the same tokens, side by side: what crosscoders that compare models are trained on."""

from collections.abc import Mapping, Sequence
from itertools import chain
from os import PathLike
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from residua.analysis.loader.loader import Loader, LoaderOptions
from residua.analysis.loader.normalisation import Kind, Normalisation
from residua.analysis.loader.order import Numbers, Source
from residua.analysis.rows.blocks import blocks
from residua.store.base.errors import AnalysisError
from residua.store.encoding.spec import ArraySpec
from residua.store.read.archive import Archive
from residua.store.read.array import ArchiveArray, as_tensor
from residua.store.read.rows_in_shards import Array, Filled, Following, in_steps
from residua.store.read.stacks import open_archive

_SAME = ("example", "position", "token")


class PairedRows(Dataset[Tensor]):
    """The rows of one site in two archives of the same tokens: row i is (2, width), the first archive's row first.

    It is indexed as the activation caches that crosscoder trainers take, by a row, a slice or a list of rows. For
    training, `loader` reads whole blocks and shuffles them, which is far faster than rows from anywhere.

    >>> pair = residua.analysis.PairedRows("base.zarr", "chat.zarr", "resid_post.12")  # doctest: +SKIP
    >>> pair[7].shape, pair[10:20].shape  # doctest: +SKIP
    (torch.Size([2, 2304]), torch.Size([10, 2, 2304]))

    Args:
        first: An archive, or its path or address.
        second: Another one, of the same tokens.
        site: The site in the first archive.
        second_site: The site in the second one; by default the same.

    Raises:
        UnknownSiteError: An archive has no such site.
        AnalysisError: The rows are not of the same tokens; the message says where they differ. Or their widths differ.
    """

    def __init__(
        self,
        first: Archive | str | PathLike[str],
        second: Archive | str | PathLike[str],
        site: str,
        second_site: str | None = None,
    ) -> None:
        names = site, second_site or site
        self.archives = open_archive(first).of_sites(names[0]), open_archive(second).of_sites(names[1])
        sites = [self._only(archive, name) for archive, name in zip(self.archives, names, strict=True)]
        self._rows = _Stacked(self.archives, sites)
        _refuse_other_tokens(*self.archives)
        self.site = sites[0]

    def __len__(self) -> int:
        return self.archives[0].n_rows

    def __getitem__(self, rows: int | slice | Sequence[int] | npt.NDArray[np.int64]) -> Tensor:
        """Return one row, (2, width), or several, (rows, 2, width), of the stored type.

        Raises:
            IndexError: There is no such row.
        """
        if isinstance(rows, int | np.integer):
            return as_tensor(self._rows.numpy(np.array([rows])))[0]
        numbers = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows, np.int64)
        return as_tensor(self._rows.numpy(numbers))

    def __getitems__(self, rows: list[int]) -> list[Tensor]:
        """Return the rows of a batch; torch's `DataLoader` asks for them at once."""
        return [*self[rows]]

    def loader(self, *, batch_size: int, **options: Unpack[LoaderOptions]) -> Loader:
        """Return shuffled batches, ``{site: (batch, 2, width), "row": ...}``; see `residua.analysis.Loader`.

        ``normalise`` scales each model by itself. Conditions and columns are those of the first archive.
        """
        return _PairedLoader(self._rows, self.archives[0], self.site, batch_size=batch_size, **options)

    @staticmethod
    def _only(archive: Archive, site: str) -> str:
        only, *more = archive.select(site)
        if more:
            raise AnalysisError(
                f"a pair has one site of each archive, and {site} is {1 + len(more)} of {archive.place}: name one"
            )
        archive.refuse_losses([only], "a pair")
        return only


class _Stacked:
    """Rows of several arrays, side by side, read as if they were one array: (rows, arrays, *row shape)."""

    def __init__(self, archives: Sequence[Archive], sites: Sequence[str]) -> None:
        self._places = [*zip(archives, sites, strict=True)]
        first, *others = arrays = self.arrays
        if any(each.shape[1:] != first.shape[1:] for each in others):
            shapes = " and ".join(f"{each.name} has {each.shape[1:]}" for each in arrays)
            raise AnalysisError(f"rows of different shapes cannot be paired: {shapes} values a row")
        self.shape: tuple[int, ...] = (first.shape[0], len(arrays), *first.shape[1:])
        is_same = all(each.stored_dtype == first.stored_dtype for each in others)
        self.stored_dtype: np.dtype[Any] = first.stored_dtype if is_same else np.dtype(np.float32)
        self.specs: tuple[ArraySpec, ...] = tuple(chain.from_iterable(each.specs for each in arrays))

    @property
    def arrays(self) -> list[ArchiveArray]:
        return [archive[site] for archive, site in self._places]

    @property
    def is_remote(self) -> bool:
        return any(archive.is_remote for archive, _ in self._places)

    def numpy(self, rows: Numbers, *, dtype: npt.DTypeLike | None = None) -> Array:
        wanted = self.stored_dtype if dtype is None else dtype
        return np.stack([each.numpy(rows, dtype=wanted) for each in self.arrays], axis=1)

    def fill(self, out: Array, pieces: Sequence[Numbers | range], following: Following | None = None) -> None:
        filled = [Filled(each.fill, each.shape[1:], each.stored_dtype) for each in self.arrays]
        for places, parts in in_steps(filled, pieces, following, self.specs[0]):
            for number, part in enumerate(parts):
                out[places, number] = part


class _PairedLoader(Loader):
    """A loader of one site, whose values are read from several archives."""

    def __init__(self, rows: _Stacked, *arguments: Any, **settings: Any) -> None:
        self._paired = rows
        super().__init__(*arguments, **settings)

    def _sources(self) -> Mapping[str, Source]:
        return {self.sites[0]: self._paired}

    @property
    def _is_remote(self) -> bool:
        return self._paired.is_remote

    def constants(self, kind: Kind) -> dict[str, Normalisation]:
        """Return constants that normalise each model by itself, for both models' values one after the other."""
        found = [self._constants(self.sites[0], each, kind) for each in self._paired.arrays]
        mean = torch.cat([each.mean for each in found])

        def joined(parts: list[Tensor]) -> Tensor:
            if kind != "whiten":
                return torch.cat(parts)
            whole: Tensor = torch.block_diag(*parts)  # type: ignore[no-untyped-call]  # torch leaves it so
            return whole

        width = len(mean) // len(found)
        factor = joined([each.factor.expand(width) if each.factor.ndim < 2 else each.factor for each in found])
        inverse = joined([each.inverse.expand(width) if each.inverse.ndim < 2 else each.inverse for each in found])
        return {self.sites[0]: Normalisation(kind, mean, factor, inverse)}


def _refuse_other_tokens(first: Archive, second: Archive) -> None:
    """Raise AnalysisError unless the rows of two archives are of the same tokens of the same examples."""
    places = f"{first.place} and {second.place}"
    if (first.n_rows, first.captured_rows()) != (second.n_rows, second.captured_rows()):
        raise AnalysisError(
            f"{places} cannot be paired: {first.n_rows:,} and {second.n_rows:,} rows, not all of them captured in "
            "both, are not the same tokens: capture both from the same dataset, with the same positions, to the end"
        )
    for start, stop in blocks(first):
        for name in _SAME:
            one, other = (getattr(archive.rows, name).numpy(slice(start, stop)) for archive in (first, second))
            if (differ := np.flatnonzero(one != other)).size:
                row = start + int(differ[0])
                raise AnalysisError(
                    f"{places} cannot be paired: row {row:,} (example {first.rows.example[row]}, position "
                    f"{first.rows.position[row]}) has {name} {one[differ[0]]} in the first and {other[differ[0]]} in "
                    "the second: capture both from the same tokens, such as a dataset with input_ids"
                )

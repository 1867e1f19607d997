"""What an edit is to a running model: an action, which takes the rows to change and returns the change to make.

An action can fail only before the model runs: when it is made, and when it gets its rows. `StoredRows` reads the rows
of an archive that edits and replays bring into the model.

Legend: `N` chosen rows, `B` examples in the batch, `T` padded positions.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from residua.capture.buffers.row_index import Indices
from residua.capture.hooks.site import SiteInfo
from residua.capture.runtime.collectives import is_alone
from residua.store.base.errors import PlanError
from residua.store.edits.archive_values import mean_rows
from residua.store.examples.memory import ExampleSource
from residua.store.read.archive import Archive

_MAX_PREFETCHED = 8  # batches times sites

Change = Callable[[Tensor], Tensor]
"""From rows, (N, *row), to their new values; shape, type and device stay."""
Step = Callable[[Tensor], Tensor]
"""From the full (B, T, *row) tensor of a site to the tensor that the model continues with."""


@dataclass(frozen=True, kw_only=True)
class ChosenRows:
    """The rows of one batch that an edit changes, (N,) each.

    Attributes:
        source: Index into the flattened (examples, positions) axes of the batch.
        example: Number of the example.
        position: Position in the example.
        row: Row of the archive; -1 for a token whose row was not captured.
        from_row: For edits that bring stored rows: the row that replaces it.
    """

    source: Indices
    example: Indices
    position: Indices
    row: Indices
    from_row: Indices


Action = Callable[[ChosenRows], Change]
"""From the rows to change to the change; reads or refuses what the change needs for these rows."""


class SiteRows(Protocol):
    """Rows that edits bring into the model: those of an archive, or of a run without its edits."""

    @property
    def source(self) -> ExampleSource:
        """The archive or run whose examples they belong to."""
        ...

    def require_site(self, info: SiteInfo, /) -> None:
        """Raise PlanError unless there are rows of a site, of the shape that the model has there."""
        ...

    def require(self, site: str, rows: Indices, dtype: torch.dtype, /) -> None:
        """Check, before the model runs, that these rows can go into a model of this type."""
        ...

    def read(self, site: str, rows: Indices, /) -> Tensor:
        """Return rows of a site, (rows, *row)."""
        ...

    def means(self, site: str, classes: Sequence[Sequence[int] | None], /) -> "list[npt.NDArray[np.float64] | None]":
        """Return the mean of the rows of each class of examples, as `mean_rows` does."""
        ...

    def prefetch(self, site: str, rows: Indices, /) -> None:
        """Start to read rows that `read` will be asked for."""
        ...

    def close(self) -> None:
        """Let go of what was read ahead."""
        ...


class StoredRows:
    """Reads rows of an archive as CPU tensors of the stored type, on request or ahead of time in a thread.

    Args:
        archive: The archive.

    Example:
        >>> rows = StoredRows(archive)  # doctest: +SKIP
        >>> rows.prefetch("resid_post.5", next_rows)  # doctest: +SKIP
    """

    def __init__(self, archive: Archive) -> None:
        self.archive = archive
        self._pool: ThreadPoolExecutor | None = None
        self._prefetched: dict[tuple[str, bytes], Future[Tensor]] = {}

    @property
    def source(self) -> Archive:
        """The archive."""
        return self.archive

    def require_site(self, info: SiteInfo) -> None:
        """Raise PlanError unless the archive stores a site, in rows of the shape that the model has there."""
        if info.name not in self.archive.sites:
            raise PlanError(
                f"{self.archive.place} does not store {info.name}; it stores {', '.join(self.archive.sites)}"
            )
        shape = self.archive[info.name].shape[1:]
        if shape != info.row_shape:
            raise PlanError(
                f"{self.archive.place} has rows of shape {shape} at {info.name}, the model {info.row_shape}"
            )

    def means(self, site: str, classes: Sequence[Sequence[int] | None]) -> list[npt.NDArray[np.float64] | None]:
        """Return the mean of the captured rows of each class of examples, as `mean_rows` does."""
        return mean_rows(self.archive, site, classes)

    def read(self, site: str, rows: Indices) -> Tensor:
        """Return rows of a site, (rows, *row); a prefetched result is used once."""
        prefetched = self._prefetched.pop((site, rows.tobytes()), None)
        return self.archive[site].torch(rows) if prefetched is None else prefetched.result()

    def require(self, site: str, rows: Indices, dtype: torch.dtype) -> None:
        """Check, before the model runs, that rows of a site are captured and fit the model's type.

        The values are read only if the stored type has a larger range than `dtype` and one process runs the model. Of
        several processes only those that use the rows read them; they find out then.

        Raises:
            NotCapturedError: Some rows are not captured yet.
            PlanError: Values overflow in `dtype`, or are whole numbers of another type.
        """
        self.archive.require_captured(rows)
        stored = getattr(torch, self.archive.plan.site(site).dtype)
        if not stored.is_floating_point:
            if stored != dtype:
                raise PlanError(
                    f"stored rows of {site} are {dtype_name(stored)}, and the model has {dtype_name(dtype)}"
                )
        elif is_alone() and torch.finfo(stored).max > torch.finfo(dtype).max:
            values = self.read(site, rows)
            refuse_overflow(site, values, values.to(dtype))

    def prefetch(self, site: str, rows: Indices) -> None:
        """Start to read rows in the background; `read` raises if that fails."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="residua-replay")
        while len(self._prefetched) >= _MAX_PREFETCHED:  # a process that never reaches the site must not keep them all
            self._prefetched.pop(next(iter(self._prefetched)))
        self._prefetched[(site, rows.tobytes())] = self._pool.submit(self.archive[site].torch, rows)

    def close(self) -> None:
        """Drop prefetched rows and end the thread."""
        self._prefetched.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def refuse_overflow(site: str, stored: Tensor, converted: Tensor) -> None:
    """Raise PlanError if finite stored values became infinite in the model's type."""
    if stored.dtype == converted.dtype or torch.equal(stored.isfinite(), converted.isfinite().to(stored.device)):
        return
    raise PlanError(
        f"stored rows of {site} hold values that {dtype_name(converted.dtype)}, in which the model computes, cannot "
        "hold: load the model in a wider type"
    )


@dataclass(frozen=True, kw_only=True)
class EditContext:
    """What an action needs besides the edit and the site.

    Attributes:
        stored: Rows of the archive, or of the run without edits.
        dtype: The type of the site's tensor in the model.
    """

    stored: SiteRows
    dtype: torch.dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a torch type, without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def widen(values: Tensor) -> Tensor:
    """Return values as float32; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()

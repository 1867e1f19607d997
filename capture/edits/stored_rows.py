"""Stored rows on their way back: read when they are needed, or ahead of time while the model is at work."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from residua.capture.buffers.row_index import Indices
from residua.capture.runtime.collectives import is_alone
from residua.store.base.errors import PlanError
from residua.store.read.archive import Archive

_Key = tuple[str, bytes]
_MOST_AHEAD = 8  # batches times sites


class StoredRows:
    """Reads rows of an archive as tensors of the stored type, on the CPU.

    Args:
        archive: Where they are stored.

    Example:
        >>> rows = StoredRows(archive)  # doctest: +SKIP
        >>> rows.prefetch("resid_post.5", next_rows)  # doctest: +SKIP
    """

    def __init__(self, archive: Archive) -> None:
        self.archive = archive
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: dict[_Key, Future[torch.Tensor]] = {}

    def read(self, site: str, rows: Indices) -> torch.Tensor:
        """Return rows of a site, (rows, *row); those that were fetched ahead are handed out once."""
        ahead = self._ahead.pop((site, rows.tobytes()), None)
        return self.archive[site].torch(rows) if ahead is None else ahead.result()

    def require(self, site: str, rows: Indices, dtype: torch.dtype) -> None:
        """Make sure, before a model runs, that rows of a site are there and that the model's type can hold them.

        Values are looked at only where the stored type reaches further than `dtype`, and one process runs the model:
        of several, those read rows that use them, and find out then.

        Raises:
            NotCapturedError: They are not captured yet.
            PlanError: They would overflow.
        """
        self.archive.require_captured(rows)
        stored = getattr(torch, self.archive.plan.site(site).dtype)
        if is_alone() and torch.finfo(stored).max > torch.finfo(dtype).max:
            values = self.read(site, rows)
            refuse_overflow(site, values, values.to(dtype))

    def prefetch(self, site: str, rows: Indices) -> None:
        """Begin to read rows in the background; a failure comes up in `read`."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="residua-replay")
        while len(self._ahead) >= _MOST_AHEAD:  # a process that never meets the site would keep them for ever
            self._ahead.pop(next(iter(self._ahead)))
        self._ahead[(site, rows.tobytes())] = self._pool.submit(self.archive[site].torch, rows)

    def close(self) -> None:
        """Forget what was fetched ahead, and end the thread."""
        self._ahead.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def refuse_overflow(site: str, stored: torch.Tensor, rows: torch.Tensor) -> None:
    """Raise PlanError if stored rows lost their size when they were brought to the model's type."""
    if stored.dtype != rows.dtype and not torch.equal(torch.isfinite(stored), torch.isfinite(rows).to(stored.device)):
        dtype = str(rows.dtype).removeprefix("torch.")
        raise PlanError(f"stored rows of {site} hold values that {dtype}, in which the model computes, cannot hold")

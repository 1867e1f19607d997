"""The host memory that the results of a run may take, counted before the model runs."""

from collections.abc import Iterable, Sequence
from math import prod

from residua.capture.buffers.host_buffers import torch_dtype
from residua.capture.hooks.site import SiteInfo
from residua.store.base.errors import PlanError
from residua.store.base.naming import named


class ResultMemory:
    """Counts what a run holds in host memory against its limit.

    Args:
        limit: Bytes that logits and rows may take; None for no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._of_edits = 0

    def take_for_edits(self, infos: Iterable[SiteInfo], lengths: Sequence[int]) -> None:
        """Count rows without edits, which edits of the run take, for as long as the run lasts.

        Raises:
            PlanError: They do not fit.
        """
        self._of_edits = bytes_of(infos, lengths)
        self.require([], lengths, logits_bytes=0)

    def require(self, infos: Sequence[SiteInfo], lengths: Sequence[int], *, logits_bytes: int) -> None:
        """Raise PlanError if rows of sites and logits do not fit.

        Args:
            infos: The sites.
            lengths: Tokens of each example.
            logits_bytes: Bytes that logits take.
        """
        held = bytes_of(infos, lengths) + logits_bytes + self._of_edits
        if self._limit is None or held <= self._limit:
            return
        parts = [f"rows of {len(infos)} sites"] if infos else []
        parts += ["logits"] if logits_bytes else []
        parts += ["the rows that its edits take"] if self._of_edits else []
        raise PlanError(
            f"{' and '.join(parts)}, for {sum(lengths):,} tokens, take {held:,} bytes of host memory, and "
            f"{named('host_memory')} is {self._limit:,} bytes: raise it, give fewer sites or texts, or use "
            "residua.capture_dataset, which keeps rows on disk"
        )


def bytes_of(infos: Iterable[SiteInfo], lengths: Sequence[int]) -> int:
    """Return the bytes that rows of sites take; a row of a pattern has an entry for each token of its example."""
    total = 0
    for info in infos:
        shape = info.row_shape or ()
        fixed = prod(size for size in shape if size is not None) * torch_dtype(info.dtype or "float32").itemsize
        total += fixed * sum(n_tokens ** (2 if None in shape else 1) for n_tokens in lengths)
    return total

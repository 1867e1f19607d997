"""What the two directions of a copy share: the result, and the count of bytes."""

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

from residua.store.base.errors import PlanError, few
from residua.store.format.plan import Plan
from residua.store.read.archive import Archive
from residua.store.storage.objects import in_parallel

N_AT_ONCE = 8
"""Files that are copied at a time, and small ones beside them."""

_SMALL_BYTES = 2**20  # a file up to this waits for the server most of the time
_N_SMALL_AT_ONCE = 16

UNKNOWN_BYTES = _SMALL_BYTES + 1
"""Bytes to give for a file whose size is not known and that may be large."""


class FileWork(NamedTuple):
    """The copy of one file: its bytes, and what copies it and returns the bytes that crossed the network."""

    n_bytes: int
    work: Callable[[], int]


def copy_files(works: Sequence[FileWork]) -> int:
    """Copy files, the largest first, so that none is left alone at the end, and small ones beside the first of them.

    Returns:
        The bytes that crossed the network.
    """
    large = threading.BoundedSemaphore(N_AT_ONCE)  # which share the memory

    def copy(each: FileWork) -> int:
        with large if each.n_bytes > _SMALL_BYTES else nullcontext():
            return each.work()

    ordered = sorted(works, key=lambda each: each.n_bytes, reverse=True)
    n_large = sum(each.n_bytes > _SMALL_BYTES for each in works)
    ordered = [*ordered[: min(n_large, N_AT_ONCE)], *ordered[n_large:], *ordered[N_AT_ONCE:n_large]]
    return sum(in_parallel(copy, ordered, n_at_once=N_AT_ONCE + _N_SMALL_AT_ONCE))


@dataclass(frozen=True)
class Copied:
    """What a copy did.

    Attributes:
        n_files: Files of the archive, or of the part of it that was asked for.
        n_bytes: Their bytes.
        sent_bytes: Bytes that crossed the network; the others were there already.
        notes: What the user should know, one sentence each.
    """

    n_files: int
    n_bytes: int
    sent_bytes: int
    notes: tuple[str, ...] = ()


def together(copies: Sequence[Copied], n_bytes: int) -> Copied:
    """Return what several copies did, and one file more of `n_bytes` bytes."""
    return Copied(
        1 + sum(copied.n_files for copied in copies),
        n_bytes + sum(copied.n_bytes for copied in copies),
        n_bytes + sum(copied.sent_bytes for copied in copies),
        tuple(dict.fromkeys(note for copied in copies for note in copied.notes)),
    )


class BytesDone:
    """Counts bytes from several threads.

    Args:
        total: Bytes in all.
        on_bytes: Called after each step with the bytes done and the total.

    Attributes:
        total: As given.
    """

    def __init__(self, total: int, on_bytes: Callable[[int, int], None]) -> None:
        self.total = total
        self._done, self._on_bytes = 0, on_bytes
        self._lock = threading.Lock()

    def add(self, n_bytes: int) -> None:
        """Count bytes that are done."""
        with self._lock:
            self._done += n_bytes
            self._on_bytes(self._done, self.total)


def is_part_of(part: Plan, whole: Plan) -> bool:
    """Say whether `part` is the plan `whole` with some of its sites, or all."""
    others = [{**plan.to_json(), "sites": None} for plan in (part, whole)]
    return others[0] == others[1] and all(site in whole.sites for site in part.sites)


def refuse_lost_side_tables(mine: Archive, there: Archive) -> None:
    """Raise PlanError if sending the side tables of `mine` would drop some of those that are `there`."""
    names = {table.name for table in mine.side_tables}
    lost = [table.name for table in there.side_tables if table.name not in names] if names else []
    if lost:
        raise PlanError(
            f"{there.place} has the side table {few(lost)}, and {mine.place} does not, so that it would be lost: pull "
            "the archive from there, annotate that copy, and push it"
        )

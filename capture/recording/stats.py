"""The figures of a capture while it runs, and those of several workers as one."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class RecordStats:
    """The progress of a capture.

    Attributes:
        rows: Rows that this run has computed.
        n_tokens: Tokens that this run has computed, without padding.
        committed_rows: Rows that this run has committed.
        logical_bytes: Bytes of the committed rows, as a reader gets them.
        stored_bytes: Bytes of the committed rows on disk.
        n_nonfinite: NaN and infinite values per array path.
        offloaded_bytes: Bytes of rows that were copied from the model to host memory.
        sent_bytes: Bytes of rows that were sent to other ranks, which store them.
        stall_seconds: Time that the model waited for the writer.
        forward_seconds: Time in the forward passes, including copies.
        seconds: Time since the run began.
    """

    rows: int
    n_tokens: int
    committed_rows: int
    logical_bytes: int
    stored_bytes: int
    n_nonfinite: Mapping[str, int]
    offloaded_bytes: int
    sent_bytes: int
    stall_seconds: float
    forward_seconds: float
    seconds: float


def total(all_stats: Sequence[RecordStats]) -> RecordStats:
    """Return the figures of several workers as those of one; `seconds` is the longest run."""
    n_nonfinite: Counter[str] = Counter()
    for stats in all_stats:
        n_nonfinite.update(stats.n_nonfinite)
    added = {field.name for field in fields(RecordStats)} - {"n_nonfinite", "seconds"}
    return RecordStats(
        **{name: sum(getattr(stats, name) for stats in all_stats) for name in added},
        n_nonfinite=dict(n_nonfinite),
        seconds=max(stats.seconds for stats in all_stats),
    )

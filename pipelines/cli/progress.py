"""Progress bars, on standard error: one over the rows of a capture, one over any steps."""

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tqdm import tqdm

from residua.pipelines.cli.report import human_bytes
from residua.store.format.plan import Plan

if TYPE_CHECKING:
    from residua.capture.recording.stats import RecordStats


class _Progress:
    """A bar that is made when it is first needed, and closed at the end; `shown=False` draws nothing."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._bar: tqdm | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


class CaptureProgress(_Progress):
    """A bar over the rows of a plan: rows, rate, time left, bytes written, and time that the model waited.

    Args:
        shown: Whether to draw it.
    """

    def __init__(self, *, shown: bool) -> None:
        super().__init__(shown=shown)
        self._done = 0

    def example(self, n_examples: int, n_tokens: int) -> None:
        """Show the examples and tokens that are read so far, before the plan is made."""
        if self._shown:
            if self._bar is None:
                self._bar = tqdm(unit="token", unit_scale=True, file=sys.stderr, leave=False, mininterval=0.5)
            self._bar.set_description_str(f"reading examples ({n_examples:,})", refresh=False)
            self._bar.update(n_tokens - self._bar.n)

    def generated(self, n_done: int, n_all: int) -> None:
        """Show how many batches of prompts are continued, of how many."""
        if self._shown:
            if self._bar is None or self._bar.unit != "batch":
                if self._bar is not None:
                    self._bar.close()
                self._bar = tqdm(total=n_all, unit="batch", file=sys.stderr, leave=False)
                self._bar.set_description_str("generating", refresh=False)
            self._bar.update(n_done - self._bar.n)

    def plan(self, plan: Plan, committed_rows: int) -> None:
        """Begin the bar over the plan's rows, of which `committed_rows` are on the disk."""
        self._done = 0
        if self._bar is not None:
            self._bar.close()
        if self._shown:
            self._bar = tqdm(
                total=plan.n_rows, initial=committed_rows, unit="row", unit_scale=True, file=sys.stderr, leave=False
            )

    def batch(self, stats: "RecordStats") -> None:
        """Move the bar to the figures after a batch."""
        if self._bar is not None:
            new = stats.rows - self._done
            self._bar.update(new if self._bar.total is None else min(new, self._bar.total - self._bar.n))
            self._done = stats.rows
            written = human_bytes(stats.logical_bytes)
            self._bar.set_postfix_str(f"{written} written, {stats.stall_seconds:.1f} s waiting for the writer")


class StepProgress(_Progress):
    """A bar over a known number of steps, such as shards: rate and time left are those of this process.

    Args:
        unit: What a step is; ``B`` for bytes.
        shown: Whether to draw it.
    """

    def __init__(self, unit: str, *, shown: bool) -> None:
        super().__init__(shown=shown)
        self._unit = unit

    def step(self, done: int, total: int) -> None:
        """Move the bar to `done` of `total` steps."""
        if self._shown:
            if self._bar is None:
                scale = {"unit_scale": True, "unit_divisor": 1024} if self._unit == "B" else {}
                self._bar = tqdm(total=total, initial=done, unit=self._unit, file=sys.stderr, leave=False, **scale)
            self._bar.update(done - self._bar.n)

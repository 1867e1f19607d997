"""Copies from a device to host memory that the model does not wait for.

For every tensor of rows, the order is the promise:

1. The rows are gathered on the compute stream into memory of their own: the model may change its tensor afterwards.
2. An event is recorded behind the gathering, and the side stream waits for it.
3. The side stream copies the rows into a stage, which is pinned, and a second event is recorded behind the copy.
4. **Nobody reads a stage before its second events have happened**: `Landing.wait`, which the writer calls first.
5. The gathered rows are kept until the second event has happened. Let go earlier, their memory would go to the
   model's next operation while the copy still reads it.

Device memory of rows under way is bounded, and so is the number of stages; who needs more waits, and the time is
counted. Streams and events are handed in, so that the order can be tested without a device.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

StageT = TypeVar("StageT")
RowsT = TypeVar("RowsT")


class Event(Protocol):
    """A mark in a stream, which happens once everything queued before it is done."""

    def query(self) -> bool:
        """Say whether it has happened."""
        ...

    def synchronize(self) -> None:
        """Return when it has happened."""


class Streams(Protocol):
    """The compute stream of a device, and a side stream for copies."""

    def mark_compute(self) -> Event:
        """Record an event behind what the model has queued so far."""
        ...

    def hold_side(self, event: Any, /) -> None:
        """Let the side stream wait for `event`; the caller does not."""

    def side(self) -> AbstractContextManager[object]:
        """Return a context in which copies are queued on the side stream."""
        ...

    def mark_side(self) -> Event:
        """Record an event behind the copies queued so far."""
        ...


class Landing:
    """The copies under way into one stage."""

    def __init__(self) -> None:
        self._last: dict[Streams, Event] = {}

    def expect(self, streams: Streams, done: Event) -> None:
        """Note a copy; those of one side stream end in order, so its last event stands for all."""
        self._last[streams] = done

    def wait(self) -> None:
        """Return when every copy into the stage is done; any number of threads may wait."""
        for event in tuple(self._last.values()):
            event.synchronize()


@dataclass(frozen=True)
class _Copy:
    """A copy under way; `rows` is there to be kept, not to be read."""

    done: Event
    rows: object
    n_bytes: int


class Offload:
    """Queues copies and keeps their rows until they are done. For one thread, that of the model.

    Args:
        budget_bytes: Device memory that rows under way may take, per device; a single larger tensor goes alone.

    Attributes:
        wait_seconds: Time that the caller waited because the budget was used up.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._under_way: dict[Streams, deque[_Copy]] = {}
        self.wait_seconds = 0.0

    def send(
        self,
        streams: Streams,
        gather: Callable[[], RowsT],
        copy: Callable[[RowsT], None],
        *,
        n_bytes: int,
        landing: Landing,
    ) -> None:
        """Queue one copy; returns as soon as it is queued and within the budget.

        Args:
            streams: Those of the device that holds the rows.
            gather: Queues the gathering on the compute stream; returns rows that nobody else uses.
            copy: Queues the copy of these rows into a stage.
            n_bytes: Device memory of the rows.
            landing: That of the stage.
        """
        self._make_room(streams, n_bytes)
        rows = gather()
        streams.hold_side(streams.mark_compute())
        with streams.side():
            copy(rows)
            done = streams.mark_side()
        landing.expect(streams, done)
        self._under_way[streams].append(_Copy(done, rows, n_bytes))

    def _make_room(self, streams: Streams, n_bytes: int) -> None:
        """Let go of rows whose copies are done; wait for the oldest while the budget is used up."""
        copies = self._under_way.setdefault(streams, deque())
        while copies and copies[0].done.query():
            copies.popleft()
        while copies and n_bytes + sum(copy.n_bytes for copy in copies) > self._budget_bytes:
            started = time.perf_counter()
            copies[0].done.synchronize()
            self.wait_seconds += time.perf_counter() - started
            copies.popleft()


class StagePool(Generic[StageT]):
    """Stages that are free. Writers release them; the model's thread acquires them, and waits while none is free.

    Args:
        stages: The stages, all free.
        condition: What waits; another one only in tests.

    Attributes:
        wait_seconds: Time that the model waited for a stage.
    """

    def __init__(self, stages: Iterable[StageT], condition: threading.Condition | None = None) -> None:
        self._free = list(stages)
        self._condition = condition or threading.Condition()
        self.wait_seconds = 0.0

    def acquire(self) -> StageT:
        """Return a free stage; waits for one."""
        with self._condition:
            if not self._free:
                started = time.perf_counter()
                self._condition.wait_for(lambda: self._free)
                self.wait_seconds += time.perf_counter() - started
            return self._free.pop()

    def release(self, stage: StageT) -> None:
        """Take back a stage that nobody reads any more, or add one."""
        with self._condition:
            self._free.append(stage)
            self._condition.notify()

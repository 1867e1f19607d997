"""Copies from a device to host buffers; the model does not wait for them.

For every tensor of rows, this order is guaranteed:

1. The compute stream gathers the rows into memory of their own. Afterwards the model may change its tensor.
2. An event is recorded after the gathering, and the side stream waits for it.
3. The side stream copies the rows to a pinned host buffer, and a second event is recorded after the copy.
4. **Nobody reads a host buffer before its second events have happened**: the writer calls `PendingCopies.wait` first.
5. The gathered rows are kept until the second event has happened. If they were freed earlier, the allocator would give
   their memory to the model's next operation while the copy still reads it.

The device memory of pending rows is bounded, and so is the number of host buffers. A caller that needs more waits, and
the time is counted. Streams and events are arguments, so that the order can be tested without a device.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

BufferT = TypeVar("BufferT")
RowsT = TypeVar("RowsT")


class Event(Protocol):
    """An event in a stream: it happens when everything queued before it is done."""

    def query(self) -> bool:
        """Return whether it has happened."""
        ...

    def synchronize(self) -> None:
        """Wait until it has happened."""


class Streams(Protocol):
    """The compute stream of a device, and a side stream for copies."""

    def mark_compute(self) -> Event:
        """Record an event after what the model has queued so far."""
        ...

    def hold_side(self, event: Any, /) -> None:
        """Let the side stream wait for `event`; the caller does not."""

    def side(self) -> AbstractContextManager[object]:
        """Return a context in which copies are queued on the side stream."""
        ...

    def mark_side(self) -> Event:
        """Record an event after the copies that are queued so far."""
        ...


class PendingCopies:
    """The copies to one host buffer that are under way."""

    def __init__(self) -> None:
        self._last: dict[Streams, Event] = {}

    def expect(self, streams: Streams, done: Event) -> None:
        """Note a copy. Copies on one side stream end in order, so its last event is enough."""
        self._last[streams] = done

    def wait(self) -> None:
        """Wait until every copy to the host buffer is done; several threads may wait."""
        for event in tuple(self._last.values()):
            event.synchronize()


@dataclass(frozen=True)
class _Copy:
    """A copy under way; `rows` keeps the gathered rows alive."""

    done: Event
    rows: object
    n_bytes: int


class Offload:
    """Queues copies and keeps their rows until the copies are done; only the model's thread may use it.

    Args:
        budget_bytes: Device memory that pending rows may take, per device. A larger tensor is copied alone.

    Attributes:
        wait_seconds: Time that the caller waited because the budget was used up, in seconds.
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
        pending: PendingCopies,
    ) -> None:
        """Queue one copy; return as soon as it is queued and within the budget.

        Args:
            streams: The streams of the device that holds the rows.
            gather: Queues the gathering on the compute stream, and returns rows that nobody else uses.
            copy: Queues the copy of these rows to a host buffer.
            n_bytes: Device memory of the rows.
            pending: The pending copies of the host buffer.
        """
        self._make_room(streams, n_bytes)
        rows = gather()
        streams.hold_side(streams.mark_compute())
        with streams.side():
            copy(rows)
            done = streams.mark_side()
        pending.expect(streams, done)
        self._under_way[streams].append(_Copy(done, rows, n_bytes))

    def _make_room(self, streams: Streams, n_bytes: int) -> None:
        """Free rows whose copies are done; wait for the oldest copy while the budget is used up."""
        copies = self._under_way.setdefault(streams, deque())
        while copies and copies[0].done.query():
            copies.popleft()
        while copies and n_bytes + sum(copy.n_bytes for copy in copies) > self._budget_bytes:
            started = time.perf_counter()
            copies[0].done.synchronize()
            self.wait_seconds += time.perf_counter() - started
            copies.popleft()


class BufferPool(Generic[BufferT]):
    """The host buffers that are free. Writers release them; the model's thread acquires one, or waits for one.

    Args:
        buffers: The host buffers, all free.
        condition: The condition variable to wait on; tests pass another one.

    Attributes:
        wait_seconds: Time that the model waited for a host buffer, in seconds.
    """

    def __init__(self, buffers: Iterable[BufferT], condition: threading.Condition | None = None) -> None:
        self._free = list(buffers)
        self._condition = condition or threading.Condition()
        self.wait_seconds = 0.0

    def acquire(self) -> BufferT:
        """Return a free host buffer; wait while there is none."""
        with self._condition:
            if not self._free:
                started = time.perf_counter()
                self._condition.wait_for(lambda: self._free)
                self.wait_seconds += time.perf_counter() - started
            return self._free.pop()

    def release(self, buffer: BufferT) -> None:
        """Take back a host buffer that nobody reads any more, or add a new one."""
        with self._condition:
            self._free.append(buffer)
            self._condition.notify()

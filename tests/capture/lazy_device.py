"""A lazy device: streams that run when a random schedule says so, and memory that is reused at once.

It simulates on a CPU what `residua.capture.buffers.offload` needs of a device. Work is queued and done later, one
operation of a random stream at a time. Freed memory goes to the next tensor at once, as in a stream-ordered allocator:
this is right for the stream that frees it, and wrong for a copy on another stream that still reads it.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class LazyEvent:
    """An event in a stream."""

    def __init__(self, device: "LazyDevice") -> None:
        self._device = device
        self.happened = False

    def query(self) -> bool:
        self._device.some_steps()
        return self.happened

    def synchronize(self) -> None:
        self._device.run_until(lambda: self.happened)


class LazyDevice:
    """Two streams, an allocator, and other actors that run at the same time, such as a writer.

    Args:
        seed: Seed of the schedule.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self._most_steps = self.rng.choice([0, 1, 4])
        self._speeds = [self.rng.choice([1.0, 0.1]) for _ in range(4)]
        self._compute: deque[Callable[[], bool]] = deque()
        self._side: deque[Callable[[], bool]] = deque()
        self._current = self._compute
        self._free: list[list[object]] = []
        self.n_live = 0
        self.others: list[Callable[[], bool]] = []

    def queue(self, work: Callable[[], None]) -> None:
        """Queue `work` on the current stream."""

        def run() -> bool:
            work()
            return True

        self._push(self._current, run)

    def _push(self, stream: deque[Callable[[], bool]], work: Callable[[], bool]) -> None:
        stream.append(work)
        self.some_steps()

    def _step(self) -> bool:
        """Run one step of a stream or of another actor, chosen at random; return whether there was one."""
        parties = [self._first_of(self._side), self._first_of(self._compute), *self.others]
        chances = list(zip(self._speeds, parties, strict=False))
        chances.sort(key=lambda chance: -chance[0] * self.rng.random())
        return any(go_on() for _, go_on in chances)

    def _first_of(self, stream: deque[Callable[[], bool]]) -> Callable[[], bool]:
        return lambda: self._run_first(stream)

    @staticmethod
    def _run_first(stream: deque[Callable[[], bool]]) -> bool:
        if stream and stream[0]():
            stream.popleft()
            return True
        return False

    def run_beside(self, other: "LazyDevice") -> None:
        """Let `other` run steps, too, whenever this device does."""
        self.others.append(other._step)

    def some_steps(self) -> None:
        for _ in range(self.rng.randint(0, self._most_steps)):
            self._step()

    def run_until(self, reached: Callable[[], object]) -> None:
        while not reached():
            assert self._step(), "a deadlock: there is no next step"

    # The methods of the `Streams` protocol.

    def mark_compute(self) -> LazyEvent:
        return self._mark(self._compute)

    def mark_side(self) -> LazyEvent:
        return self._mark(self._side)

    def hold_side(self, event: LazyEvent) -> None:
        self._push(self._side, lambda: event.happened)

    @contextmanager
    def side(self) -> Iterator[None]:
        self._current = self._side
        yield
        self._current = self._compute

    def _mark(self, stream: deque[Callable[[], bool]]) -> LazyEvent:
        event = LazyEvent(self)

        def happen() -> bool:
            event.happened = True
            return True

        self._push(stream, happen)
        return event

    def take(self) -> list[object]:
        self.n_live += 1
        return self._free.pop() if self._free else [None]

    def give(self, memory: list[object]) -> None:
        self.n_live -= 1
        self._free.append(memory)


class LazyTensor:
    """One cell of device memory, freed when Python frees the tensor, as in torch."""

    def __init__(self, device: LazyDevice) -> None:
        self._device = device
        self.memory = device.take()

    def set(self, value: object) -> None:
        """Queue a write."""
        memory = self.memory
        self._device.queue(lambda: memory.__setitem__(0, value))

    def copy_to(self, target: list[object], place: int = 0) -> None:
        """Queue a copy to `target`, memory of a device or of the host. Queued work keeps no tensor alive."""
        memory = self.memory
        self._device.queue(lambda: target.__setitem__(place, memory[0]))

    def __del__(self) -> None:
        self._device.give(self.memory)


class LazyCondition:
    """A condition variable whose waiting runs steps of the device and of the other actors."""

    def __init__(self, device: LazyDevice) -> None:
        self._device = device

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def wait_for(self, reached: Callable[[], object]) -> None:
        self._device.run_until(reached)

    def notify(self) -> None:
        pass

"""The order of copies, events and reuse, under random schedules of a lazy device; mutants of the order fail."""

import importlib.util
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from residua.capture.buffers import offload
from tests.capture.lazy_device import LazyCondition, LazyDevice, LazyTensor

N_SCHEDULES = 300
ROWS_PER_BUFFER = 3
BUDGET = 2
Written = list[tuple[int, list[object]]]


class HostBuffer:
    def __init__(self, machine: Any) -> None:
        self.cells: list[object] = [None] * ROWS_PER_BUFFER
        self.pending = machine.PendingCopies()


class LazyWriter:
    """Takes full buffers and reads one cell a step, as a writer thread would."""

    def __init__(self, pool: Any, *, releases_early: bool) -> None:
        self._pool = pool
        self._releases_early = releases_early
        self._waiting: list[tuple[int, HostBuffer]] = []
        self._read: list[object] = []
        self.written: Written = []

    def submit(self, number: int, buffer: HostBuffer) -> None:
        self._waiting.append((number, buffer))

    def step(self) -> bool:
        if not self._waiting:
            return False
        number, buffer = self._waiting[0]
        if not self._read:
            buffer.pending.wait()
            if self._releases_early:
                self._pool.release(buffer)
        self._read.append(buffer.cells[len(self._read)])
        if len(self._read) == ROWS_PER_BUFFER:
            self.written.append((number, self._read))
            self._read = []
            del self._waiting[0]
            if not self._releases_early:
                self._pool.release(buffer)
        return True


def capture(
    machine: Any, seed: int, *, n_buffers: int = 2, n_devices: int = 1, releases_early: bool = False
) -> tuple[bool, int]:
    """Run a model of twelve full buffers; return whether all rows are right, and the largest number of live tensors.

    With several devices, as `device_map` spreads a model, they take turns at the rows of every buffer.
    """
    devices = [LazyDevice(seed + 1000 * number) for number in range(n_devices)]
    device = devices[0]
    condition: Any = LazyCondition(device)
    pool = machine.BufferPool((HostBuffer(machine) for _ in range(n_buffers)), condition)
    writer = LazyWriter(pool, releases_early=releases_early)
    busy = False

    def writing() -> bool:
        nonlocal busy
        if busy:  # it waits for an event already
            return False
        busy = True
        went_on = writer.step()
        busy = False
        return went_on

    device.others.append(writing)
    for other in devices[1:]:
        device.run_beside(other)
    copies = machine.Offload(BUDGET)
    most_alive = 0
    hidden = [LazyTensor(of) for of in devices]
    for number in range(12):
        buffer = pool.acquire()
        for row in range(ROWS_PER_BUFFER):
            of, tensor = devices[row % n_devices], hidden[row % n_devices]
            tensor.set((number, row))
            copies.send(
                of,
                partial(gathered, of, tensor),
                lambda rows, buffer=buffer, row=row: rows.copy_to(buffer.cells, row),
                n_bytes=1,
                pending=buffer.pending,
            )
            most_alive = max(most_alive, *(of.n_live for of in devices))
            tensor.set("changed in place")
            LazyTensor(of).set("the next operation's scratch memory")
        writer.submit(number, buffer)
    device.run_until(lambda: len(writer.written) == 12)
    return writer.written == [(n, [(n, row) for row in range(ROWS_PER_BUFFER)]) for n in range(12)], most_alive


def gathered(device: LazyDevice, hidden: LazyTensor) -> LazyTensor:
    rows = LazyTensor(device)
    hidden.copy_to(rows.memory)
    return rows


def row_of(device: LazyDevice, value: object) -> LazyTensor:
    rows = LazyTensor(device)
    rows.set(value)
    return rows


@pytest.mark.parametrize("n_devices", [1, 2])
def test_every_row_is_right_under_any_schedule_and_memory_is_bounded(n_devices: int) -> None:
    outcomes = [capture(offload, seed, n_devices=n_devices) for seed in range(N_SCHEDULES)]
    assert all(right for right, _ in outcomes)
    assert max(alive for _, alive in outcomes) <= 1 + BUDGET, "the model's tensor, and the rows under way"


MUTANTS = {
    "the side stream does not wait for the rows": (
        "streams.hold_side(streams.mark_compute())",
        "streams.mark_compute()",
    ),
    "the rows are freed while their copy is queued": ("_Copy(done, rows, n_bytes)", "_Copy(done, None, n_bytes)"),
    "the rows are freed before their copy is done": ("while copies and copies[0].done.query()", "while copies"),
    "rows go to make room without a wait": ("            copies[0].done.synchronize()\n", ""),
    "the event is recorded before the copy": (
        "            copy(rows)\n            done = streams.mark_side()\n",
        "            done = streams.mark_side()\n            copy(rows)\n",
    ),
    "the buffer is read before the event": ("            event.synchronize()\n", "            event.query()\n"),
    "only the first copy is waited for": (
        "self._last[streams] = done",
        "self._last.setdefault(streams, done)",
    ),
    "the rows are gathered after the side stream's mark": (
        "        rows = gather()\n        streams.hold_side(streams.mark_compute())\n",
        "        streams.hold_side(streams.mark_compute())\n        rows = gather()\n",
    ),
    "the rows are copied on the model's stream": (
        "            copy(rows)\n            done = streams.mark_side()\n",
        "            done = streams.mark_side()\n        copy(rows)\n",
    ),
    "the newest rows are freed and not the oldest": (
        "            copies.popleft()\n        while copies and n_bytes",
        "            copies.pop()\n        while copies and n_bytes",
    ),
    "a buffer is given back twice": (
        "            self._free.append(buffer)\n",
        "            self._free += [buffer, buffer]\n",
    ),
    "a buffer is given out while it is in use": ("return self._free.pop()", "return self._free[-1]"),
}


def mutated(folder: Path, right: str, wrong: str) -> ModuleType:
    """Return the module `offload` with `right` replaced by `wrong` in its text."""
    text = Path(offload.__file__).read_text()
    assert text.count(right) == 1, f"{right!r} should occur once in the file"
    path = folder / "mutant.py"
    path.write_text(text.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(f"mutant_{abs(hash(wrong))}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def goes_wrong(machine: Any, **options: Any) -> bool:
    """Return whether rows are wrong under some schedule, or a schedule deadlocks."""
    for seed in range(N_SCHEDULES):
        try:
            if not capture(machine, seed, **options)[0]:
                return True
        except (AssertionError, IndexError):
            return True
    return False


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_order_fails(mutant: str, tmp_path: Path) -> None:
    assert goes_wrong(mutated(tmp_path, *MUTANTS[mutant]))


MUTANTS_OF_SEVERAL_DEVICES = {
    "only one device's copies are waited for": (
        "event.synchronize()\n\n",
        "event.synchronize()\n            break\n\n",
    ),
    "the last copy of any device stands for all": ("self._last[streams] = done", "self._last = {streams: done}"),
}


@pytest.mark.parametrize("mutant", MUTANTS_OF_SEVERAL_DEVICES)
def test_a_broken_order_of_several_devices_fails(mutant: str, tmp_path: Path) -> None:
    machine = mutated(tmp_path, *MUTANTS_OF_SEVERAL_DEVICES[mutant])
    assert not goes_wrong(machine), "one device alone would do"
    assert goes_wrong(machine, n_devices=2)


def test_a_buffer_that_is_released_before_it_was_read_fails() -> None:
    assert goes_wrong(offload, releases_early=True)


def test_without_the_budget_memory_grows(tmp_path: Path) -> None:
    machine = mutated(tmp_path, "> self._budget_bytes", "> 1000")
    assert max(capture(machine, seed, n_buffers=6)[1] for seed in range(N_SCHEDULES)) > 1 + BUDGET


def test_rows_larger_than_the_budget_go_alone() -> None:
    device = LazyDevice(0)
    copies = offload.Offload(BUDGET)
    cells: list[object] = [None] * 8
    pending = offload.PendingCopies()

    def copy(row: int, rows: LazyTensor) -> None:
        rows.copy_to(cells, row)

    for row in range(8):
        copies.send(device, partial(row_of, device, row), partial(copy, row), n_bytes=2 * BUDGET, pending=pending)
        assert device.n_live == 1
    pending.wait()
    assert cells == list(range(8))


def test_every_writer_thread_waits_for_all_copies() -> None:
    entered, go_on = threading.Semaphore(0), threading.Event()

    class BlockedEvent:
        def query(self) -> bool:
            return False

        def synchronize(self) -> None:
            entered.release()
            assert go_on.wait(timeout=60)

    pending = offload.PendingCopies()
    pending.expect(LazyDevice(0), BlockedEvent())
    with ThreadPoolExecutor(2) as pool:
        waits = [pool.submit(pending.wait) for _ in range(2)]
        assert entered.acquire(timeout=60)
        assert entered.acquire(timeout=60)
        assert not any(wait.done() for wait in waits)
        go_on.set()


def test_the_pool_waits_for_a_release_and_counts_the_time() -> None:
    pool = offload.BufferPool(["only"])
    assert pool.acquire() == "only"
    assert pool.wait_seconds == 0
    thread = threading.Timer(0.05, pool.release, ["only"])
    thread.start()
    assert pool.acquire() == "only"
    thread.join()
    assert pool.wait_seconds > 0

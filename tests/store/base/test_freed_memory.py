"""What a process has freed goes back to the system, and not at every call."""

import ctypes
import sys
from pathlib import Path

import numpy as np
import pytest

from residua.store.base import freed_memory
from residua.store.base.freed_memory import return_freed_memory


def allocated() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


@pytest.fixture
def fragments() -> list[np.ndarray]:
    """Blocks with freed memory between them: 32 MiB of which 512 KiB are in use."""
    blocks = [np.ones(2**16, np.uint8) for _ in range(512)]
    return blocks[::64]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_lies_between_blocks_in_use_goes_back(fragments: list[np.ndarray]) -> None:
    before = allocated()
    return_freed_memory(every_seconds=0)
    assert before - allocated() > 16 * 2**20
    assert all(block.all() for block in fragments)


def test_it_is_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(freed_memory, "_malloc_trim", lambda: calls.append)
    return_freed_memory(every_seconds=0)
    for _ in range(100):
        return_freed_memory()
    assert len(calls) == 1


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    freed_memory._malloc_trim.cache_clear()
    return_freed_memory(every_seconds=0)
    freed_memory._malloc_trim.cache_clear()

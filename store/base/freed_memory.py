"""Memory that a process has freed, and that malloc keeps: returning it to the system.

glibc keeps what lies between blocks that are in use. Before version 2.38 it also reuses little of what was allocated
with an alignment, as all tensors of torch are. So a process that makes and drops tensors of many sizes grows for hours,
although what it holds does not.
"""

import ctypes
import time
from collections.abc import Callable
from functools import cache

_last = 0.0


def return_freed_memory(*, every_seconds: float = 1.0) -> None:
    """Return freed memory to the system; not at every call, so it may be called often.

    Does nothing where the C library is not glibc.

    Args:
        every_seconds: Processor time between two returns. Each takes some 20 ms, with asking for memory again.
    """
    global _last  # malloc is the process's, too
    if time.process_time() - _last >= every_seconds:
        _malloc_trim()(0)
        _last = time.process_time()


@cache
def _malloc_trim() -> Callable[[int], object]:
    try:
        found: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library, or Windows
        return lambda _: None
    return found

"""Writing large files past the page cache, for half the processor time and without pushing other data out of it.

A shard is flushed to the disk at once, so a copy of it in the page cache only costs: allocating and filling those
pages takes more time than checking and copying the data. Here the parts go through one aligned buffer of the thread
and from there straight to the disk (`O_DIRECT`). Where a file system or a block of odd size does not allow that,
writing goes on through the page cache.
"""

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

LEAST_BYTES = 1024 * 1024  # below, a copy in the page cache costs less than the wait
_BLOCK = 4096
_BUFFER_BYTES = 4 * 1024 * 1024
_DIRECT: int = getattr(os, "O_DIRECT", 0)  # Linux only

_local = threading.local()


def set_direct(descriptor: int) -> bool:
    """Make writes to a file bypass the page cache; say whether its file system knows how."""
    if not _DIRECT:
        return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | _DIRECT)
    except OSError:
        return False
    return True


def write_direct(descriptor: int, parts: Iterable[memoryview]) -> int:
    """Write `parts`, one after the other, to a new file that `set_direct` was called for; return the bytes written.

    Raises:
        OSError: As `os.write` does.
    """
    buffer = _aligned_buffer()
    filled = total = 0
    for part in parts:
        rest = np.frombuffer(part, np.uint8)
        total += rest.size
        while rest.size:
            taken = min(rest.size, buffer.size - filled)
            buffer[filled : filled + taken] = rest[:taken]
            filled += taken
            rest = rest[taken:]
            if filled == buffer.size:
                _drain(descriptor, buffer.data)
                filled = 0
    whole = filled - filled % _BLOCK
    _drain(descriptor, buffer.data[:whole])
    if filled > whole:
        _clear_direct(descriptor)
        _drain(descriptor, buffer.data[whole:filled])
    return total


def _aligned_buffer() -> npt.NDArray[np.uint8]:
    if not hasattr(_local, "buffer"):
        _local.buffer = np.frombuffer(mmap.mmap(-1, _BUFFER_BYTES), np.uint8)
    buffer: npt.NDArray[np.uint8] = _local.buffer
    return buffer


def _drain(descriptor: int, data: memoryview) -> None:
    while data:
        try:
            written = os.write(descriptor, data)
        except OSError as error:
            if error.errno != errno.EINVAL or not _clear_direct(descriptor):
                raise
            continue
        data = data[written:]
        if written % _BLOCK:
            _clear_direct(descriptor)


def _clear_direct(descriptor: int) -> bool:
    """Let further writes go through the page cache; say whether they bypassed it until now."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
    return bool(flags & _DIRECT)

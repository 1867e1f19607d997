"""Writing large files past the page cache: half the processor time, and other data stays in the cache.

A shard is flushed to the disk at once, so a copy of it in the page cache is wasted: allocating and filling those pages
takes more time than checking and copying the data. Here the data go directly to the disk (`O_DIRECT`, Linux only). Data
that start at a block boundary, both in memory and in the file, are written from where they are; other data go through
one aligned buffer of the thread. Where the file system or an incomplete block does not allow that, writing continues
through the page cache.
"""

import errno
import fcntl
import os
import threading
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

LEAST_BYTES = 1024 * 1024  # below, a copy in the page cache costs less than the wait
BLOCK = 4096  # bytes of a block, in memory and in the file; no disk needs more
_BUFFER_BYTES = 4 * 1024 * 1024
_DIRECT: int = getattr(os, "O_DIRECT", 0)  # Linux only

_local = threading.local()


def set_direct(descriptor: int) -> bool:
    """Make writes to a file bypass the page cache; say whether the file system supports that."""
    if not _DIRECT:
        return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | _DIRECT)
    except OSError:
        return False
    return True


def write_direct(descriptor: int, parts: Iterable[memoryview]) -> int:
    """Write `parts`, one after the other, to a new file after `set_direct`; return the number of bytes.

    Raises:
        OSError: As `os.write` does.
    """
    buffer = _buffer()
    filled = total = 0
    for part in parts:
        rest = np.frombuffer(part, np.uint8)
        total += rest.size
        if not filled and rest.ctypes.data % BLOCK == 0:
            aligned = rest.size - rest.size % BLOCK
            _drain(descriptor, rest[:aligned].data)
            rest = rest[aligned:]
        while rest.size:
            taken = min(rest.size, buffer.size - filled)
            buffer[filled : filled + taken] = rest[:taken]
            filled += taken
            rest = rest[taken:]
            if filled == buffer.size:
                _drain(descriptor, buffer.data)
                filled = 0
    aligned = filled - filled % BLOCK
    _drain(descriptor, buffer.data[:aligned])
    if filled > aligned:
        _clear_direct(descriptor)
        _drain(descriptor, buffer.data[aligned:filled])
    return total


def aligned_bytes(n_bytes: int) -> npt.NDArray[np.uint8]:
    """Return uninitialised memory that starts at a block boundary, (n_bytes,)."""
    room = np.empty(n_bytes + BLOCK, np.uint8)
    return room[-room.ctypes.data % BLOCK :][:n_bytes]


def _buffer() -> npt.NDArray[np.uint8]:
    if not hasattr(_local, "buffer"):
        _local.buffer = aligned_bytes(_BUFFER_BYTES)
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
        if written % BLOCK:
            _clear_direct(descriptor)


def _clear_direct(descriptor: int) -> bool:
    """Let further writes go through the page cache; say whether they bypassed it before."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
    return bool(flags & _DIRECT)

"""Writing large files past the page cache, for half the processor time and without pushing other data out of it.

A shard is flushed to the disk at once, so a copy of it in the page cache only costs: allocating and filling those
pages takes more time than checking and copying the data. Here the parts go straight to the disk (`O_DIRECT`): from
where they lie if they begin at a block of memory and of the file, else through one aligned buffer of the thread. Where
a file system or a block of odd size does not allow that, writing goes on through the page cache.
"""

import errno
import fcntl
import os
import threading
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

LEAST_BYTES = 1024 * 1024  # below, a copy in the page cache costs less than the wait
BLOCK = 4096  # of memory and of the file; no disk asks for more
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
    buffer = _buffer()
    filled = total = 0
    for part in parts:
        rest = np.frombuffer(part, np.uint8)
        total += rest.size
        if not filled and _is_aligned(rest):
            whole = rest.size - rest.size % BLOCK
            _drain(descriptor, rest[:whole].data)
            rest = rest[whole:]
        while rest.size:
            taken = min(rest.size, buffer.size - filled)
            buffer[filled : filled + taken] = rest[:taken]
            filled += taken
            rest = rest[taken:]
            if filled == buffer.size:
                _drain(descriptor, buffer.data)
                filled = 0
    whole = filled - filled % BLOCK
    _drain(descriptor, buffer.data[:whole])
    if filled > whole:
        _clear_direct(descriptor)
        _drain(descriptor, buffer.data[whole:filled])
    return total


def aligned_bytes(n_bytes: int) -> npt.NDArray[np.uint8]:
    """Return memory of any content that begins at a block, (n_bytes,)."""
    room = np.empty(n_bytes + BLOCK, np.uint8)
    return room[-room.ctypes.data % BLOCK :][:n_bytes]


def _buffer() -> npt.NDArray[np.uint8]:
    if not hasattr(_local, "buffer"):
        _local.buffer = aligned_bytes(_BUFFER_BYTES)
    buffer: npt.NDArray[np.uint8] = _local.buffer
    return buffer


def _is_aligned(data: npt.NDArray[np.uint8]) -> bool:
    return data.ctypes.data % BLOCK == 0


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
    """Let further writes go through the page cache; say whether they bypassed it until now."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
    return bool(flags & _DIRECT)

"""Writing the bytes of a new file; large files bypass the page cache, for half the processor time.

A shard is flushed to the disk at once, so a copy of it in the page cache is wasted: allocating and filling those pages
takes more time than checking and copying the data, and pushes other data out. So large files go directly to the disk
(`O_DIRECT`, Linux only). Data that start at a block boundary, both in memory and in the file, are written from where
they are; other data go through one aligned buffer of the thread. Where the file system or an incomplete block does not
allow that, writing continues through the page cache.
"""

import errno
import fcntl
import os
import threading
from collections.abc import Iterable
from functools import partial

import numpy as np
import numpy.typing as npt

LEAST_BYTES = 1024 * 1024  # below, a copy in the page cache costs less than the wait
BLOCK = 4096  # bytes of a block, in memory and in the file; no disk needs more
_BUFFER_BYTES = 4 * 1024 * 1024
_LARGE_BYTES = 64 * 1024  # from here on, copying costs more than another call to the kernel
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


def write_all(descriptor: int, pieces: Iterable[memoryview], *, is_direct: bool) -> int:
    """Write `pieces`, one after the other, to a new file; return the number of bytes.

    Args:
        descriptor: The file, at its start.
        pieces: The bytes. Small pieces, and those that direct writing cannot take as they are, go through a buffer.
        is_direct: Whether `set_direct` made writes bypass the page cache.

    Raises:
        OSError: As `os.write` does.
    """
    drain = partial(_drain, descriptor, is_direct)
    buffer = _buffer()
    filled = total = 0
    for piece in pieces:
        rest = np.frombuffer(piece, np.uint8)
        total += rest.size
        if not is_direct and rest.size >= _LARGE_BYTES:
            drain(buffer.data[:filled])
            drain(rest.data)
            filled = 0
            continue
        if is_direct and not filled and rest.ctypes.data % BLOCK == 0:
            aligned = rest.size - rest.size % BLOCK
            drain(rest[:aligned].data)
            rest = rest[aligned:]
        while rest.size:
            taken = min(rest.size, buffer.size - filled)
            buffer[filled : filled + taken] = rest[:taken]
            filled += taken
            rest = rest[taken:]
            if filled == buffer.size:
                drain(buffer.data)
                filled = 0
    aligned = filled - filled % BLOCK if is_direct else filled
    drain(buffer.data[:aligned])
    if filled > aligned:
        _clear_direct(descriptor)
        drain(buffer.data[aligned:filled])
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


def _drain(descriptor: int, is_direct: bool, data: memoryview) -> None:
    """Write all of `data`; the kernel may take fewer bytes than offered, for example near a full disk."""
    while data:
        try:
            written = os.write(descriptor, data)
        except OSError as error:
            if not (is_direct and error.errno == errno.EINVAL and _clear_direct(descriptor)):
                raise
            continue
        data = data[written:]
        if is_direct and written % BLOCK:
            _clear_direct(descriptor)


def _clear_direct(descriptor: int) -> bool:
    """Let further writes go through the page cache; say whether they bypassed it before."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
    return bool(flags & _DIRECT)

"""crc32c (Castagnoli), as every chunk and index of an archive carries it: RFC 3720, appendix B.4."""

import ctypes
import struct
from collections.abc import Callable
from importlib import import_module
from typing import TypeAlias

import google_crc32c
import numpy as np
import numpy.typing as npt

Buffer: TypeAlias = "bytes | npt.NDArray[np.generic]"
CRC_BYTES = 4
_LARGE_BYTES = 64 * 1024  # from here on other threads gain more than the call costs


def _function_of_the_library() -> Callable[[int, bytes | int, int], int] | None:
    """Return the C function under `google_crc32c.extend`, which keeps every other thread waiting; None without it."""
    try:
        function = ctypes.CDLL(import_module("google_crc32c._crc32c").__file__).crc32c_extend
    except (ImportError, OSError, AttributeError):  # a system without the C code, or one that hides it
        return None
    function.argtypes = (ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t)
    function.restype = ctypes.c_uint32
    extend: Callable[[int, bytes | int, int], int] = function
    return extend


_extend = _function_of_the_library()


def crc32c(data: Buffer, start: int = 0) -> int:
    """Return the crc32c of `data`, continued from `start`, without copying; other threads go on meanwhile.

    The C code takes the address of `bytes` and of contiguous numpy arrays but refuses a memoryview, which
    `numpy.frombuffer` turns into an array.
    """
    address, n_bytes = (data, len(data)) if isinstance(data, bytes) else (data.ctypes.data, data.nbytes)
    if _extend is None or n_bytes < _LARGE_BYTES or not (isinstance(data, bytes) or data.flags.c_contiguous):
        return int(google_crc32c.extend(start, data))
    return _extend(start, address, n_bytes)


def crc_bytes(crc: int) -> bytes:
    """Return a crc32c as it is stored: four bytes, little endian."""
    return struct.pack("<I", crc)

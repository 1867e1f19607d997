"""crc32c (Castagnoli), as every chunk and index of an archive carries it: RFC 3720, appendix B.4."""

import struct
from typing import TypeAlias

import google_crc32c
import numpy as np
import numpy.typing as npt

Buffer: TypeAlias = "bytes | npt.NDArray[np.generic]"
CRC_BYTES = 4


def crc32c(data: Buffer, start: int = 0) -> int:
    """Return the crc32c of `data`, continued from `start`, without copying.

    The C code takes the address of `bytes` and of contiguous numpy arrays but refuses a memoryview, which
    `numpy.frombuffer` turns into an array.
    """
    return int(google_crc32c.extend(start, data))


def crc_bytes(crc: int) -> bytes:
    """Return a crc32c as it is stored: four bytes, little endian."""
    return struct.pack("<I", crc)

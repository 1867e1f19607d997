"""crc32c (Castagnoli), the checksum of every chunk and index of an archive: RFC 3720, appendix B.4."""

import struct
from typing import TypeAlias

import crc32c as _library
import numpy as np
import numpy.typing as npt

Buffer: TypeAlias = "bytes | npt.NDArray[np.generic]"
CRC_BYTES = 4


def crc32c(data: Buffer, start: int = 0) -> int:
    """Return the crc32c of `data`, continued from `start`, without copying.

    Other threads run meanwhile: the library releases Python's lock for 32 KiB or more.

    Raises:
        ValueError: `data` is an array that is not C-contiguous.
    """
    return _library.crc32c(data, start)  # type: ignore[arg-type]  # numpy arrays are buffers; mypy checks for 3.11


def crc_bytes(crc: int) -> bytes:
    """Return a crc32c as it is stored: four bytes, little endian."""
    return struct.pack("<I", crc)

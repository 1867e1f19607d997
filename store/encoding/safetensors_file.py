"""Safetensors files as buffers that are not copied: https://github.com/huggingface/safetensors#format.

The library's own writer sorts the tensors, and its `serialize` copies them twice. These buffers are written durably as
any others are, and can be sent to another process.
"""

import json
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from residua.store.storage.crc import Buffer

DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        **{f"F{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
        **{f"{kind}{bits}": np.dtype(f"<{kind.lower()}{bits // 8}") for kind in "IU" for bits in (8, 16, 32, 64)},
    }
)
"""The data types of arrays by their names in a file."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


def safetensors_file(arrays: Mapping[str, npt.NDArray[Any]]) -> list[Buffer]:
    """Return a safetensors file as buffers: a header, and the memory of each array in the order given.

    Args:
        arrays: C-contiguous. They are not copied: do not change them before the buffers are written.

    Raises:
        KeyError: An array has a data type that is not in `DTYPES`.
    """
    header: dict[str, object] = {}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return [struct.pack("<Q", len(text)), text, *(array.reshape(-1).view(np.uint8) for array in arrays.values())]

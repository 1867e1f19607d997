"""Parameters as a safetensors file, part by part: nothing is copied, so that a head of gigabytes is held once.

The format: https://github.com/huggingface/safetensors#format. The library's own writer joins all tensors in memory.
"""

import json
import struct
from collections.abc import Mapping

import torch
from torch import Tensor

from residua.store.storage.crc import Buffer

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_ALIGNMENT = 8


def parameter_file(tensors: Mapping[str, Tensor]) -> list[Buffer]:
    """Return the parts of a safetensors file, in order: a header, and the memory of each tensor.

    Args:
        tensors: On the CPU, contiguous. They are not copied, so they must not change before the parts are written.

    Raises:
        KeyError: A tensor has a data type that no parameter of a head has.
    """
    header: dict[str, object] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return [struct.pack("<Q", len(text)), text, *(t.reshape(-1).view(torch.uint8).numpy() for t in tensors.values())]

"""Safetensors files from arrays, against the library's own reader and writer."""

import json
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors import deserialize
from safetensors.numpy import load, save

from residua.store.encoding.safetensors_file import DTYPES, safetensors_file
from residua.store.storage.files import bytes_of


def test_the_library_reads_every_data_type() -> None:
    arrays = {name: np.arange(6).reshape(2, 3).astype(dtype) for name, dtype in DTYPES.items()}
    file = b"".join(map(bytes_of, safetensors_file(arrays)))
    entries = dict(deserialize(file))  # type: ignore[no-untyped-call]  # safetensors is bare
    assert entries.keys() == DTYPES.keys()
    for name, array in arrays.items():
        assert (entries[name]["dtype"], entries[name]["shape"]) == (name, [2, 3])
        assert bytes(entries[name]["data"]) == array.tobytes()


@pytest.mark.parametrize("shapes", [[(3,)], [(0, 4), (), (2, 1, 5)], [(7, 3)] * 4])
def test_what_it_says_is_what_the_library_writes(shapes: list[tuple[int, ...]]) -> None:
    arrays: dict[str, npt.NDArray[np.float32]] = {
        f"a{i}": np.full(shape, i, np.float32) for i, shape in enumerate(shapes)
    }
    ours, theirs = b"".join(map(bytes_of, safetensors_file(arrays))), save(arrays)
    assert _header(ours) == _header(theirs)
    assert all(np.array_equal(load(ours)[name], array) for name, array in arrays.items())


def test_the_memory_of_arrays_is_not_copied() -> None:
    arrays: dict[str, npt.NDArray[Any]] = {"b": np.ones((4, 4)), "a": np.zeros(3, np.int8)}
    _, _, *buffers = safetensors_file(arrays)
    for buffer, array in zip(buffers, arrays.values(), strict=True):
        assert isinstance(buffer, np.ndarray)
        assert np.shares_memory(buffer, array)


def _header(file: bytes) -> object:
    (n_bytes,) = struct.unpack("<Q", file[:8])
    return json.loads(file[8 : 8 + n_bytes])

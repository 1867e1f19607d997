from typing import Any

import ml_dtypes
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.dtype import data_type_registry
from zarr.storage import MemoryStore

from residua.store.base.errors import PlanError
from residua.store.encoding.dtypes import STORAGE_DTYPES, BFloat16, storage_dtype, to_float32


@pytest.mark.parametrize("name", STORAGE_DTYPES)
def test_storage_dtype_is_little_endian_and_as_wide_as_its_name(name: str) -> None:
    dtype = storage_dtype(name)
    assert dtype.itemsize * 8 == int(name.lstrip("abcdefghijklmnopqrstuvwxyz"))
    assert dtype.newbyteorder("<") == dtype


def test_unknown_data_type_is_named_with_those_that_are_known() -> None:
    with pytest.raises(PlanError, match=r"'float8_e4m3'.*bfloat16, float16, float32"):
        storage_dtype("float8_e4m3")


def test_every_bfloat16_becomes_the_float32_that_ml_dtypes_makes_of_it() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    expected = bits.view(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(to_float32(bits, "bfloat16"), expected, equal_nan=True)
    assert np.array_equal(to_float32(bits.view(ml_dtypes.bfloat16), "bfloat16"), expected, equal_nan=True)
    # A conversion through float would have quietened signalling NaNs.
    assert (to_float32(bits, "bfloat16").view(np.uint32) >> 16 == bits).all()


@pytest.mark.parametrize("name", ["float16", "float32", "float64", "int8", "int32"])
def test_other_data_types_become_float32_by_value(name: str) -> None:
    values = np.array([[0, 1, 2], [3, 100, 7]], storage_dtype(name))
    found = to_float32(values, name)
    assert found.dtype == np.float32
    assert found.tolist() == [[0, 1, 2], [3, 100, 7]]


def test_zarr_reads_and_writes_bfloat16_as_numbers_and_keeps_every_bit() -> None:
    store = MemoryStore()
    array = zarr.create_array(store, shape=(4, 3), chunks=(2, 3), dtype="bfloat16", fill_value=0)
    bits = np.array([[0x7FC1, 0xFF80, 0x0001], [0x3F80, 0x8000, 0x7F80]], np.uint16)
    array[:2] = bits.view(ml_dtypes.bfloat16)
    array[2] = np.array([0.5, 1 + 2**-9, -3], np.float32)
    again = zarr.open_array(store, mode="r")
    assert again.metadata.to_dict()["data_type"] == "bfloat16"
    assert again.dtype == ml_dtypes.bfloat16
    found = np.asarray(again[:])
    assert np.array_equal(found[:2].view(np.uint16), bits)
    assert found[2].tolist() == [0.5, 1, -3]  # rounded to the nearest, not taken for bits
    assert found[3].tolist() == [0, 0, 0]


def test_zarr_makes_a_bfloat16_array_of_bfloat16_values() -> None:
    values = np.array([0.008, 1.5], ml_dtypes.bfloat16)
    array: Any = zarr.create_array(MemoryStore(), data=values)
    assert array.metadata.to_dict()["data_type"] == "bfloat16"
    assert np.array_equal(array[:], values)


def test_a_uint16_array_stays_uint16() -> None:
    array = zarr.create_array(MemoryStore(), shape=(3,), chunks=(3,), dtype=np.dtype("<u2"))
    assert array.metadata.to_dict()["data_type"] == "uint16"


def test_registering_again_changes_nothing() -> None:
    before = dict(data_type_registry.contents)
    data_type_registry.register("bfloat16", BFloat16)
    assert dict(data_type_registry.contents) == before


@given(st.integers(0, 2**16 - 1))
def test_every_fill_value_survives_json(bits: int) -> None:
    kind = BFloat16()
    value = np.array(bits, np.uint16).view(ml_dtypes.bfloat16)
    formatted = kind.to_json_scalar(value[()], zarr_format=3)
    assert np.array(kind.from_json_scalar(formatted, zarr_format=3)).view(np.uint16) == bits


@pytest.mark.parametrize("value", [None, "zero", True, [0]])
def test_fill_value_that_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="not a bfloat16 fill value"):
        BFloat16().from_json_scalar(value, zarr_format=3)

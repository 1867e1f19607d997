"""Arrays that we write, opened in other Zarr v3 readers: every value equal, bit for bit."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import zarr

from residua.store.encoding.lossy import dequantise_int8, quantise_int8
from residua.store.encoding.spec import ArraySpec
from residua.store.format.array_metadata import create_array, resize_array
from tests.store.samples import COMBINATIONS, Array, make_rows, make_spec, same_bits, write_array

ZARR = tuple(int(word) for word in zarr.__version__.split(".")[:2])
N_ROWS = 2 * 256 + 70  # the last shard is short, and so is its last chunk


def as_stored(values: Any) -> Array:
    """Return bfloat16 as its bits, so that every pattern can be compared."""
    return np.asarray(values.view("<u2") if values.dtype == ml_dtypes.bfloat16 else values)


def with_zarr_python(root: Path, node: str) -> Array:
    array: Any = zarr.open_array(str(root / node), mode="r")
    return as_stored(array[...])


def with_zarrs(root: Path, node: str) -> Array:
    """Read with the zarrs pipeline; it hands bfloat16, which it cannot give as numpy values, to zarr-python."""
    is_known = zarr.open_array(str(root / node), mode="r").dtype != ml_dtypes.bfloat16
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": is_known}):
        return with_zarr_python(root, node)


def with_tensorstore(root: Path, node: str) -> Array:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(root / node)}}
    return as_stored(tensorstore.open(spec, open=True, read=True).result().read().result())


READERS = [with_zarr_python, with_zarrs, with_tensorstore]
Reader = Callable[[Path, str], Array]


def large_spec(preset: str, dtype: str, row_shape: tuple[int, ...]) -> ArraySpec:
    # Chunks large enough that the frames are shuffled and compressed, not copied.
    return make_spec(preset, dtype, row_shape, rows_per_shard=256, rows_per_chunk=64)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("preset", "dtype"), COMBINATIONS)
@pytest.mark.parametrize("row_shape", [(), (24,), (4, 5)])
def test_values_are_equal_bit_for_bit(
    tmp_path: Path, reader: Reader, preset: str, dtype: str, row_shape: tuple[int, ...]
) -> None:
    spec = large_spec(preset, dtype, row_shape)
    rows = make_rows(spec, N_ROWS)
    write_array(tmp_path, spec, rows)
    found = reader(tmp_path, spec.path)
    assert found.dtype == spec.storage_dtype
    assert same_bits(found, rows)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("preset", ["raw", "fast", "small"])
def test_every_bfloat16_bit_pattern_survives(tmp_path: Path, reader: Reader, preset: str) -> None:
    spec = large_spec(preset, "bfloat16", (128,))
    rows = np.arange(2**16, dtype="<u2").reshape(-1, 128)
    write_array(tmp_path, spec, rows)
    assert same_bits(reader(tmp_path, spec.path), rows)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("values", [np.zeros((64, 128)), np.full((64, 128), np.nan), np.full((64, 128), -np.inf)])
def test_constant_chunks_survive(tmp_path: Path, reader: Reader, values: Array) -> None:
    spec = large_spec("fast", "float32", (128,))
    rows = values.astype("<f4")
    write_array(tmp_path, spec, rows)
    assert same_bits(reader(tmp_path, spec.path), rows)


@pytest.mark.parametrize("reader", READERS)
def test_quantised_site_is_two_ordinary_arrays(tmp_path: Path, reader: Reader) -> None:
    values = np.random.default_rng(0).standard_normal((100, 3, 40)).astype(np.float32)
    (codes, scales), _, _ = quantise_int8(values, "float32")
    stored: dict[str, tuple[str, tuple[int, int], Array]] = {
        "sites/z/3": ("int8", (3, 40), codes),
        "scales/z/3": ("float32", (3, 2), scales),
    }
    for path, (dtype, row_shape, rows) in stored.items():
        spec = ArraySpec(
            path=path, row_shape=row_shape, dtype=dtype, preset="fast", rows_per_shard=64, rows_per_chunk=16
        )
        write_array(tmp_path, spec, rows)
    found = dequantise_int8(reader(tmp_path, "sites/z/3"), reader(tmp_path, "scales/z/3"), "float32")
    assert np.abs(found - values).max() < np.abs(values).max() / 250


@pytest.mark.parametrize("reader", READERS)
def test_rows_of_shards_that_are_not_there_yet_read_as_nan(tmp_path: Path, reader: Reader) -> None:
    spec = large_spec("fast", "bfloat16", (24,))
    rows = make_rows(spec, 256)
    write_array(tmp_path, spec, rows)
    resize_array(tmp_path, spec, 300)
    found = reader(tmp_path, spec.path)
    assert same_bits(found[:256], rows)
    assert np.isnan(found[256:].view(ml_dtypes.bfloat16)).all()


@pytest.mark.parametrize("reader", READERS)
def test_flipped_bit_is_noticed_by_every_reader(tmp_path: Path, reader: Reader) -> None:
    spec = large_spec("fast", "bfloat16", (24,))
    # A full shard: zarrs compares no checksum if it needs only some rows of one.
    (path,) = write_array(tmp_path, spec, make_rows(spec, 256))
    data = bytearray(path.read_bytes())
    data[100] ^= 4
    path.write_bytes(data)
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)checksum|digest"):
        reader(tmp_path, spec.path)


@pytest.mark.parametrize("reader", READERS)
def test_empty_array_opens(tmp_path: Path, reader: Reader) -> None:
    spec = large_spec("raw", "float16", (24,))
    create_array(tmp_path, spec, 0)
    assert reader(tmp_path, spec.path).shape == (0, 24)


@pytest.mark.skipif(ZARR < (3, 4), reason="zarr-python before 3.4 does not load the data types of other packages")
def test_zarr_python_opens_bfloat16_where_residua_is_installed_and_not_imported(tmp_path: Path) -> None:
    spec = large_spec("fast", "bfloat16", (4,))
    values = np.linspace(-3, 5, 280).reshape(70, 4).astype(ml_dtypes.bfloat16)
    write_array(tmp_path, spec, values.view("<u2"))
    code = "import sys, zarr; print(zarr.open_array(sys.argv[1], mode='r')[...].astype('f4').sum(dtype='f8'))"
    words = [sys.executable, "-c", code, str(tmp_path / spec.path)]
    shown = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    assert float(shown.stdout) == values.astype("f4").sum(dtype="f8")

"""Rows of an archive in the files of other programs: Parquet, safetensors, npy, and a folder for Hugging Face datasets.

Rows stream through memory in batches, and a file appears complete or not at all.
"""

import json
import os
import secrets
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from residua.analysis.rows.tables import record_batches
from residua.store.base.errors import PlanError
from residua.store.base.sizes import Size, n_bytes
from residua.store.encoding.dtypes import BFLOAT16
from residua.store.read.archive import Archive
from residua.store.read.stacks import open_source
from residua.store.selection.row_filter import RowFilter
from residua.store.storage.address import shown
from residua.store.storage.files import write_file
from residua.store.storage.place import is_taken, result_file, result_folder

ExportFormat: TypeAlias = Literal["parquet", "safetensors", "npy", "hf"]
EXPORT_FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)

VECTOR = "activation_vector"
"""Column of the rows if one site is exported to Parquet, as published sets of activations name it."""

_SAFETENSORS = {"float64": "F64", "float32": "F32", "float16": "F16", BFLOAT16: "BF16", "int64": "I64", "int32": "I32"}
_SAFETENSORS |= {"int8": "I8", "uint8": "U8"}
_ROW_COLUMNS = ("token", "position", "example")
_Numbers = npt.NDArray[np.int64]
_Progress = Callable[[int, int], None]


class _Sizes(NamedTuple):
    """Bytes of float32 values: of a batch that is read at a time, and of a file of a dataset."""

    batch: int
    part: int


def export(
    archive: Archive | str | PathLike[str],
    out: str | PathLike[str],
    *,
    to: ExportFormat,
    sites: str | Iterable[str] | None = None,
    rows: str | None = None,
    part_bytes: Size = "512MiB",
    batch_bytes: Size = "64MiB",
    storage_options: Mapping[str, Any] | None = None,
    on_row: _Progress = lambda *_: None,
) -> str | PathLike[str]:
    """Write rows of an archive into files of another format.

    ============= ====================================================================================================
    parquet       One file. A line a row: its number, example, position, token and text, the columns of its example,
                  and the site's values as a list of float32: in `activation_vector`, or in columns named after several
                  sites.
    hf            A folder with such files in parts and a README.md, for ``datasets.load_dataset(folder)``.
    safetensors   One file. Each site in its stored type, bfloat16 included; `row`, `token`, `position`, `example`.
    npy           A folder with a file for each of these; bfloat16 becomes float32.
    ============= ====================================================================================================

    Args:
        archive: The archive, or its folder or address.
        out: File or folder to write, or its address in a bucket; then files are made on the local disk, and go up when
            all is done.
        to: The format.
        sites: Sites; all by default.
        rows: A condition on rows, for example ``position > 0``; all rows by default.
        part_bytes: Float32 values of one file of a dataset (``hf``), before they are compressed: bytes, or a text such
            as ``1GB``.
        batch_bytes: Float32 values that are in memory at a time, likewise.
        storage_options: For addresses, as for `residua.open`; of `out` alone, if their services differ.
        on_row: Called as rows are written, with the number done and the total.

    Returns:
        `out`.

    Raises:
        PlanError: There is no such format, a size is none, or no row is left.
        FileExistsError: `out` exists.
        UnknownSiteError: `sites` matches no stored site.
        NotCapturedError: The archive is not finished.

    Example:
        >>> residua.export("acts.zarr", "rows.parquet", to="parquet", sites="resid_post.7")  # doctest: +SKIP
    """
    source = open_source(archive, out, storage_options)
    if sites is not None:
        source = source.of_sites(sites)
    if to not in EXPORT_FORMATS:
        raise PlanError(f"there is no format {to!r}: choose one of {', '.join(EXPORT_FORMATS)}")
    sizes = _Sizes(n_bytes(batch_bytes, "batch_bytes"), n_bytes(part_bytes, "part_bytes"))
    if is_taken(out, storage_options):
        raise FileExistsError(f"{shown(out)} exists: choose another place, or remove it")
    names = source.sites if sites is None else source.select(sites)
    source.require_captured(range(source.n_rows))
    numbers = np.arange(source.n_rows) if rows is None else RowFilter.parse(rows).rows(source)
    if not len(numbers):
        raise PlanError(f"no row meets {rows!r}: choose another condition")
    place = result_file if to in ("parquet", "safetensors") else result_folder
    with place(out, storage_options, n_bytes=len(numbers) * _row_bytes(source, names)) as target:
        _WRITERS[to](source, target, names, numbers, on_row, sizes)
    return out


def _row_bytes(archive: Archive, sites: Sequence[str]) -> int:
    return 4 * sum(int(np.prod(archive[name].shape[1:])) for name in sites) + 64


def _parquet(
    archive: Archive, out: Path, sites: Sequence[str], rows: _Numbers, on_row: _Progress, sizes: _Sizes
) -> None:
    temporary = out.with_name(f".{out.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    batch_rows = max(1, sizes.batch // _row_bytes(archive, sites))
    out.parent.mkdir(parents=True, exist_ok=True)
    done = 0
    try:
        writer: pq.ParquetWriter | None = None
        for batch in record_batches(archive, rows, sites, batch_rows=batch_rows):
            named = batch if len(sites) > 1 else _with_vector(batch, sites[0])
            writer = writer or pq.ParquetWriter(temporary, named.schema, compression="zstd")
            writer.write_batch(named)
            done += batch.num_rows
            on_row(done, len(rows))
        if writer is not None:
            writer.close()
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(out)
    finally:
        temporary.unlink(missing_ok=True)


def _with_vector(batch: pa.RecordBatch, site: str) -> pa.RecordBatch:
    return batch.rename_columns([VECTOR if name == site else name for name in batch.schema.names])


def _hf(archive: Archive, out: Path, sites: Sequence[str], rows: _Numbers, on_row: _Progress, sizes: _Sizes) -> None:
    height = max(1, sizes.part // _row_bytes(archive, sites))
    n_parts = -(-len(rows) // height)
    (out / "data").mkdir(parents=True, exist_ok=True)
    for part in range(n_parts):
        first = part * height
        name = f"train-{part:05d}-of-{n_parts:05d}.parquet"

        def on_part(done: int, _: int, first: int = first) -> None:
            on_row(first + done, len(rows))

        _parquet(archive, out / "data" / name, sites, rows[first : first + height], on_part, sizes)
    card = _CARD.format(sites=", ".join(sites), n_rows=len(rows), digest=archive.plan.digest)
    write_file(out / "README.md", [card.encode()])


_CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
---

Activations of {sites}: {n_rows:,} rows, as float32, exported from a Residua archive with the plan `{digest}`.
"""


def _safetensors(
    archive: Archive, out: Path, sites: Sequence[str], rows: _Numbers, on_row: _Progress, sizes: _Sizes
) -> None:
    columns = ["row", *_ROW_COLUMNS, *sites]
    header: dict[str, Any] = {"__metadata__": {"plan": archive.plan.digest}}
    at = 0
    for name in columns:
        shape, dtype = _shape(archive, name, len(rows)), _stored_dtype(archive, name)
        size = int(np.prod(shape)) * dtype.itemsize
        kind = _SAFETENSORS[BFLOAT16 if dtype.name == BFLOAT16 else dtype.name]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def buffers() -> Iterator[Any]:
        yield struct.pack("<Q", len(text)) + text
        for name in columns:
            yield from _values(archive, name, rows, _stored_dtype(archive, name), on_row, sizes)

    write_file(out, buffers())


def _npy(archive: Archive, out: Path, sites: Sequence[str], rows: _Numbers, on_row: _Progress, sizes: _Sizes) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in ["row", *_ROW_COLUMNS, *sites]:
        dtype = _stored_dtype(archive, name)
        dtype = np.dtype(np.float32) if dtype.name == BFLOAT16 else dtype
        head = BytesIO()
        shape = tuple(_shape(archive, name, len(rows)))
        described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(head, described)

        def buffers(name: str = name, head: BytesIO = head, dtype: np.dtype[Any] = dtype) -> Iterator[Any]:
            yield head.getvalue()
            yield from _values(archive, name, rows, dtype, on_row, sizes)

        write_file(out / f"{name.replace('/', '_')}.npy", buffers())


def _shape(archive: Archive, name: str, n_rows: int) -> list[int]:
    return [n_rows, *(archive[name].shape[1:] if name in archive.sites else ())]


def _stored_dtype(archive: Archive, name: str) -> np.dtype[Any]:
    if name in archive.sites:
        return archive[name].stored_dtype
    return np.dtype(np.int64) if name == "row" else getattr(archive.rows, name).dtype


def _values(
    archive: Archive, name: str, rows: _Numbers, dtype: np.dtype[Any], on_row: _Progress, sizes: _Sizes
) -> Iterator[npt.NDArray[Any]]:
    """Yield one column of the rows in batches, of a dtype, as bytes."""
    is_site = name in archive.sites
    array = archive[name] if is_site else None if name == "row" else getattr(archive.rows, name)
    height = max(1, sizes.batch // (_row_bytes(archive, [name]) if is_site else 8))
    for start in range(0, len(rows), height):
        numbers = rows[start : start + height]
        found = numbers if array is None else array.numpy(numbers, dtype=dtype)
        yield np.ascontiguousarray(found).view(np.uint8).reshape(-1)
        if is_site:
            on_row(start + len(numbers), len(rows))


_WRITERS: dict[ExportFormat, Callable[[Archive, Path, Sequence[str], _Numbers, _Progress, _Sizes], None]] = {
    "parquet": _parquet,
    "hf": _hf,
    "safetensors": _safetensors,
    "npy": _npy,
}

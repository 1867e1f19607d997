"""The `zarr.json` of one stored array: made through zarr-python, read back strictly.

`create_array` and `resize_array` write it durably. `open_array` trusts nothing: it accepts only the layout that Residua
writes (sharding along the row axis, one of our codecs, crc32c everywhere) and bounds every number before anything is
allocated. Our own entries are in `attributes.residua`: the codec's name, what the caller adds, and a SHA-256 of the
document, so that an altered byte is noticed here too.
"""

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import zarr
from zarr.abc.store import Store
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from residua.store.base.canonical import Json, digest_of
from residua.store.base.errors import DamagedArchiveError, PlanError, UnsafeArchiveError
from residua.store.base.untrusted import (
    MAX_CHUNK_BYTES,
    MAX_COLUMN_SHARDS,
    MAX_RANK,
    MAX_ROW_BYTES,
    MAX_ROWS,
    MAX_ROWS_PER_SHARD,
    check_inside,
    name_problem,
    parse_json,
    read_file,
    shape_problem,
    size_problem,
)
from residua.store.encoding.codecs import codecs_metadata
from residua.store.encoding.dtypes import storage_dtype
from residua.store.encoding.shard import INDEX_CODECS, INDEX_LOCATION
from residua.store.encoding.spec import ArraySpec
from residua.store.storage.files import write_file

METADATA = "zarr.json"
_MAX_METADATA_BYTES = 4 * 1024 * 1024
_OURS = "residua"
_DIGEST = "sha256"
_OPTIONAL = {"dimension_names", "storage_transformers"}


def create_array(root: Path, spec: ArraySpec, n_rows: int, *, attributes: Mapping[str, Json] | None = None) -> None:
    """Write the metadata of an array, and of the groups above it that do not exist yet.

    Metadata that exists already is replaced in one step; shards are not touched.

    Args:
        root: Folder of the archive.
        spec: The array.
        n_rows: Rows of the array.
        attributes: More entries for `attributes.residua`.

    Raises:
        PlanError: (a ValueError) The array is larger than an archive may have, or its codec does not fit.
        OSError: A file could not be written; the message names it.
    """
    _check_sizes(spec, n_rows)
    for path, text in _zarr_documents(spec, n_rows).items():
        if path == f"{spec.path}/{METADATA}":
            document = json.loads(text)
            ours = {**(attributes or {}), "preset": spec.preset}
            document["attributes"] = {_OURS: {**ours, _DIGEST: _digest(document, ours)}}
            write_file(root / path, [_json(document)])
        elif not (root / path).exists():
            write_file(root / path, [_json(json.loads(text))])


def resize_array(root: Path, spec: ArraySpec, n_rows: int) -> None:
    """Give an array `n_rows` rows, keeping its attributes; shards are not touched.

    Raises:
        DamagedArchiveError: The array's metadata is missing or altered.
        UnsafeArchiveError: It is not metadata that Residua writes, or not that of `spec`.
    """
    _, _, attributes = open_array(root, spec.path)
    check_arrays(root, [spec], None)
    create_array(root, spec, n_rows, attributes=attributes)


def open_array(root: Path, node: str) -> tuple[ArraySpec, int, dict[str, Json]]:
    """Return the content of the metadata of array `node`: the array, its rows, and the caller's attributes.

    Args:
        root: Folder of the archive.
        node: Path of the array inside it, for example ``sites/resid_post/7``.

    Raises:
        DamagedArchiveError: The metadata is missing, is not JSON, or was altered.
        UnsafeArchiveError: It does not describe an array that Residua writes, or leads out of the archive.
    """
    if problem := name_problem(node):
        raise UnsafeArchiveError(problem)
    path = root / node / METADATA
    document = _load(root, path)
    try:
        spec, n_rows, ours = _parse(document, node)
        _check_sizes(spec, n_rows)
        _check_layout(document, spec)
        is_sound = ours.pop(_DIGEST, None) == _digest(document, ours)
    except (ValueError, TypeError, LookupError) as error:
        raise UnsafeArchiveError(f"{path} is not an array that Residua writes: {error}") from error
    if not is_sound:
        raise DamagedArchiveError(f"{path} was altered (its SHA-256 differs): restore the file from a copy")
    del ours["preset"]
    return spec, n_rows, ours


def _zarr_documents(spec: ArraySpec, n_rows: int) -> dict[str, bytes]:
    """Return the metadata files that zarr-python makes for the array, by their path inside the archive."""
    files: dict[str, Buffer] = {}
    store: Store = MemoryStore(files)
    serializer, *compressors = codecs_metadata(spec.preset, spec.dtype)
    zarr.create_array(
        store,
        name=spec.path,
        shape=(n_rows, *spec.row_shape),
        dtype=spec.dtype,
        chunks=(spec.rows_per_chunk, *spec.file_specs[0].row_shape),
        shards=(spec.rows_per_shard, *spec.file_specs[0].row_shape),
        serializer=serializer,
        compressors=compressors,
        fill_value=0,
    )
    return {path: buffer.to_bytes() for path, buffer in files.items()}


def _json(document: object) -> bytes:
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False).encode()


def _digest(document: Mapping[str, Any], ours: Mapping[str, Json]) -> str:
    """Return the SHA-256 of the document with `ours` as its only attributes: those of other programs may change."""
    return digest_of({**document, "attributes": dict(ours)})


def _load(root: Path, path: Path) -> dict[str, Any]:
    text = read_file(root, path, _MAX_METADATA_BYTES)
    try:
        document = parse_json(text)
    except ValueError as error:
        raise DamagedArchiveError(f"{path} cannot be read as JSON ({error}): restore it from a copy") from error
    if not isinstance(document, dict):
        raise UnsafeArchiveError(f"{path} holds a JSON {type(document).__name__}, not the metadata of an array")
    return document


def _parse(document: dict[str, Any], node: str) -> tuple[ArraySpec, int, dict[str, Json]]:
    """Return what the document says about shapes, dtype and codec; `_check_layout` compares the rest."""
    ours = dict(document["attributes"][_OURS])
    n_rows, *row_shape = _shape("shape", document["shape"])
    shard = _shape("chunk_grid", document["chunk_grid"]["configuration"]["chunk_shape"])
    chunk = _shape("codecs", document["codecs"][0]["configuration"]["chunk_shape"])
    if shard[1:] != chunk[1:] or shard[2:] != row_shape[1:]:
        raise ValueError(f"rows have shape {row_shape}, but shards {shard} and chunks {chunk}")
    column_shards = row_shape[0] // shard[1] if row_shape and shard[1] else 1
    if column_shards > MAX_COLUMN_SHARDS or (row_shape and shard[1] * column_shards != row_shape[0]):
        raise ValueError(f"rows have shape {row_shape}, which shards {shard} do not cut into a few equal column shards")
    spec = ArraySpec(
        path=node,
        row_shape=tuple(row_shape),
        dtype=_text("data_type", document["data_type"]),
        preset=_text("preset", ours["preset"]),
        rows_per_shard=shard[0],
        rows_per_chunk=chunk[0],
        column_shards=column_shards,
    )
    return spec, n_rows, ours


def _check_layout(document: dict[str, Any], spec: ArraySpec) -> None:
    """Raise ValueError unless every field but shape, dtype and attributes is as Residua writes it."""
    shape = spec.file_specs[0].row_shape
    sharding = {
        "chunk_shape": [spec.rows_per_chunk, *shape],
        "codecs": codecs_metadata(spec.preset, spec.dtype),
        "index_codecs": list(INDEX_CODECS),
        "index_location": INDEX_LOCATION,
    }
    expected = {
        "zarr_format": 3,
        "node_type": "array",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [spec.rows_per_shard, *shape]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "fill_value": 0,
        "storage_transformers": [],
    }
    known = {*expected, *_OPTIONAL, "shape", "data_type", "attributes"}
    missing, foreign = known - _OPTIONAL - document.keys(), document.keys() - known
    if missing or foreign:
        raise ValueError(f"fields {sorted(missing)} are missing, {sorted(foreign)} are not known")
    for name, value in expected.items():
        found = document.get(name, value)
        if found != value or isinstance(found, bool):
            raise ValueError(f"{name} is {found!r}, expected {value!r}")


def _check_sizes(spec: ArraySpec, n_rows: int) -> None:
    """Raise PlanError unless every size is within the limits of the format."""
    storage_dtype(spec.dtype)
    problems = (
        size_problem(f"{spec.path}: rows", n_rows, MAX_ROWS),
        size_problem(f"{spec.path}: bytes of a row", spec.row_bytes, MAX_ROW_BYTES, 1),
        size_problem(f"{spec.path}: rows of a shard", spec.rows_per_shard, MAX_ROWS_PER_SHARD, 1),
        size_problem(f"{spec.path}: rows of a chunk", spec.rows_per_chunk, spec.rows_per_shard, 1),
        size_problem(f"{spec.path}: bytes of a chunk", spec.file_specs[0].chunk_bytes, MAX_CHUNK_BYTES, 1),
        size_problem(f"{spec.path}: dimensions", 1 + len(spec.row_shape), MAX_RANK, 1),
    )
    if problem := next(filter(None, problems), ""):
        raise PlanError(problem)
    if spec.rows_per_shard % spec.rows_per_chunk:
        raise PlanError(
            f"{spec.path}: a shard of {spec.rows_per_shard:,} rows cannot hold chunks of {spec.rows_per_chunk:,}"
        )


def _shape(name: str, value: Any) -> list[int]:
    problem = shape_problem(name, value, max_rank=MAX_RANK, most=MAX_ROWS)
    if problem or prod(value[1:]) > MAX_ROW_BYTES:
        raise ValueError(problem or f"{name} has the shape {value!r}: its rows are too large")
    return list(value)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}")
    return value


def check_arrays(root: Path, specs: Iterable[ArraySpec], n_rows: int | None) -> None:
    """Compare the metadata of every array with the plan, before anything is read by it.

    Args:
        root: Folder of the archive.
        specs: The arrays of the plan.
        n_rows: Rows that each must have; None if they are not known yet.

    Raises:
        DamagedArchiveError: The metadata of an array is missing or cannot be read.
        UnsafeArchiveError: It differs from the plan, or a link leads out of the archive.
    """
    for spec in specs:
        found, found_rows, _ = open_array(root, spec.path)
        check_inside(root, root / spec.path / "c")
        if found != spec:
            raise UnsafeArchiveError(
                f"{root / spec.path / METADATA} describes {found}, but the archive's plan says {spec}"
            )
        if n_rows is not None and found_rows != n_rows:
            raise UnsafeArchiveError(f"{root / spec.path / METADATA} has {found_rows:,} rows, the archive {n_rows:,}")

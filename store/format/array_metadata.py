"""The `zarr.json` of one stored array: made through zarr-python, read back strictly.

`create_array` and `resize_array` write it durably. `open_array` trusts nothing: it accepts only the layout that Residua
writes (sharding along the row axis, one of our codecs, crc32c everywhere) and bounds every number before anything is
allocated. Our own entries are in `attributes.residua`: the codec's name, what the caller adds, and a SHA-256 of the
document, so that an altered byte is noticed here too.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path, PurePosixPath
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
_CONSOLIDATED = "consolidated_metadata"
_MAX_NAME = 200  # characters of a dimension's name
Document = dict[str, Any]


def create_array(
    root: Path,
    spec: ArraySpec,
    n_rows: int,
    *,
    attributes: Mapping[str, Json] | None = None,
    dimensions: Sequence[str] | None = None,
) -> None:
    """Write the metadata of an array, and of the groups above it that do not exist yet.

    Metadata that exists already is replaced in one step. Shards, and attributes of other programs, are not touched.

    Args:
        root: Folder of the archive.
        spec: The array.
        n_rows: Rows of the array.
        attributes: More entries for `attributes.residua`.
        dimensions: Names of its axes.

    Raises:
        PlanError: (a ValueError) The array is larger than an archive may have, or its codec does not fit.
        OSError: A file could not be written; the message names it.
    """
    _check_sizes(spec, n_rows)
    for path, text in _zarr_documents(spec, n_rows, dimensions).items():
        if path == f"{spec.path}/{METADATA}":
            document = json.loads(text)
            ours = {**(attributes or {}), "preset": spec.preset}
            others = foreign_attributes(root / path)
            document["attributes"] = {**others, _OURS: {**ours, _DIGEST: _digest(document, ours)}}
            write_file(root / path, [_json(document)])
        elif not (root / path).exists():
            write_file(root / path, [_json(json.loads(text))])


def foreign_attributes(path: Path) -> Document:
    """Return the attributes that other programs gave the node with the metadata file `path`."""
    try:
        found: Any = parse_json(path.read_bytes())
        return {name: value for name, value in found["attributes"].items() if name != _OURS}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def resize_array(root: Path, spec: ArraySpec, n_rows: int, dimensions: Sequence[str] | None = None) -> None:
    """Give an array `n_rows` rows and names of its axes, keeping its attributes; shards are not touched.

    Raises:
        DamagedArchiveError: The array's metadata is missing or altered.
        UnsafeArchiveError: It is not metadata that Residua writes, or not that of `spec`.
    """
    _, _, attributes = open_array(root, spec.path)
    check_arrays(root, [spec], None)
    create_array(root, spec, n_rows, attributes=attributes, dimensions=dimensions)


def open_array(root: Path, node: str, document: object | None = None) -> tuple[ArraySpec, int, dict[str, Json]]:
    """Return the content of the metadata of array `node`: the array, its rows, and the caller's attributes.

    Args:
        root: Folder of the archive.
        node: Path of the array inside it, for example ``sites/resid_post/7``.
        document: A copy of the metadata, to be used instead of the file.

    Raises:
        DamagedArchiveError: The metadata is missing, is not JSON, or was altered.
        UnsafeArchiveError: It does not describe an array that Residua writes, or leads out of the archive.
    """
    if problem := name_problem(node):
        raise UnsafeArchiveError(problem)
    path = root / node / METADATA
    found = load_document(root, path) if document is None else _as_document(path, document)
    try:
        spec, n_rows, ours = _parse(found, node)
        _check_sizes(spec, n_rows)
        _check_layout(found, spec)
        is_sound = ours.pop(_DIGEST, None) == _digest(found, ours)
    except (ValueError, TypeError, LookupError) as error:
        raise UnsafeArchiveError(f"{path} is not an array that Residua writes: {error}") from error
    if not is_sound:
        raise DamagedArchiveError(f"{path} was altered (its SHA-256 differs): restore the file from a copy")
    del ours["preset"]
    return spec, n_rows, ours


def _zarr_documents(spec: ArraySpec, n_rows: int, dimensions: Sequence[str] | None) -> dict[str, bytes]:
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
        fill_value=_fill_value(spec.dtype),
        dimension_names=dimensions,
    )
    return {path: buffer.to_bytes() for path, buffer in files.items()}


def consolidated(documents: Mapping[str, Document]) -> Document:
    """Return the entry of a group that has copies of the metadata of all nodes below it, by path.

    They are sorted, since zarr-python loses nodes of one group that do not follow each other.
    """
    return {"kind": "inline", "must_understand": False, "metadata": dict(sorted(documents.items()))}


def consolidate(root: Path, paths: Iterable[str]) -> dict[str, Document]:
    """Give every group below the root copies of the metadata of its arrays; return those for the root itself.

    zarr-python and xarray then open a group, or the archive, without listing a folder.

    Args:
        root: Folder of the archive.
        paths: Paths of all its arrays.

    Raises:
        DamagedArchiveError: The metadata of a group or array is missing or is not JSON.
    """
    documents: dict[str, Document] = {}
    for path in paths:
        for node in (*map(str, reversed(PurePosixPath(path).parents[:-1])), path):
            if node not in documents:
                documents[node] = load_document(root, root / node / METADATA)
    groups = [node for node, document in documents.items() if document.get("node_type") == "group"]
    for group in groups:
        documents[group].pop(_CONSOLIDATED, None)
    for group in groups:
        below = {node[len(group) + 1 :]: copy for node, copy in documents.items() if node.startswith(f"{group}/")}
        write_file(root / group / METADATA, [_json({**documents[group], _CONSOLIDATED: consolidated(below)})])
    return documents


def _json(document: object) -> bytes:
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False).encode()


def _digest(document: Mapping[str, Any], ours: Mapping[str, Json]) -> str:
    """Return the SHA-256 of the document with `ours` as its only attributes: those of other programs may change."""
    return digest_of({**document, "attributes": dict(ours)})


def _fill_value(dtype: str) -> float | int:
    """Return what a plain Zarr reader sees in place of a shard that is not there: no value that a row could have."""
    return math.nan if "float" in dtype else -1 if dtype in ("int32", "int64") else 0


def load_document(root: Path, path: Path) -> Document:
    """Return the metadata of a node of the archive `root`.

    Raises:
        DamagedArchiveError: The file is missing or is not JSON.
        UnsafeArchiveError: It is not a JSON object, or leads out of the archive.
    """
    text = read_file(root, path, _MAX_METADATA_BYTES)
    try:
        document = parse_json(text)
    except ValueError as error:
        raise DamagedArchiveError(f"{path} cannot be read as JSON ({error}): restore it from a copy") from error
    return _as_document(path, document)


def _as_document(path: Path, document: object) -> Document:
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
        "storage_transformers": [],
    }
    known = {*expected, *_OPTIONAL, "shape", "data_type", "attributes", "fill_value"}
    missing, foreign = known - _OPTIONAL - document.keys(), document.keys() - known
    if missing or foreign:
        raise ValueError(f"fields {sorted(missing)} are missing, {sorted(foreign)} are not known")
    for name, value in expected.items():
        found = document.get(name, value)
        if found != value or isinstance(found, bool):
            raise ValueError(f"{name} is {found!r}, expected {value!r}")
    _check_fill_value(document["fill_value"], spec.dtype)
    _check_dimensions(document.get("dimension_names"), 1 + len(spec.row_shape))


def _check_fill_value(found: object, dtype: str) -> None:
    """Raise ValueError unless the fill value is that of format 1.0, which is 0, or of 1.1."""
    expected = _fill_value(dtype)
    new = "NaN" if math.isnan(expected) else expected
    if isinstance(found, bool) or found not in (new, 0):
        raise ValueError(f"fill_value is {found!r}, expected {new!r} or 0")


def _check_dimensions(names: object, rank: int) -> None:
    if names is None:
        return
    found = names if isinstance(names, list) and len(names) == rank else [0]
    if not all(name is None or (isinstance(name, str) and len(name) <= _MAX_NAME) for name in found):
        raise ValueError(f"dimension_names is {names!r}, expected {rank} names")


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


def check_arrays(
    root: Path, specs: Iterable[ArraySpec], n_rows: int | None, documents: Mapping[str, object] | None = None
) -> None:
    """Compare the metadata of every array with the plan, before anything is read by it.

    Args:
        root: Folder of the archive.
        specs: The arrays of the plan.
        n_rows: Rows that each must have; None if they are not known yet.
        documents: Copies of the metadata by path, to be used instead of the files.

    Raises:
        DamagedArchiveError: The metadata of an array is missing or cannot be read.
        UnsafeArchiveError: It differs from the plan, or a link leads out of the archive.
    """
    for spec in specs:
        found, found_rows, _ = open_array(root, spec.path, (documents or {}).get(spec.path))
        if documents is None:
            check_inside(root, root / spec.path / "c")
        if found != spec:
            raise UnsafeArchiveError(
                f"{root / spec.path / METADATA} describes {found}, but the archive's plan says {spec}"
            )
        if n_rows is not None and found_rows != n_rows:
            raise UnsafeArchiveError(f"{root / spec.path / METADATA} has {found_rows:,} rows, the archive {n_rows:,}")

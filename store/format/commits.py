"""Commits: the durable records that a shard is complete.

There is one JSON file for each shard and writer, `commits/SSSSSSSS-WWWW.json`. It is published with `link`, so that it
appears complete or not at all and cannot replace another. It is written after every file that it names is on the disk:
no record, no shard. The record holds the row range and, for each array, size and digest of the shard file. A SHA-256
over the record protects the record itself.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from residua.store.base.canonical import canonical_json, digested, with_digest
from residua.store.base.errors import DamagedArchiveError, ResiduaError
from residua.store.base.untrusted import MAX_ROWS, check_inside, parse_json, read_file, size_problem
from residua.store.encoding.shard import ChunkTable
from residua.store.format.archive_metadata import ROOT, is_archive, read_metadata
from residua.store.format.plan import Plan
from residua.store.storage.destination import Destination, destination_of

FOLDER = "commits"
_NAME = re.compile(r"[0-9]{8,}-[0-9]{4}\.json")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_EXAMPLES = re.compile(r"part-[0-9]{5,}\.parquet")
_MAX_COUNT = 2**63 - 1
MAX_RECORD_BYTES = 64 * 1024 * 1024
_CHUNK_BYTES = 8  # of a chunk in `ShardFile.chunks`
_OF_LOSSES = ("n_nonfinite", "n_overflowed", "n_spoiled")
_TAIL_BYTES = 64 * 1024  # chunks end in their crc32c; a checkpoint's zip file ends in its directory of crc32 values


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """What a commit says about the shard file of one array.

    Attributes:
        n_bytes: Size of the file.
        digest: SHA-256 over the shard index and the chunks' crc32c, in hex (see FORMAT.md).
        n_nonfinite: Number of NaN and infinite values in the rows, as they were handed to the codec.
        squares: Sum of squares of the values, lossy codecs only.
        error_squares: Sum of squares of what the lossy codec changed.
        n_overflowed: Number of finite values that the cast to the stored type made infinite; part of `n_nonfinite`.
        n_spoiled: Number of finite values that the lossy codec made NaN or infinite.
        chunks: Size and crc32c of every chunk, a `ChunkTable` as bytes; empty in records of format 1.0.
    """

    n_bytes: int
    digest: str
    n_nonfinite: int = 0
    squares: float | None = None
    error_squares: float | None = None
    n_overflowed: int = 0
    n_spoiled: int = 0
    chunks: bytes = b""

    def to_json(self) -> dict[str, object]:
        """Return the facts as JSON values; absent ones, and numbers of lost values that are 0, are left out."""
        values = {**asdict(self), "chunks": base64.b64encode(self.chunks).decode() or None}
        return {key: value for key, value in values.items() if value is not None and (value or key not in _OF_LOSSES)}

    @property
    def chunk_table(self) -> ChunkTable:
        """Size and crc32c of every chunk; empty if the record does not have them."""
        return np.frombuffer(self.chunks, "<u4").reshape(-1, 2)


@dataclass(frozen=True, kw_only=True)
class Commit:
    """The record of one complete shard.

    Attributes:
        plan: Digest of the plan that the rows belong to.
        shard: Index of the shard along axis 0.
        rows: First row and the row after the last.
        arrays: The shard file of each array or column shard, by its `key`.
        examples: SHA-256 of Parquet files of examples made durable with this shard (loops that the user owns), by
            file name.
        writer: Number of the writer among those that share a shard; always 0 today.
    """

    plan: str
    shard: int
    rows: tuple[int, int]
    arrays: Mapping[str, ShardFile]
    examples: Mapping[str, str] = field(default_factory=dict)
    writer: int = 0

    @property
    def name(self) -> str:
        """File name of the record."""
        return record_name(self.shard, self.writer)

    def to_json(self) -> dict[str, object]:
        """Return the record as JSON values; `writer` and `examples` are left out where there is nothing to say."""
        values = {
            "plan": self.plan,
            "shard": self.shard,
            "writer": self.writer,
            "rows": list(self.rows),
            "examples": dict(self.examples),
            "arrays": {path: file.to_json() for path, file in self.arrays.items()},
        }
        return {key: value for key, value in values.items() if value or key not in ("writer", "examples")}


def record_name(shard: int, writer: int = 0) -> str:
    """Return the file name of a record."""
    return f"{shard:08d}-{writer:04d}.json"


def shard_of(name: str) -> int | None:
    """Return the shard of a record, from its file name; None if it is not the name of a record."""
    return int(name.split("-")[0]) if _NAME.fullmatch(name) else None


def is_record(name: str) -> bool:
    """Say whether a path inside an archive is that of a record."""
    return name.startswith(f"{FOLDER}/") and shard_of(name.removeprefix(f"{FOLDER}/")) is not None


def publish_commit(archive: Path | Destination, commit: Commit) -> bool:
    """Make `commit` durable; return False if this record is there already.

    Every file that it names must be durable already.

    Raises:
        FileExistsError: The shard has another record.
    """
    return destination_of(archive).create(f"{FOLDER}/{commit.name}", _json(commit))


def _json(commit: Commit) -> bytes:
    return canonical_json(with_digest("record", commit.to_json())) + b"\n"


def committed_shards(archive: Path | Destination) -> set[int]:
    """Return which shards have a record, from the file names alone: cheap enough to call often."""
    found = map(shard_of, destination_of(archive).names(FOLDER))
    return {shard for shard in found if shard is not None}


def missing_shards(archive: Path | Destination, n_shards: int) -> list[int]:
    """Return which of the first `n_shards` shards have no record; a list of names that lags behind does not count."""
    out = destination_of(archive)
    missing = sorted(set(range(n_shards)) - committed_shards(out))
    return [shard for shard in missing if out.n_bytes(f"{FOLDER}/{record_name(shard)}") is None]


def read_commits(archive: Path, plan_digest: str) -> dict[int, Commit]:
    """Return the commits of `archive` by shard.

    Raises:
        DamagedArchiveError: A record is altered or belongs to another plan; the message names the file.
        UnsafeArchiveError: The folder of the records is a link that leads out of the archive.
    """
    folder = archive / FOLDER
    check_inside(archive, folder)
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    commits = [_read_commit(archive, path, plan_digest) for path in paths if _NAME.fullmatch(path.name)]
    return {commit.shard: commit for commit in commits}


def read_commit(archive: Path, plan: Plan, shard: int, n_rows: int) -> Commit:
    """Return the commit of one shard of an archive of `n_rows` rows.

    Raises:
        DamagedArchiveError: The record is missing or altered, or belongs to another plan; the message names the file.
    """
    commit = _read_commit(archive, archive / FOLDER / record_name(shard), plan.digest)
    check_commits(archive, plan, {shard: commit}, n_rows)
    return commit


def check_commits(archive: Path, plan: Plan, commits: Mapping[int, Commit], n_rows: int | None) -> None:
    """Compare the rows and arrays of every record with the plan.

    Args:
        archive: Folder of the archive, for messages.
        plan: Its plan.
        commits: Its commits, by shard.
        n_rows: Rows of the archive; None while they are not known: then the last record gives them.

    Raises:
        DamagedArchiveError: A record does not cover the rows and arrays of its shard; the message names it.
    """
    keys = plan.file_keys
    end = max((commit.rows[1] for commit in commits.values()), default=0) if n_rows is None else n_rows
    for shard, commit in commits.items():
        first = shard * plan.rows_per_shard
        stop = min(first + plan.rows_per_shard, end)
        if commit.rows != (first, stop) or commit.arrays.keys() != keys:
            expected = f"rows {first:,} to {stop:,} of every array" if first < stop else "a shard of this archive"
            raise DamagedArchiveError(
                f"{archive / FOLDER / commit.name}: this commit record does not cover {expected}. Delete it and run "
                "the same capture again."
            )


def committed_rows(archive: Path | Destination, plan: Plan) -> int:
    """Return how many rows of a capture are committed, from the names of the records alone.

    Where the number of rows is open, the last shard counts as full.
    """
    end, height = MAX_ROWS if plan.n_rows is None else plan.n_rows, plan.rows_per_shard
    return sum(max(0, min(height, end - shard * height)) for shard in committed_shards(archive))


def same_files(one: Commit, other: Commit) -> bool:
    """Say whether two commits name the same files of the same rows; one of format 1.0 knows less about them."""
    files = [{key: replace(file, chunks=b"") for key, file in commit.arrays.items()} for commit in (one, other)]
    return one.rows == other.rows and files[0] == files[1]


def named_example_files(commits: Mapping[int, Commit]) -> dict[str, str]:
    """Return the SHA-256 of each file of examples that `commits` name, by its path inside the archive."""
    return {f"examples/{name}": digest for commit in commits.values() for name, digest in commit.examples.items()}


def _read_commit(archive: Path, path: Path, plan_digest: str) -> Commit:
    try:
        commit = commit_from_json(digested(parse_json(read_file(archive, path, MAX_RECORD_BYTES)), "record"))
        if commit.name != path.name:
            raise ValueError(f"it is the record {commit.name}")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, ResiduaError) as error:
        raise DamagedArchiveError(
            f"{path}: this commit record is damaged ({error}). Delete it and run the same capture again, which will "
            "write the shard again."
        ) from error
    if commit.plan != plan_digest:
        raise DamagedArchiveError(
            f"{path}: this record belongs to plan {commit.plan[:12]}, the archive's plan is {plan_digest[:12]}: "
            "the file was copied here from another archive. Remove it."
        )
    return commit


def commit_from_json(record: dict[str, Any]) -> Commit:
    """Return the commit of a record. Every value is checked, since a forged record has a right SHA-256, too.

    Raises:
        ValueError: A value is not what `to_json` makes. KeyError, TypeError and AttributeError are possible too.
    """
    first, stop = record["rows"]
    if not _count(first) < _count(stop):
        raise ValueError(f"it holds the rows {first} to {stop}")
    for name, digest in record.get("examples", {}).items():
        if not _EXAMPLES.fullmatch(name) or not _DIGEST.fullmatch(digest):
            raise ValueError(f"it names the file of examples {name!r}")
    return Commit(
        plan=_digest(record["plan"]),
        shard=_count(record["shard"]),
        writer=_count(record.get("writer", 0)),
        rows=(first, stop),
        examples=record.get("examples", {}),
        arrays={path: _shard_file(file) for path, file in record["arrays"].items()},
    )


def _shard_file(value: dict[str, Any]) -> ShardFile:
    file = ShardFile(**{**value, "chunks": _chunks(value.get("chunks", ""))})
    _count(file.n_bytes)
    for count in (file.n_nonfinite, file.n_overflowed, file.n_spoiled):
        _count(count)
    _digest(file.digest)
    for squares in (file.squares, file.error_squares):
        if squares is not None and not (isinstance(squares, float) and squares >= 0):
            raise ValueError(f"{squares!r} is not a sum of squares")
    return file


def _chunks(text: str) -> bytes:
    try:
        chunks = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"its chunks are not base64 ({error})") from error
    if len(chunks) % _CHUNK_BYTES:
        raise ValueError(f"its chunks have {len(chunks):,} bytes, not {_CHUNK_BYTES} each")
    return chunks


def _count(value: Any) -> int:
    if problem := size_problem("count", value, _MAX_COUNT):
        raise ValueError(problem)
    return int(value)


def _digest(value: str) -> str:
    if not _DIGEST.fullmatch(value):
        raise ValueError(f"{value!r} is not a SHA-256 in hex")
    return value


def content_hash(folder: Path) -> str:
    """Return a digest, in hex, that changes when the content of `folder` does, without reading all of it.

    Of a sealed archive it is the digest of its metadata, which name the packed index and so everything else; of another
    archive it covers metadata and commits, which hold the digests of everything else. For any other folder it
    covers the names, the sizes and the last 64 KiB of all files: every file of an overlay or a lens ends in checksums
    of its content.

    Raises:
        OSError: A file cannot be read.
        DamagedArchiveError: The metadata of an archive were altered.
    """
    if is_archive(folder) and (found := read_metadata(folder)).index is not None:
        return str(found.to_json()["sha256"])
    if (folder / FOLDER).is_dir():
        files = [folder / ROOT, *(folder / FOLDER).iterdir()]
    else:
        files = [path for path in folder.rglob("*") if path.is_file()]
    digest = hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - _TAIL_BYTES))
            digest.update(f"{path.relative_to(folder)}\0{size}\0".encode())
            digest.update(file.read(_TAIL_BYTES))
    return digest.hexdigest()

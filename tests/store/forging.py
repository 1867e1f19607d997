"""Forged archives: changed by somebody who knows the format and computes every checksum."""

import hashlib
import json
import resource
import struct
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from residua.store.base.canonical import Json, canonical_json, digest_of
from residua.store.base.errors import ResiduaError
from residua.store.format.archive_metadata import ROOT, file_digest, read_metadata, write_metadata
from residua.store.format.commits import FOLDER
from residua.store.sealing.packed_index import HEADER, INDEX, TOTALS
from residua.store.storage.crc import crc32c, crc_bytes
from residua.store.verification.verify import verify

LITTLE_MEMORY = 48 * 2**20


def load(path: Path) -> Any:
    return json.loads(path.read_bytes())


def without_index(archive: Path) -> None:
    """Take the packed index away, so that the records alone say what is committed, as in format 1.0."""
    metadata = read_metadata(archive)
    if metadata.index is not None:
        write_metadata(archive, replace(metadata, index=None, documents={}))
        (archive / INDEX).unlink(missing_ok=True)


def sign_root(archive: Path, document: Any) -> None:
    """Write the root's `zarr.json` with right digests and no index, and make every commit belong to its plan."""
    entry = document["attributes"]["residua"]
    entry["index"] = None
    entry["digest"] = digest_of(entry["plan"])
    entry["sha256"] = digest_of({key: value for key, value in entry.items() if key != "sha256"})
    (archive / ROOT).write_text(json.dumps(document))
    for path in (archive / FOLDER).iterdir():
        path.write_bytes(signed_commit({**load(path)["record"], "plan": entry["digest"]}))


def sign_index(archive: Path, head: bytes, body: bytes, *, pages: bool = True) -> None:
    """Write a packed index with right digests: of its pages, unless the head is to stay as it is, and of its head."""
    if pages:
        page_bytes, n_files = HEADER.unpack_from(head)[1:3]
        cut = [body[at : at + page_bytes] for at in range(0, len(body), page_bytes)]
        digests = b"".join(hashlib.sha256(page).digest() for page in cut)
        head = head[: HEADER.size + TOTALS.itemsize * n_files] + digests
    (archive / INDEX).write_bytes(head + body)
    entry: dict[str, Json] = {
        "n_bytes": len(head + body),
        "head_bytes": len(head),
        "sha256": hashlib.sha256(head).hexdigest(),
    }
    write_metadata(archive, replace(read_metadata(archive), index=entry))


def sign_array(path: Path, document: Any) -> None:
    """Write an array's `zarr.json` with the right digest, if it has a place for one."""
    ours = document["attributes"]["residua"]
    if isinstance(ours, dict):
        bare = {key: value for key, value in ours.items() if key != "sha256"}
        ours["sha256"] = digest_of({**document, "attributes": bare})
    path.write_text(json.dumps(document))
    archive = next(folder for folder in path.parents if (folder / FOLDER).is_dir())
    root = load(archive / ROOT)
    root["consolidated_metadata"]["metadata"][path.parent.relative_to(archive).as_posix()] = document
    (archive / ROOT).write_text(json.dumps(root))


def sign_commit(path: Path, record: Any) -> None:
    """Write a record with its right SHA-256, into an archive whose index does not contradict it."""
    if (path.parents[1] / ROOT).exists():
        without_index(path.parents[1])
    path.write_bytes(signed_commit(record))


def signed_commit(record: Any) -> bytes:
    return canonical_json({"record": record, "sha256": digest_of(record)})


def sign_sidecar(archive: Path, name: str, content: bytes) -> None:
    """Replace a file of `examples`, `head` or `tokenizer`, and its digest in the root."""
    (archive / name).write_bytes(content)
    document = load(archive / ROOT)
    document["attributes"]["residua"]["files"][name] = file_digest(archive / name)
    sign_root(archive, document)


def sign_shard(path: Path, chunks: Sequence[bytes], entries: Sequence[tuple[int, int]], n_chunks: int) -> None:
    """Write a shard file of `chunks`, each with its crc32c, and an index that says `entries`, with its own."""
    empty = (2**64 - 1, 2**64 - 1)
    body = b"".join(struct.pack("<QQ", *entry) for entry in [*entries, *[empty] * (n_chunks - len(entries))])
    stored = b"".join(chunk + crc_bytes(crc32c(chunk)) for chunk in chunks)
    path.write_bytes(stored + body + crc_bytes(crc32c(body)))


def in_a_row(chunks: Sequence[bytes]) -> list[tuple[int, int]]:
    """Return the entries of a right index of `chunks`."""
    sizes = [len(chunk) + 4 for chunk in chunks]
    return [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container inside a JSON value with each of its keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from places(item)


@contextmanager
def little_memory() -> Iterator[None]:
    """Fail if more than `LITTLE_MEMORY` bytes are allocated inside, touched or not."""
    tracemalloc.start()
    try:
        yield
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < LITTLE_MEMORY, f"{most:,} bytes were taken"


@contextmanager
def no_more_memory() -> Iterator[None]:
    """Fail if the peak memory of the process grows by `LITTLE_MEMORY` inside; much cheaper than `little_memory`."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < LITTLE_MEMORY, f"{grown:,} bytes were taken"


def refused(read: Callable[..., object], *arguments: object) -> str:
    """Return the message with which `read` refuses; fail if it does not, or allocates much memory."""
    with little_memory():
        try:
            found = read(*arguments)
        except ResiduaError as error:
            return str(error)
    raise AssertionError(f"nothing was refused: {found!r}")


def problems(archive: Path) -> str:
    """Return what `verify` finds, one line for each problem; fail if it allocates much memory."""
    with little_memory():
        return "\n".join(f"{problem.path}: {problem.what}" for problem in verify(archive).problems)

"""The archive's own metadata: `attributes.residua` of the root group, written last when an archive is made.

Until the root's `zarr.json` has it, there is no archive, only the start of one, which the next run removes. A SHA-256
over the entry protects plan and provenance; `files` protects every sidecar file, that is, every file in `examples/`,
`head/` and `tokenizer/`.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, cast

from residua.store.base.canonical import Json, digest_of
from residua.store.base.errors import DamagedArchiveError, PlanError, UnsafeArchiveError, shortened
from residua.store.base.untrusted import MAX_INDEX_BYTES, MAX_ROWS, name_problem, parse_json, read_file, size_problem
from residua.store.format.array_metadata import consolidated, foreign_attributes
from residua.store.format.plan import Plan
from residua.store.storage.files import write_file

FORMAT = "1.1"
ROOT = "zarr.json"
SIDECAR_FOLDERS = {"examples": 2**33, "head": 2**38, "tokenizer": 2**30}  # most bytes of a file in each
MAX_METADATA_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What an archive says about itself.

    Attributes:
        plan: The frozen plan.
        provenance: Where model, data and numbers came from.
        files: SHA-256 of every file in `examples/`, `head/` and `tokenizer/`, by path inside the archive.
        sealed: Rows, examples and their digest, once every shard is captured.
        index: Size and digest of the packed index of a sealed archive; None if it has none. See `packed_index.py`.
        documents: Copies of the arrays' metadata, by path, as the root has them for readers that list no folders; not
            covered by the entry's digest.
    """

    plan: Plan
    provenance: Mapping[str, Json]
    files: Mapping[str, str] = field(default_factory=dict)
    sealed: Mapping[str, Json] | None = None
    index: Mapping[str, Json] | None = None
    documents: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def n_rows(self) -> int | None:
        """Rows of the archive; None while its size is open."""
        if self.plan.n_rows is not None or self.sealed is None:
            return self.plan.n_rows
        return cast("int", self.sealed["n_rows"])  # checked by `read_metadata`

    def to_json(self) -> dict[str, Json]:
        """Return the entry as JSON, its own SHA-256 included."""
        entry: dict[str, Any] = {
            "format": FORMAT,
            "plan": self.plan.to_json(),
            "digest": self.plan.digest,
            "provenance": dict(self.provenance),
            "files": dict(self.files),
            "sealed": None if self.sealed is None else dict(self.sealed),
            "index": None if self.sealed is None or self.index is None else dict(self.index),
        }
        return {**entry, "sha256": digest_of(entry)}


def said_of(what: str, provenance: Mapping[str, object]) -> Mapping[str, Any]:
    """Return what a provenance says of the ``model``, the ``dataset`` or the like; empty if it says nothing."""
    found = provenance.get(what)
    return found if isinstance(found, Mapping) else {}


def notes_in(provenance: Mapping[str, object]) -> list[str]:
    """Return the notes of a provenance: what a reader of the archive should know, one sentence each."""
    found = provenance.get("notes")
    return [note for note in found if isinstance(note, str)] if isinstance(found, list) else []


def with_notes(metadata: Metadata, notes: Iterable[str]) -> Metadata:
    """Return the metadata with more notes in the provenance."""
    if not (more := list(notes)):
        return metadata
    known: list[Json] = [*notes_in(metadata.provenance), *more]
    return replace(metadata, provenance={**metadata.provenance, "notes": known})


def write_metadata(archive: Path, metadata: Metadata) -> None:
    """Write the root group's `zarr.json`, durably and in one step; attributes of other programs stay."""
    write_entry(archive, metadata.to_json(), {} if metadata.sealed is None else metadata.documents)


def write_entry(archive: Path, entry: Mapping[str, Json], documents: Mapping[str, Any] | None = None) -> None:
    """Write a group's `zarr.json` with `entry` as its `attributes.residua`, durably and in one step.

    Args:
        archive: Folder of the group; attributes that other programs gave it stay.
        entry: The entry.
        documents: Copies of the metadata below the group, by path, if it is to have them.
    """
    write_file(archive / ROOT, [_root_bytes(archive, entry, documents)])


def metadata_bytes(archive: Path, metadata: Metadata) -> bytes:
    """Return what `write_metadata` would write into `archive`."""
    return _root_bytes(archive, metadata.to_json(), {} if metadata.sealed is None else metadata.documents)


def _root_bytes(archive: Path, entry: Mapping[str, Json], documents: Mapping[str, Any] | None) -> bytes:
    attributes = {**foreign_attributes(archive / ROOT), "residua": dict(entry)}
    root: dict[str, Any] = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    if documents:
        root["consolidated_metadata"] = consolidated(documents)
    return json.dumps(root, indent=2, ensure_ascii=False).encode()


def is_archive(path: Path) -> bool:
    """Say whether `path` holds an archive that Residua made, damaged or not."""
    root = path / ROOT
    return root.is_file() and (root.stat().st_size > MAX_METADATA_BYTES or b'"residua"' in root.read_bytes())


def read_metadata(archive: Path) -> Metadata:
    """Return the metadata of `archive`, checked.

    Raises:
        FileNotFoundError: There is no archive at that path.
        DamagedArchiveError: The metadata does not match its own SHA-256.
        UnsafeArchiveError: It is not metadata that Residua writes, or of a newer format.
        PlanError: The archives of several stacks lie there.
    """
    path = archive / ROOT
    root = _read_root(archive)
    entry = _checked_entry(path, root)
    if "stacks" in entry:
        raise PlanError(
            f"{archive} holds the archives of several stacks, each with rows of its own: open it with residua.open, or "
            f"name one of them, such as {archive / str(next(iter(entry['stacks'] or ()), 'encoder'))}"
        )
    try:
        plan = Plan.from_json(entry.get("plan"))
    except UnsafeArchiveError as error:
        raise UnsafeArchiveError(f"{path}: {error}") from error
    provenance, sealed = entry.get("provenance"), entry.get("sealed")
    if not isinstance(provenance, dict) or not isinstance(sealed, dict | None):
        raise UnsafeArchiveError(f"{path}: provenance or sealed is not what Residua writes")
    if plan.digest != entry.get("digest"):
        raise UnsafeArchiveError(f"{path}: the digest is not that of the plan")
    files = _checked_files(path, entry.get("files"))
    _check_sealed(path, sealed)
    index = None if sealed is None else _checked_index(path, entry.get("index"))
    return Metadata(
        plan=plan, provenance=provenance, files=files, sealed=sealed, index=index, documents=_documents(root)
    )


def _documents(root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the consolidated metadata of the root by path; they are checked one by one when they are used."""
    found = root.get("consolidated_metadata")
    documents = found.get("metadata") if isinstance(found, dict) else None
    return documents if isinstance(documents, dict) else {}


def was_read(metadata: Metadata) -> bool:
    """Return whether the dataset of an archive is known to have been read to its end."""
    return "report" in said_of("dataset", metadata.provenance)


def read_entry(archive: Path) -> dict[str, Any]:
    """Return `attributes.residua` of the group at `archive`, compared with its own SHA-256; see `read_metadata`."""
    return _checked_entry(archive / ROOT, _read_root(archive))


def _checked_entry(path: Path, root: Mapping[str, Any]) -> dict[str, Any]:
    entry = root["attributes"]["residua"]
    if not isinstance(entry, dict) or not isinstance(entry.get("format"), str):
        raise UnsafeArchiveError(f"{path}: attributes.residua is not an entry that Residua writes")
    if entry["format"].split(".")[0] != FORMAT.split(".", maxsplit=1)[0]:
        raise UnsafeArchiveError(
            f"{path}: the archive has format {entry['format']}, this version reads {FORMAT}: update residua"
        )
    body = {key: value for key, value in entry.items() if key != "sha256"}
    try:
        found = digest_of(body)
    except (ValueError, RecursionError) as error:
        raise UnsafeArchiveError(f"{path}: attributes.residua is not an entry that Residua writes ({error})") from error
    if found != entry.get("sha256"):
        raise DamagedArchiveError(f"{path}: attributes.residua was altered (its SHA-256 differs): restore the file")
    return entry


def _read_root(archive: Path) -> dict[str, Any]:
    """Return the metadata of the root group, which has an entry of ours."""
    path = archive / ROOT
    if not path.is_file():
        why = f"it has no {ROOT}" if archive.exists() else "there is no such folder"
        raise FileNotFoundError(f"{archive} is not an archive: {why}. Check the path.")
    text = read_file(archive, path, MAX_METADATA_BYTES)
    try:
        root: Any = parse_json(text)
        _ = root["attributes"]["residua"]
    except ValueError as error:
        raise DamagedArchiveError(f"{path} cannot be read as JSON ({error}): restore it from a copy") from error
    except (KeyError, TypeError) as error:
        raise UnsafeArchiveError(f"{path} is a Zarr group but not a Residua archive") from error
    if root.get("zarr_format") != 3 or root.get("node_type") != "group":
        raise DamagedArchiveError(f"{path} does not say that it is a group of Zarr format 3: restore it from a copy")
    found: dict[str, Any] = root
    return found


def _check_sealed(path: Path, sealed: Mapping[str, object] | None) -> None:
    if sealed is not None and (problem := size_problem("sealed rows", sealed.get("n_rows"), MAX_ROWS)):
        raise UnsafeArchiveError(f"{path}: {problem}")


def _checked_index(path: Path, index: object) -> Mapping[str, Json] | None:
    """Return the entry of the packed index if it has the fields of one; absent in format 1.0."""
    if index is None:
        return None
    if not isinstance(index, dict) or index.keys() != {"n_bytes", "head_bytes", "sha256"}:
        raise UnsafeArchiveError(f"{path}: index is {shortened(repr(index))}, not the entry of a packed index")
    for name in ("n_bytes", "head_bytes"):
        if problem := size_problem(f"{name} of the index", index[name], MAX_INDEX_BYTES):
            raise UnsafeArchiveError(f"{path}: {problem}")
    if not isinstance(index["sha256"], str):
        raise UnsafeArchiveError(f"{path}: index gives {shortened(repr(index['sha256']))} as its SHA-256")
    return index


def _checked_files(path: Path, files: object) -> dict[str, str]:
    """Return `files` if every name stays inside the archive's sidecar folders."""
    if not isinstance(files, dict):
        raise UnsafeArchiveError(f"{path}: files is {type(files).__name__}, not a mapping from path to SHA-256")
    for name, digest in files.items():
        folder, _, file = name.partition("/")
        if name_problem(name) or folder not in SIDECAR_FOLDERS or not file:
            raise UnsafeArchiveError(f"{path}: files names {name!r}, which is not a sidecar file of an archive")
        if not isinstance(digest, str):
            raise UnsafeArchiveError(f"{path}: files gives {digest!r} as the SHA-256 of {name!r}")
    return files


def sidecar_files(archive: Path) -> Iterator[Path]:
    """Yield the regular files of `examples/`, `head/` and `tokenizer/`, in a fixed order."""
    for folder in SIDECAR_FOLDERS:
        root = archive / folder
        for path in sorted(root.rglob("*")) if root.is_dir() else []:
            if path.is_file() and not path.name.startswith("."):
                yield path


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_digest(path: Path, found: str, expected: str) -> None:
    """Raise DamagedArchiveError unless the SHA-256 of a file is the expected one."""
    if found != expected:
        raise DamagedArchiveError(f"{path} was altered (its SHA-256 differs): restore it from a copy")


def sidecar_digests(archive: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the SHA-256 of every sidecar file, by its path inside the archive; files that are `known` are not read."""
    digests = dict(known or {})
    for path in sidecar_files(archive):
        name = path.relative_to(archive).as_posix()
        if name not in digests:
            digests[name] = file_digest(path)
    return digests


def read_sidecar(archive: Path, metadata: Metadata, name: str) -> bytes | None:
    """Return the content of a sidecar file, by its path inside the archive; None if the archive has none.

    Raises:
        DamagedArchiveError: It is missing or altered.
    """
    if name not in metadata.files:
        return None
    path = archive / name
    content = read_file(archive, path, SIDECAR_FOLDERS[PurePosixPath(name).parts[0]])
    require_digest(path, hashlib.sha256(content).hexdigest(), metadata.files[name])
    return content

"""The metadata of arrays and groups in a folder: are they readable, and do their copies say the same?"""

from pathlib import PurePosixPath
from typing import Any

from residua.store.base.errors import DamagedArchiveError, UnsafeArchiveError
from residua.store.base.untrusted import parse_json, read_file
from residua.store.format.archive_metadata import ROOT
from residua.store.format.array_metadata import Document, check_arrays, consolidated, load_document
from residua.store.verification.report import Check

_MAX_GROUP_BYTES = 2**24
_COPIES = "consolidated_metadata"
_GROUP_FIELDS = {"zarr_format", "node_type", "attributes", _COPIES}


def check_metadata(check: Check) -> None:
    """Check the metadata of the arrays, and of the groups around them, which only other readers need."""
    documents = _arrays(check)
    n_problems = len(check.report.problems)
    folders = {folder for spec in check.archive.arrays for folder in PurePosixPath(spec.path).parents}
    for folder in sorted(folders - {PurePosixPath()}):
        name = f"{folder}/{ROOT}"
        check.known.add(name)
        try:
            found: Any = parse_json(read_file(check.root, check.root / name, _MAX_GROUP_BYTES))
            sound = found["zarr_format"] == 3 and found["node_type"] == "group"
            sound = sound and isinstance(found.get("attributes", {}), dict) and not found.keys() - _GROUP_FIELDS
            documents[str(folder)] = found
        except (DamagedArchiveError, UnsafeArchiveError) as error:
            check.problem(name, str(error))
        except (ValueError, KeyError, TypeError) as error:
            check.problem(name, f"it cannot be read as the metadata of a group ({error}): restore it from a copy")
        else:
            if not sound:
                check.problem(name, "it is not the metadata of a Zarr group: restore it from a copy")
    if len(check.report.problems) == n_problems:
        _check_copies(check, documents)


def _arrays(check: Check) -> dict[str, Document]:
    """Check the metadata of the arrays, of which a packed archive has copies in the root; return them by path."""
    found: dict[str, Document] = {}
    for spec in check.archive.arrays:
        check.known.add(f"{spec.path}/{ROOT}")
        try:
            check_arrays(check.root, [spec], check.archive.metadata.n_rows)
            found[spec.path] = _own(load_document(check.root, check.root / spec.path / ROOT))
        except (DamagedArchiveError, UnsafeArchiveError) as error:
            check.problem(f"{spec.path}/{ROOT}", str(error))
    return found


def _check_copies(check: Check, documents: dict[str, Document]) -> None:
    """Compare the copies of metadata that groups have of what is below them."""
    wanted = {node: _own({k: v for k, v in found.items() if k != _COPIES}) for node, found in documents.items()}
    copies = {node: found[_COPIES] for node, found in documents.items() if _COPIES in found}
    if check.archive.metadata.documents:
        copies[""] = consolidated(check.archive.metadata.documents)
    for group, found in copies.items():
        prefix = f"{group}/" if group else ""
        below = {node[len(prefix) :]: copy for node, copy in wanted.items() if node.startswith(prefix)}
        try:
            there = {node: _own(copy) for node, copy in found["metadata"].items() if node in below}
            is_sound = {**found, "metadata": there} == consolidated(below)
        except (KeyError, TypeError, AttributeError):
            is_sound = False
        if not is_sound:
            check.problem(f"{prefix}{ROOT}", "its copies of metadata differ from those below: run residua pack")


def _own(document: Document) -> Document:
    """Return metadata without the attributes of other programs, which may change."""
    ours = {name: value for name, value in document["attributes"].items() if name == "residua"}
    return {**document, "attributes": ours}

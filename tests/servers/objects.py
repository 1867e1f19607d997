"""What a folder in a bucket, or a folder here, holds."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from residua.store.storage.objects import ObjectFolder


def objects(address: str, options: Mapping[str, Any]) -> dict[str, bytes]:
    """Return all objects below an address, by name."""
    folder = ObjectFolder(address, options)
    return {entry.name: folder.read(entry.name, entry.n_bytes) for entry in folder.list()}


def files(folder: Path) -> dict[str, bytes]:
    """Return all files of a folder, by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_same(one: Mapping[str, bytes], other: Mapping[str, bytes]) -> None:
    """Check that two archives have the same files, byte for byte, but for how they were made, as by which command."""
    assert _parts(one["zarr.json"]) == _parts(other["zarr.json"])
    assert {**one, "zarr.json": b""} == {**other, "zarr.json": b""}


def _parts(root: bytes) -> dict[str, Any]:
    """Return what a root says, without how it was made and its digest."""
    return {**json.loads(root)["attributes"]["residua"], "sha256": "", "provenance": {}}

"""Telling whether a folder that a request names by path still holds what it held, without reading all of it."""

import hashlib
from pathlib import Path

from residua.store.format.archive_metadata import ROOT
from residua.store.format.commits import FOLDER as COMMITS

_TAIL_BYTES = 64 * 1024  # chunks end in their crc32c, and a checkpoint's zip in its directory, which has every crc32


def content_mark(folder: Path) -> str:
    """Return a digest that changes when the content of `folder` does, in hex.

    Of an archive it is that of its metadata and commits, which hold the digests of everything else. Of any other
    folder it is that of the names, the sizes and the last 64 KiB of all files: overlays and lenses end every file in
    checksums of what is before.

    Raises:
        OSError: A file cannot be read.
    """
    if (folder / COMMITS).is_dir():
        files = [folder / ROOT, *(folder / COMMITS).iterdir()]
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

"""Images of a capture on disk, so that each batch decodes its own: memory never holds those of the whole dataset.

A dataset may be a stream that can be read once. While it is read, each image is written to one file next to the archive
as it was given (of an image that has a path, the path), and batches read it back in any order. The folder goes away
with the capture; one that a killed run left is removed by the next.
"""

import os
import secrets
import shutil
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from residua.pipelines.images.images import GivenImage
from residua.store.storage.lock import try_flock

_CONTENT, _INDEX = "content", "index.npy"
_TEXT, _FILE, _PATH, _PIXELS = range(4)
_FIELDS = 6  # example, kind, offset, bytes, width, height; of a text, the number of the view in place of the width


@contextmanager
def spool_folder(archive: Path) -> Iterator[Path]:
    """Yield a new hidden folder next to an archive; it is removed at the end, as are those of runs that are gone."""
    prefix = f".{archive.name}.images."
    for left in archive.parent.glob(f"{prefix}*"):
        descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
        if try_flock(descriptor):  # a run that goes on holds it
            shutil.rmtree(left, ignore_errors=True)
        os.close(descriptor)
    folder = archive.parent / f"{prefix}{secrets.token_hex(4)}"
    folder.mkdir(parents=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try_flock(descriptor)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


class SpoolWriter:
    """Writes the images of examples, in order. A context: leaving it makes the folder readable for `Spool`.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = (folder / _CONTENT).open("wb")
        self._index = array("q")
        self._offset = 0
        self._n_examples = 0

    def add(self, images: Sequence[GivenImage], text: str, views: Sequence[int] = (0,)) -> None:
        """Append images, and the text that they belong to, of one example for each view of them."""
        kept = [(_TEXT, text.encode(), (0, 0))]
        for image in images:
            if image.path is not None:
                kept.append((_PATH, f"{image.sha256}{image.path}".encode(errors="surrogateescape"), (0, 0)))
            else:
                kind = _FILE if image.size is None else _PIXELS
                kept.append((kind, bytes.fromhex(image.sha256) + image.content, image.size or (0, 0)))
        for view in views:
            offset = self._offset
            for kind, content, size in kept:
                sides = (view, 0) if kind == _TEXT else size
                self._index.extend((self._n_examples, kind, offset, len(content), *sides))
                offset += len(content)
            self._n_examples += 1
        for _, content, _ in kept:
            self._offset += self._file.write(content)

    def __enter__(self) -> "SpoolWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        index = np.array(self._index, np.int64).reshape(-1, _FIELDS)
        np.save(self._folder / _INDEX, index, allow_pickle=False)


class Spool:
    """Reads the images of examples, in any order.

    Args:
        folder: What a `SpoolWriter` filled.
    """

    def __init__(self, folder: Path) -> None:
        self._content = folder / _CONTENT
        self._index: npt.NDArray[np.int64] = np.load(folder / _INDEX, mmap_mode="r", allow_pickle=False)
        self._examples = np.array(self._index[:, 0])

    def read(self, example: int) -> tuple[list[GivenImage], str, int]:
        """Return the images of one example, its text, and the number of its view of them."""
        start, stop = np.searchsorted(self._examples, [example, example + 1]).tolist()
        text, of_view, images = "", 0, list[GivenImage]()
        with self._content.open("rb") as file:
            for _, kind, offset, n_bytes, width, height in self._index[start:stop].tolist():
                file.seek(offset)
                content = file.read(n_bytes)
                if kind == _TEXT:
                    text, of_view = content.decode(), width
                elif kind == _PATH:
                    path = Path(content[64:].decode(errors="surrogateescape"))
                    images.append(GivenImage(sha256=content[:64].decode(), path=path))
                else:
                    size = (width, height) if kind == _PIXELS else None
                    images.append(GivenImage(sha256=content[:32].hex(), content=content[32:], size=size))
        return images, text, of_view

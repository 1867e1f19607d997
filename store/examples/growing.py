"""Examples of a growing archive, as a process sees them that does not write them: which parts there are, and the end.

In a folder all processes see the same files. Of an archive in a bucket each has copies, to which this adds what the
one that reads the dataset has put into the bucket since: first the root's metadata, which say whether the dataset was
read to its end, and then the parts. So the parts are all there once the end is known.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count

from residua.store.examples.index import EXAMPLES, part_name
from residua.store.format.archive_metadata import MAX_METADATA_BYTES, ROOT, read_metadata, was_read
from residua.store.storage.destination import BucketFolder, Destination
from residua.store.storage.files import write_file

_LOOK_SECONDS = 1.0  # between two looks into a bucket


def bring_examples(out: Destination) -> None:
    """Bring metadata and parts that came since to the local folder of an archive in a bucket, which has been brought.

    Raises:
        StorageError: The bucket cannot be read.
    """
    if not isinstance(out, BucketFolder):
        return
    root = out.objects.read(ROOT, MAX_METADATA_BYTES)
    if root != (out.path / ROOT).read_bytes():
        write_file(out.path / ROOT, [root])
    each_part(lambda name: out.fetch([name]))


def each_part(bring: Callable[[str], object]) -> None:
    """Call `bring` with the path of part after part, until there is none; it raises FileNotFoundError then."""
    with suppress(FileNotFoundError):
        for number in count():
            bring(f"{EXAMPLES}/{part_name(number)}")


class DatasetEnd:
    """Whether the dataset of a growing archive was read to its end, which its metadata say from then on.

    Args:
        out: Where the archive is written.
    """

    def __init__(self, out: Destination) -> None:
        self._out = out
        self._seen: tuple[int, int] | None = None
        self._is_reached = False
        self._next_look = 0.0

    def __call__(self) -> bool:
        """Look at the metadata if they were written since; of an archive in a bucket, bring what is new."""
        if self._is_reached:
            return True
        if not self._out.lease and time.monotonic() >= self._next_look:  # whoever holds the lease has all that there is
            bring_examples(self._out)
            self._next_look = time.monotonic() + _LOOK_SECONDS
        found = (self._out.path / ROOT).stat()
        if self._seen != (found.st_ino, found.st_mtime_ns):
            self._seen = found.st_ino, found.st_mtime_ns
            self._is_reached = was_read(read_metadata(self._out.path))
        return self._is_reached

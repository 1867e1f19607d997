"""Where a verification stopped: a small file that lets the next one go on from there.

The file belongs to the user's own machine, and lies outside the archive, which may be read-only. It names the archive's
metadata by their SHA-256; what another archive, or the same one before it was written to again, left is ignored.
"""

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from residua.store.base.canonical import Json, canonical_json
from residua.store.base.untrusted import parse_json
from residua.store.format.archive_metadata import ROOT
from residua.store.storage.files import write_file

_SECONDS = 5.0  # between two writes


@dataclass(kw_only=True)
class Checkpoint:
    """The file, for one archive.

    Attributes:
        path: The file.
        archive: Folder of the archive.
        state: What `save` was given last; empty at the start, and if the file is of something else.
    """

    path: Path
    archive: Path
    state: dict[str, Any] = field(default_factory=dict)
    _saved: float = field(default_factory=time.monotonic, repr=False)

    def __post_init__(self) -> None:
        self._name = hashlib.sha256((self.archive / ROOT).read_bytes()).hexdigest()
        try:
            found: Any = parse_json(self.path.read_bytes())
            self.state = dict(found["state"]) if found["archive"] == self._name else {}
        except (OSError, ValueError, LookupError, TypeError):
            self.state = {}

    def save(self, state: dict[str, Json]) -> None:
        """Write the state, if some seconds have passed since the last time.

        Raises:
            OSError: The file cannot be written.
        """
        if time.monotonic() - self._saved > _SECONDS:
            self._saved = time.monotonic()
            write_file(self.path, [canonical_json({"archive": self._name, "state": state})])

    def remove(self) -> None:
        """Remove the file: everything is done."""
        self.path.unlink(missing_ok=True)

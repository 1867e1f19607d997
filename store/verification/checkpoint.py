"""Where a verification stopped, and what it had found: a small file that lets the next one go on from there.

The file belongs to the user's own machine, and lies outside the archive, which may be read-only. It names the archive's
metadata by their SHA-256; what another archive, or the same one before it was written to again, left is ignored.
"""

import hashlib
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from residua.store.base.canonical import Json, canonical_json
from residua.store.base.untrusted import parse_json
from residua.store.format.archive_metadata import ROOT
from residua.store.storage.files import write_file
from residua.store.verification.shards import ShardFindings


@dataclass
class Results(ShardFindings):
    """What was found in the first `n_shards` shards."""

    n_shards: int = 0

    def add(self, found: ShardFindings) -> None:
        """Add what was found in the next shard."""
        self.problems += found.problems
        self.n_shards += 1
        self.n_files += found.n_files
        self.n_chunks += found.n_chunks
        self.n_bytes += found.n_bytes

    def to_json(self) -> dict[str, Json]:
        """Return the results as a checkpoint holds them."""
        return {**asdict(self), "problems": [list(problem) for problem in self.problems]}

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> "Results":
        """Return the results that a checkpoint holds; none if it holds none."""
        try:
            problems = [(str(path), str(what)) for path, what in state["problems"]]
            return cls(
                problems, **{key: max(0, int(state[key])) for key in ("n_shards", "n_files", "n_chunks", "n_bytes")}
            )
        except (LookupError, TypeError, ValueError):
            return cls()


@dataclass(kw_only=True)
class Checkpoint:
    """The file, for one archive. A context, at whose end it is removed; after an error, it has what was saved last.

    Attributes:
        path: The file.
        archive: Folder of the archive; of one at an address, the folder of the copies of its small files.
        state: What `save` was given last; empty at the start, and if the file is of something else.
        seconds: Between two writes.
    """

    path: Path
    archive: Path
    state: dict[str, Any] = field(default_factory=dict)
    seconds: float = 5.0
    _saved: float = field(default_factory=time.monotonic, repr=False)

    def __post_init__(self) -> None:
        self._name = hashlib.sha256((self.archive / ROOT).read_bytes()).hexdigest()
        try:
            found: Any = parse_json(self.path.read_bytes())
            self.state = dict(found["state"]) if found["archive"] == self._name else {}
        except (OSError, ValueError, LookupError, TypeError):
            self.state = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.path.unlink(missing_ok=True)
        elif self.state:
            self._write()

    def save(self, state: dict[str, Json]) -> None:
        """Take the state, and write it if some seconds have passed since the last time.

        Raises:
            OSError: The file cannot be written.
        """
        self.state = state
        if time.monotonic() - self._saved > self.seconds:
            self._saved = time.monotonic()
            self._write()

    def _write(self) -> None:
        write_file(self.path, [canonical_json({"archive": self._name, "state": self.state})])

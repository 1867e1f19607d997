"""What a verification finds, and how its steps say so."""

from dataclasses import dataclass, field
from pathlib import Path

from residua.store.read.archive import Archive


@dataclass(frozen=True)
class Problem:
    """One problem: the file, by its path in the archive if it is inside, and what is wrong with it."""

    path: str
    what: str


@dataclass(kw_only=True)
class Verification:
    """The result of a verification.

    Attributes:
        problems: The damage; empty for a sound archive.
        notes: Remarks that are no damage, for example that the archive is not sealed.
        n_files: Files that were re-hashed.
        n_chunks: Chunks that were re-hashed.
        n_bytes: Bytes that were re-hashed.
    """

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    n_files: int = 0
    n_chunks: int = 0
    n_bytes: int = 0

    @property
    def is_sound(self) -> bool:
        """Whether nothing is damaged."""
        return not self.problems


@dataclass
class Check:
    """One verification under way.

    Attributes:
        archive: What is verified.
        report: What was found so far.
        known: The files that the archive has beside shards and records, by their paths in it.
    """

    archive: Archive
    report: Verification
    known: set[str] = field(default_factory=set)

    @property
    def root(self) -> Path:
        """The folder of the archive; of one at an address, the folder of the copies of its small files."""
        return self.archive.path

    def problem(self, path: str | Path, what: str) -> None:
        """Report damage to a file."""
        path = Path(path)
        inside = path.relative_to(self.root) if path.is_relative_to(self.root) else path
        self.report.problems.append(Problem(inside.as_posix(), what))

    def count(self, n_bytes: int) -> None:
        """Count a file that is sound."""
        self.report.n_files += 1
        self.report.n_bytes += n_bytes

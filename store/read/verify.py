"""Verification: re-reads everything in an archive and names what is damaged.

It compares every chunk with its crc32c, every shard file with its commit, every sidecar file with the SHA-256 in the
metadata, and the row columns with the example table, so that rows and texts belong together.
"""

import os
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from os import PathLike, fspath
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from residua.store.base.canonical import Json
from residua.store.base.errors import (
    DamagedArchiveError,
    PlanError,
    ResiduaError,
    StorageError,
    UnsafeArchiveError,
    few,
)
from residua.store.base.untrusted import check_file, check_inside, parse_json, read_file
from residua.store.encoding.shard import check_shard, shard_path
from residua.store.encoding.spec import ArraySpec
from residua.store.examples.index import ExampleIndex
from residua.store.format.archive_metadata import ROOT, SIDECAR_FOLDERS, file_digest
from residua.store.format.array_metadata import Document, check_arrays, consolidated, load_document
from residua.store.format.commits import (
    FOLDER,
    Commit,
    committed_shards,
    named_example_files,
    read_commit,
    record_name,
    same_files,
)
from residua.store.format.sidecars import FIDELITY_FILE, read_fidelity
from residua.store.format.stacks import stacks_in
from residua.store.read.archive import Archive
from residua.store.read.checkpoint import Checkpoint
from residua.store.read.mapped import cpu_threads
from residua.store.read.remote_archive import RemoteArchive
from residua.store.sealing.packed_index import INDEX, REBUILD, PackedIndex
from residua.store.storage.address import is_remote

_MAX_LISTED = 8
_STEP_BYTES = 16 * 2**20  # of chunks that a thread fetches together
_MANY_SHARDS = 8  # from here on, threads are worth their start
_MAX_GROUP_BYTES = 2**24
_COPIES = "consolidated_metadata"
_GROUP_FIELDS = {"zarr_format", "node_type", "attributes", _COPIES}


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


def verify(
    path: str | PathLike[str],
    *,
    sample: int | None = None,
    threads: int | None = None,
    checkpoint: str | Path | None = None,
    storage_options: Mapping[str, Any] | None = None,
    on_shard: Callable[[int, int], None] = lambda *_: None,
) -> Verification:
    """Re-hash everything in the archive at `path`.

    Args:
        path: The archive, or its path or address.
        sample: Check only that many shards, chosen at random; everything beside the shards is checked.
        threads: Threads that share the shards; by default the processor's, up to four.
        checkpoint: A file, outside the archive, that is written every few seconds and removed at the end. A
            verification that finds it goes on after the shards that were checked already. Not for addresses.
        storage_options: For an address, as for `residua.open`.
        on_shard: Called after each shard, with the number done and the total.

    Returns:
        The problems found; damage raises nothing.

    Raises:
        FileNotFoundError: There is no archive at `path`.
        StorageError: An address cannot be read.
        OSError: The checkpoint cannot be written.
    """
    path = fspath(path)
    report, folder = Verification(), Path(path)
    try:
        stacks = () if is_remote(path) else stacks_in(folder)
    except (ResiduaError, ValueError):
        stacks = ()  # `Archive` says what is wrong
    if stacks:
        _verify_stacks(folder, stacks, report, partial(verify, sample=sample, threads=threads, on_shard=on_shard))
        return report
    check: _Check
    try:
        if is_remote(path):
            checkpoint = None
            check = _RemoteCheck(RemoteArchive(str(path), storage_options=storage_options, cache=False), report)
        else:
            check = _Check(Archive(path), report)
        commits = check.archive.commits
    except StorageError:
        raise
    except (ResiduaError, ValueError) as error:
        report.problems.append(Problem(str(path), str(error)))
        return report
    shards = sorted(commits)
    if sample is not None and sample < len(shards):
        report.notes.append(f"{max(0, sample):,} of {len(shards):,} shards were checked, chosen at random")
        shards = sorted(random.SystemRandom().sample(shards, max(0, sample)))
        checkpoint = None
    saved = None if checkpoint is None else Checkpoint(path=Path(checkpoint), archive=folder)
    check.run(commits, shards, threads or cpu_threads(), saved, on_shard)
    return report


def _own(document: Document) -> Document:
    """Return metadata without the attributes of other programs, which may change."""
    ours = {name: value for name, value in document["attributes"].items() if name == "residua"}
    return {**document, "attributes": ours}


def _verify_stacks(
    folder: Path, stacks: Sequence[str], report: Verification, verify_one: Callable[[Path], Verification]
) -> None:
    """Verify the archive of each stack, and compare their examples."""
    numbers: dict[str, int] = {}
    for name in stacks:
        if not (folder / name).exists():
            report.notes.append(f"the archive of {name} is not begun")
            continue
        try:
            check_inside(folder, folder / name)
            found = verify_one(folder / name)
            numbers[name] = len(Archive(folder / name).example_table)
        except (ResiduaError, OSError) as error:
            report.problems.append(Problem(name, str(error)))
            continue
        report.problems += [replace(problem, path=f"{name}/{problem.path}") for problem in found.problems]
        report.notes += [f"{name}: {note}" for note in found.notes]
        report.n_files += found.n_files
        report.n_chunks += found.n_chunks
        report.n_bytes += found.n_bytes
    if len(set(numbers.values())) > 1:
        report.problems.append(Problem(".", f"the stacks have different numbers of examples: {numbers}"))
    for path in sorted(folder.iterdir()):
        if path.name not in (ROOT, *stacks) and not path.name.startswith("."):
            report.notes.append(f"{path.name} is not part of the archive, and was not checked")


@dataclass
class _Shard:
    """What was found in one shard: problems as path and text, its rows if its record can be read, and counts."""

    problems: list[tuple[str, str]] = field(default_factory=list)
    rows: tuple[int, int] | None = None
    n_files: int = 0
    n_chunks: int = 0
    n_bytes: int = 0


@dataclass
class _Results:
    """What was found in the first `n_shards` shards."""

    problems: list[tuple[str, str]] = field(default_factory=list)
    n_shards: int = 0
    n_files: int = 0
    n_chunks: int = 0
    n_bytes: int = 0

    def add(self, found: _Shard) -> None:
        self.problems += found.problems
        self.n_shards += 1
        self.n_files += found.n_files
        self.n_chunks += found.n_chunks
        self.n_bytes += found.n_bytes

    def to_json(self) -> dict[str, Json]:
        return {**asdict(self), "problems": [list(problem) for problem in self.problems]}

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> "_Results":
        """Return the results that a checkpoint holds; none if it holds none."""
        try:
            problems = [(str(path), str(what)) for path, what in state["problems"]]
            return cls(problems, *(max(0, int(state[key])) for key in ("n_shards", "n_files", "n_chunks", "n_bytes")))
        except (LookupError, TypeError, ValueError):
            return cls()


class _Check:
    """One verification.

    Attributes:
        archive: What is verified.
    """

    def __init__(self, archive: Archive, report: Verification) -> None:
        self.archive = archive
        self._root = archive.path
        self._plan = archive.plan
        self._arrays = archive.arrays
        self._file_specs = [spec for array in self._arrays for spec in array.file_specs]
        self._report = report
        self._known = {ROOT, INDEX, *(f"{spec.path}/{ROOT}" for spec in self._arrays)}
        self._places = {shard_path(Path(), spec, 0).as_posix() for spec in self._file_specs}

    def run(
        self,
        commits: Mapping[int, Commit],
        shards: Sequence[int],
        threads: int,
        checkpoint: Checkpoint | None,
        on_shard: Callable[[int, int], None],
    ) -> None:
        """Check everything, of the shards those in `shards`; damage that explains other damage comes first."""
        self._groups(self._metadata())
        if isinstance(commits, PackedIndex):
            self._index(commits)
        elif self.archive.metadata.index is not None:
            self._problem(INDEX, f"it is missing, so that the records were read: {REBUILD}")
        self._side_files(commits)
        self._fidelity()
        index = self._examples()
        self._shards(commits, shards, index, threads, checkpoint, on_shard)
        if self.archive.metadata.sealed is not None:
            self._missing(commits)
            if absent := self.archive.absent_sites:
                self._report.notes.append(f"this copy has no rows of {few(absent)}: their folders are not there")
        elif not self.archive.is_sealed:
            rows, total, *_ = self.archive.progress
            of = "" if total is None else f" of {total:,}"
            self._report.notes.append(f"the archive is not sealed: {rows:,}{of} rows are captured")
        self._unknown_files(commits)

    def _problem(self, path: str | Path, what: str) -> None:
        path = Path(path)
        inside = path.relative_to(self._root) if path.is_relative_to(self._root) else path
        self._report.problems.append(Problem(inside.as_posix(), what))

    def _metadata(self) -> dict[str, Document]:
        """Check the metadata of the arrays, of which a packed archive has copies in the root; return them by path."""
        found: dict[str, Document] = {}
        for spec in self._arrays:
            try:
                check_arrays(self._root, [spec], self.archive.metadata.n_rows)
                found[spec.path] = _own(load_document(self._root, self._root / spec.path / ROOT))
            except (DamagedArchiveError, UnsafeArchiveError) as error:
                self._problem(f"{spec.path}/{ROOT}", str(error))
        return found

    def _index(self, index: PackedIndex) -> None:
        """Check the packed index, and compare the records that are there with it."""
        try:
            index.check()
        except (DamagedArchiveError, UnsafeArchiveError) as error:
            self._problem(INDEX, str(error))
            return
        self._count(index.n_bytes)
        recorded = committed_shards(self._root)
        for shard in sorted(recorded):
            name = f"{FOLDER}/{record_name(shard)}"
            try:
                if shard not in index:
                    raise DamagedArchiveError("the archive has no such shard: remove the record")
                record = read_commit(self._root, self._plan, shard, self.archive.n_rows)
                if not same_files(record, index[shard]):
                    raise DamagedArchiveError(f"the record and {INDEX} differ: restore both from a copy")
            except (DamagedArchiveError, UnsafeArchiveError) as error:
                self._problem(name, str(error))
        if missing := len(index) - len(recorded):
            self._report.notes.append(
                f"{missing:,} of {len(index):,} records are missing in {FOLDER}/; {INDEX} says what they did"
            )

    def _groups(self, documents: dict[str, Document]) -> None:
        """Check the metadata of the groups around the arrays, which only other readers need.

        Args:
            documents: The metadata of the arrays, by path; that of the groups is added.
        """
        n_problems = len(self._report.problems)
        folders = {folder for spec in self._arrays for folder in PurePosixPath(spec.path).parents}
        for folder in sorted(folders - {PurePosixPath()}):
            name = f"{folder}/{ROOT}"
            self._known.add(name)
            try:
                found: Any = parse_json(read_file(self._root, self._root / name, _MAX_GROUP_BYTES))
                sound = found["zarr_format"] == 3 and found["node_type"] == "group"
                sound = sound and isinstance(found.get("attributes", {}), dict) and not found.keys() - _GROUP_FIELDS
                documents[str(folder)] = found
            except (DamagedArchiveError, UnsafeArchiveError) as error:
                self._problem(name, str(error))
            except (ValueError, KeyError, TypeError) as error:
                self._problem(name, f"it cannot be read as the metadata of a group ({error}): restore it from a copy")
            else:
                if not sound:
                    self._problem(name, "it is not the metadata of a Zarr group: restore it from a copy")
        if len(self._report.problems) == n_problems:
            self._copies(documents)

    def _copies(self, documents: dict[str, Document]) -> None:
        """Compare the copies of metadata that groups have of what is below them."""
        wanted = {node: _own({k: v for k, v in found.items() if k != _COPIES}) for node, found in documents.items()}
        copies = {node: found[_COPIES] for node, found in documents.items() if _COPIES in found}
        if self.archive.metadata.documents:
            copies[""] = consolidated(self.archive.metadata.documents)
        for group, found in copies.items():
            prefix = f"{group}/" if group else ""
            below = {node[len(prefix) :]: copy for node, copy in wanted.items() if node.startswith(prefix)}
            try:
                there = {node: _own(copy) for node, copy in found["metadata"].items() if node in below}
                is_sound = {**found, "metadata": there} == consolidated(below)
            except (KeyError, TypeError, AttributeError):
                is_sound = False
            if not is_sound:
                self._problem(f"{prefix}{ROOT}", "its copies of metadata differ from those below: run residua pack")

    def _side_files(self, commits: Mapping[int, Commit]) -> None:
        named = {} if isinstance(commits, PackedIndex) else named_example_files(commits)
        expected = {**self.archive.metadata.files, **named}
        for name, digest in expected.items():
            path = self._root / name
            self._known.add(name)
            try:
                check_file(self._root, path, SIDECAR_FOLDERS[PurePosixPath(name).parts[0]])
            except (DamagedArchiveError, UnsafeArchiveError) as error:
                self._problem(name, str(error))
                continue
            if file_digest(path) != digest:
                self._problem(name, "the file was altered (its SHA-256 differs): restore it from a copy")
            else:
                self._count(path.stat().st_size)

    def _fidelity(self) -> None:
        path = self._root / FIDELITY_FILE
        if not path.exists():
            return
        self._known.add(FIDELITY_FILE)
        try:
            read_fidelity(self._root, self._plan)
        except (DamagedArchiveError, UnsafeArchiveError, PlanError) as error:
            self._problem(path, str(error))
        else:
            self._count(path.stat().st_size)

    def _examples(self) -> ExampleIndex | None:
        """Return the index of the example table if its content is sound."""
        try:
            table = self.archive.example_table
            table.verify()
        except (ResiduaError, OSError) as error:
            self._problem("examples", str(error))
            return None
        return table.index()

    def _shards(
        self,
        commits: Mapping[int, Commit],
        shards: Sequence[int],
        index: ExampleIndex | None,
        threads: int,
        checkpoint: Checkpoint | None,
        on_shard: Callable[[int, int], None],
    ) -> None:
        """Check shards in several threads, and take their results in order."""
        results = _Results() if checkpoint is None else _Results.from_json(checkpoint.state)
        rest = shards[results.n_shards :]
        for shard, found in zip(rest, self._found(commits, rest, threads), strict=True):
            if index is not None and found.rows is not None and not found.problems:
                found.problems.extend(self._rows(*found.rows, index, f"{FOLDER}/{record_name(shard)}"))
            results.add(found)
            on_shard(results.n_shards, len(shards))
            if checkpoint is not None:
                checkpoint.save(results.to_json())
        if checkpoint is not None:
            checkpoint.remove()
        for path, what in results.problems:
            self._problem(path, what)
        self._report.n_files += results.n_files
        self._report.n_chunks += results.n_chunks
        self._report.n_bytes += results.n_bytes

    def _found(self, commits: Mapping[int, Commit], shards: Sequence[int], threads: int) -> "Iterator[_Shard]":
        """Yield what is found in each shard, in order."""
        if threads == 1 or len(shards) < _MANY_SHARDS:
            yield from (self._shard(commits, shard) for shard in shards)
            return
        with ThreadPoolExecutor(threads, thread_name_prefix="residua-verify") as pool:
            waiting: deque[Future[_Shard]] = deque()
            ahead = iter(shards)
            try:
                for _ in shards:
                    for shard in islice(ahead, 2 * threads - len(waiting)):
                        waiting.append(pool.submit(self._shard, commits, shard))
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _shard(self, commits: Mapping[int, Commit], shard: int) -> "_Shard":
        """Check the files of one shard; several threads call this."""
        try:
            commit = commits[shard]
        except (DamagedArchiveError, UnsafeArchiveError) as error:  # of an index, which is read in parts
            return _Shard([(INDEX, str(error))])
        found = _Shard(rows=commit.rows)
        for spec in self._file_specs:
            self._shard_file(spec, commit, found)
        return found

    def _shard_file(self, spec: ArraySpec, commit: Commit, found: "_Shard") -> None:
        path = shard_path(self._root, spec, commit.shard)
        n_rows = commit.rows[1] - commit.rows[0]
        try:
            check_inside(self._root, path)
            digest = check_shard(path, spec, n_rows, first_row=commit.rows[0])
            n_bytes = path.stat().st_size
        except (ResiduaError, OSError) as error:
            found.problems.append((str(path), str(error)))
            return
        if digest != commit.arrays[spec.key].digest:
            what = "the shard is sound, but not the one that was committed: restore it from a copy"
            found.problems.append((str(path), what))
            return
        found.n_files += 1
        found.n_bytes += n_bytes
        found.n_chunks += -(-n_rows // spec.rows_per_chunk)

    def _rows(self, first: int, stop: int, index: ExampleIndex, name: str) -> Iterator[tuple[str, str]]:
        """Compare the row columns with the example table; yield the record, and what is wrong."""
        if any(spec not in self._arrays for spec in self._plan.row_arrays):
            return
        if stop > index.total_rows:
            yield name, f"it covers rows {first:,} to {stop:,}, but the examples have {index.total_rows:,} rows"
            return
        rows = np.arange(first, stop)
        columns = self.archive.rows
        example = np.searchsorted(index.first_row, rows, side="right") - 1
        tokens, positions = [], []
        for number in np.unique(example).tolist():
            start, end = (int(row) for row in index.first_row[number : number + 2])
            at = self.archive.example_table.positions(number)[max(first, start) - start : min(stop, end) - start]
            positions.append(at)
            tokens.append(self.archive.example_table.tokens(number)[at])
        for column, values in (
            (columns.example, example),
            (columns.position, np.concatenate(positions)),
            (columns.token, np.concatenate(tokens)),
        ):
            if not np.array_equal(column[first:stop], values):
                yield name, f"{column.name} of rows {first:,} to {stop:,} contradicts the example table"

    def _missing(self, commits: Mapping[int, Commit]) -> None:
        """Name the first missing records. Their number comes from the metadata, which may claim anything."""
        n_shards = self._plan.n_shards(self.archive.n_rows)
        for shard in islice((shard for shard in range(n_shards) if shard not in commits), _MAX_LISTED):
            self._problem(f"{FOLDER}/{shard:08d}-0000.json", "the record is missing: restore it from a copy")
        n_more = n_shards - len(commits) - _MAX_LISTED
        if n_more > 0:
            self._problem(FOLDER, f"{n_more:,} more records are missing: restore them from a copy")

    def _unknown_files(self, commits: Mapping[int, Commit]) -> None:
        """Name files without a record; leftovers of a killed run, and what others put there, are no damage."""
        others: list[str] = []
        for folder, names, files in os.walk(self._root):
            names.sort()
            linked = [name for name in names if Path(folder, name).is_symlink()]
            for path in (Path(folder, name) for name in [*linked, *sorted(files)]):
                name = path.relative_to(self._root).as_posix()
                if path.name in linked and self._is_inside(path) and path.is_dir():
                    continue
                if not self._is_known(name, commits):
                    self._unknown_file(name, others)
        self._report.notes += [
            f"{name} is not part of the archive, and was not checked" for name in others[:_MAX_LISTED]
        ]
        if len(others) > _MAX_LISTED:
            self._report.notes.append(f"{len(others) - _MAX_LISTED:,} more files are not part of the archive")

    def _is_known(self, name: str, commits: Mapping[int, Commit]) -> bool:
        """Say whether the archive has a file of this name, without a list of all of them, which may be millions."""
        if name in self._known or name in self._places:
            return True
        folder, _, file = name.partition("/")
        if folder == FOLDER:
            number = file.partition("-")[0]
            return number.isdecimal() and int(number) in commits and file == record_name(int(number))
        array, _, place = name.partition("/c/")
        number, *across = place.split("/")
        is_shard = number.isdecimal() and number == str(int(number)) and int(number) in commits
        return is_shard and f"{array}/c/0{''.join(f'/{part}' for part in across)}" in self._places

    def _unknown_file(self, name: str, others: list[str]) -> None:
        if name.endswith(".tmp"):
            self._report.notes.append(f"{name} is a temporary file of a killed run; the next run removes it")
        elif any(name.startswith(f"{spec.path}/c/") for spec in self._arrays):
            self._report.notes.append(f"{name} belongs to a shard without a commit; it will be written again")
        elif self._is_growing and name.startswith("examples/part-"):
            self._report.notes.append(f"{name} holds examples whose shard was not committed")
        elif PurePosixPath(name).name != ROOT:
            others.append(name)

    def _is_inside(self, path: Path) -> bool:
        """Return whether `path` lies inside the archive; note the problem if a link leads out."""
        try:
            check_inside(self._root, path)
        except UnsafeArchiveError as error:
            self._problem(path, str(error))
            return False
        return True

    @property
    def _is_growing(self) -> bool:
        """Whether the archive comes from a user's own loop that is still open or failed."""
        return self._plan.n_rows is None and self.archive.metadata.sealed is None

    def _count(self, n_bytes: int) -> None:
        self._report.n_files += 1
        self._report.n_bytes += n_bytes


class _RemoteCheck(_Check):
    """One verification of an archive at an address: all of it comes over the network, and nothing from a cache.

    The copies of the arrays' metadata in the root were compared when the archive was opened. What else is at the
    address is not looked for.
    """

    def __init__(self, archive: RemoteArchive, report: Verification) -> None:
        super().__init__(archive, report)
        self._chunks = archive.chunks

    def _groups(self, documents: dict[str, Document]) -> None:
        pass

    def _metadata(self) -> dict[str, Document]:
        return {}

    def _fidelity(self) -> None:
        pass

    def _unknown_files(self, commits: Mapping[int, Commit]) -> None:
        pass

    def _index(self, index: PackedIndex) -> None:
        try:
            index.check()
        except (ResiduaError, OSError) as error:
            self._problem(INDEX, str(error))
        else:
            self._count(index.n_bytes)

    def _side_files(self, commits: Mapping[int, Commit]) -> None:  # noqa: ARG002  # the metadata names all of them
        for name, digest in self.archive.metadata.files.items():
            try:
                path = self.archive.file(name, SIDECAR_FOLDERS[PurePosixPath(name).parts[0]])
                is_same = file_digest(path) == digest
            except FileNotFoundError:
                self._problem(name, "it is missing: copy the archive there again")
            except (ResiduaError, OSError) as error:
                self._problem(name, str(error))
            else:
                if is_same:
                    self._count(path.stat().st_size)
                else:
                    self._problem(name, "the file was altered (its SHA-256 differs): copy the archive there again")

    def _shard_file(self, spec: ArraySpec, commit: Commit, found: _Shard) -> None:
        """Fetch the chunks of a shard, each of which is compared with the index when it arrives."""
        n_rows = commit.rows[1] - commit.rows[0]
        first, n_chunks = commit.shard * spec.chunks_per_shard, -(-n_rows // spec.rows_per_chunk)
        step = max(1, _STEP_BYTES // (spec.chunk_bytes + 1))
        for start in range(first, first + n_chunks, step):
            numbers = range(start, min(start + step, first + n_chunks))
            try:
                self._chunks.fetch(spec, self.archive.n_rows, numbers)
            except (ResiduaError, OSError) as error:
                found.problems.append((str(shard_path(Path(), spec, commit.shard)), str(error)))
                return
        found.n_files += 1
        found.n_bytes += commit.arrays[spec.key].n_bytes
        found.n_chunks += n_chunks

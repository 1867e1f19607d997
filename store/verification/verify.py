"""Verification: reads everything in an archive again and names what is damaged.

It compares every chunk with its crc32c, every shard file with its commit, every sidecar file with the SHA-256 in the
metadata, and the row columns with the example table, so that rows and texts belong together. Of an archive at an
address, all of it comes over the network, and nothing from a cache; the copies of the arrays' metadata in the root were
compared when it was opened, and what else is at the address is not looked for.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from residua.store.base.errors import PlanError, ResiduaError, StorageError
from residua.store.base.naming import named
from residua.store.base.untrusted import check_inside
from residua.store.format.archive_metadata import ROOT
from residua.store.format.stacks import stacks_in
from residua.store.read.archive import Archive
from residua.store.read.mapped import cpu_threads
from residua.store.read.remote_archive import RemoteArchive
from residua.store.read.stacks import StackedArchive, open_archive
from residua.store.storage.address import is_remote
from residua.store.verification.checkpoint import Checkpoint, Results
from residua.store.verification.files import (
    check_complete,
    check_examples,
    check_fidelity,
    check_index,
    check_remote_index,
    check_remote_side_files,
    check_side_files,
    check_side_tables,
)
from residua.store.verification.metadata import check_metadata
from residua.store.verification.report import Check, Problem, Verification
from residua.store.verification.shards import Jobs, check_shards
from residua.store.verification.unknown_files import note_unknown_files


def verify(
    archive: Archive | str | PathLike[str],
    *,
    sample: int | None = None,
    threads: int | None = None,
    cluster: Jobs | None = None,
    checkpoint: str | Path | None = None,
    storage_options: Mapping[str, Any] | None = None,
    on_shard: Callable[[int, int], None] = lambda *_: None,
) -> Verification:
    """Re-hash everything in an archive.

    Args:
        archive: The archive, or its path or address.
        sample: Check only that many shards, chosen at random; everything beside the shards is checked.
        threads: Threads that share the shards; by default the processor's, up to four.
        cluster: A cluster of `residua.analysis.connect`, whose workers share the shards instead. They open the archive
            where they run.
        checkpoint: A file, outside the archive, that is written every few seconds and when the verification is stopped,
            and removed at the end. A verification that finds it goes on after the shards that were checked already.
        storage_options: For an address, as for `residua.open`.
        on_shard: Called after each shard, with the number done and the total. One that goes on counts what was done.

    Returns:
        The problems found; damage raises nothing.

    Raises:
        FileNotFoundError: There is no archive at that place.
        PlanError: `sample` or `threads` is too small.
        StorageError: An address cannot be read.
        AnalysisError: A worker of the cluster failed.
        OSError: The checkpoint cannot be written.

    Example:
        >>> residua.verify("s3://bucket/acts.zarr").is_sound  # doctest: +SKIP
        True
    """
    for name, value, least in (("sample", sample, 0), ("threads", threads, 1)):
        if value is not None and value < least:
            raise PlanError(f"{named(name, value)}: it must be at least {least}")
    if isinstance(archive, Archive):
        if isinstance(archive, RemoteArchive):
            storage_options = archive.options["storage_options"]
        archive = archive.place
    shards = _Shards(sample=sample, threads=threads or cpu_threads(), cluster=cluster, on_shard=on_shard)
    saved = None if checkpoint is None or sample is not None else Path(checkpoint)
    if is_remote(archive):
        return _verify_remote(fspath(archive), storage_options, shards, saved)
    folder = Path(archive)
    try:
        stacks = stacks_in(folder)
    except (ResiduaError, ValueError):
        stacks = ()  # `Archive` says what is wrong
    if stacks:
        return _verify_stacks(folder, stacks, shards)
    return _verify_folder(folder, shards, saved)


class _Shards:
    """How the shards of an archive are checked."""

    def __init__(
        self, *, sample: int | None, threads: int, cluster: Jobs | None, on_shard: Callable[[int, int], None]
    ) -> None:
        self._sample, self._threads, self._cluster, self._on_shard = sample, threads, cluster, on_shard

    def check(self, check: Check, *, examples: bool, checkpoint: Path | None) -> None:
        """Check the shards of an archive, or a sample of them; see `verify`."""
        shards = sorted(check.archive.commits)
        if self._sample is not None and self._sample < len(shards):
            n = self._sample
            check.report.notes.append(f"{n:,} of {len(shards):,} shards were checked, chosen at random")
            shards = sorted(random.SystemRandom().sample(shards, n))
        saved = None if checkpoint is None else Checkpoint(path=checkpoint, archive=check.root)
        results = Results() if saved is None else Results.from_json(saved.state)
        if results.n_shards:
            self._on_shard(results.n_shards, len(shards))
        found = check_shards(
            check.archive,
            shards[results.n_shards :],
            examples=examples,
            threads=self._threads,
            cluster=self._cluster,
        )
        with nullcontext() if saved is None else saved:
            for findings in found:
                results.add(findings)
                self._on_shard(results.n_shards, len(shards))
                if saved is not None:
                    saved.save(results.to_json())
        for path, what in results.problems:
            check.problem(path, what)
        check.report.n_files += results.n_files
        check.report.n_chunks += results.n_chunks
        check.report.n_bytes += results.n_bytes


def _verify_folder(folder: Path, shards: _Shards, checkpoint: Path | None) -> Verification:
    """Verify one archive in a folder; damage that explains other damage comes first."""
    report = Verification()
    try:
        check = Check(Archive(folder), report, {ROOT})
        commits = check.archive.commits
    except (ResiduaError, ValueError) as error:
        report.problems.append(Problem(str(folder), str(error)))
        return report
    check_metadata(check)
    check_index(check, commits)
    check_side_files(check, commits)
    check_fidelity(check)
    if is_sound := check_examples(check):
        check_side_tables(check)
    shards.check(check, examples=is_sound, checkpoint=checkpoint)
    check_complete(check, commits)
    note_unknown_files(check, commits)
    return report


def _verify_stacks(folder: Path, stacks: Sequence[str], shards: _Shards) -> Verification:
    """Verify the archive of each stack in a folder, and compare their examples."""
    report, numbers = Verification(), dict[str, int]()
    for name in stacks:
        if not (folder / name).exists():
            report.notes.append(f"the archive of {name} is not begun")
            continue
        try:
            check_inside(folder, folder / name)
            found = _verify_folder(folder / name, shards, None)
            numbers[name] = len(Archive(folder / name).example_table)
        except (ResiduaError, OSError) as error:
            report.problems.append(Problem(name, str(error)))
            continue
        _add(report, name, found)
    _compare_numbers(report, numbers)
    for path in sorted(folder.iterdir()):
        if path.name not in (ROOT, *stacks) and not path.name.startswith("."):
            report.notes.append(f"{path.name} is not part of the archive, and was not checked")
    return report


def _verify_remote(
    address: str, storage_options: Mapping[str, Any] | None, shards: _Shards, checkpoint: Path | None
) -> Verification:
    """Verify an archive at an address, or those of several stacks."""
    report = Verification()
    try:
        archive = open_archive(address, storage_options=storage_options, cache=False)
        if not isinstance(archive, StackedArchive):
            archive.commits  # noqa: B018  # damage of records is found here
    except StorageError:
        raise
    except (ResiduaError, ValueError) as error:
        report.problems.append(Problem(address, str(error)))
        return report
    if not isinstance(archive, StackedArchive):
        return _verify_opened(archive, shards, checkpoint)
    for name, one in archive.stacks.items():
        _add(report, name, _verify_opened(one, shards, None))
    _compare_numbers(report, {name: len(one.example_table) for name, one in archive.stacks.items()})
    return report


def _verify_opened(archive: Archive, shards: _Shards, checkpoint: Path | None) -> Verification:
    """Verify one archive at an address."""
    check = Check(archive, Verification())
    check_remote_index(check, archive.commits)
    check_remote_side_files(check)
    if is_sound := check_examples(check):
        check_side_tables(check)
    shards.check(check, examples=is_sound, checkpoint=checkpoint)
    check_complete(check, archive.commits)
    return check.report


def _add(report: Verification, name: str, found: Verification) -> None:
    """Add what was found in one of several archives."""
    report.problems += [replace(problem, path=f"{name}/{problem.path}") for problem in found.problems]
    report.notes += [f"{name}: {note}" for note in found.notes]
    report.n_files += found.n_files
    report.n_chunks += found.n_chunks
    report.n_bytes += found.n_bytes


def _compare_numbers(report: Verification, numbers: Mapping[str, int]) -> None:
    if len(set(numbers.values())) > 1:
        report.problems.append(Problem(".", f"the stacks have different numbers of examples: {dict(numbers)}"))

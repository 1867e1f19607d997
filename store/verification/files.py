"""What stands beside the shards: index and records, examples, tokenizer, LM head, fidelity figures, side tables."""

from collections.abc import Mapping
from itertools import islice
from pathlib import PurePosixPath

from residua.store.base.errors import DamagedArchiveError, PlanError, ResiduaError, UnsafeArchiveError, few
from residua.store.base.untrusted import check_file
from residua.store.examples.side_tables import SIDE_TABLES
from residua.store.format.archive_metadata import SIDECAR_FOLDERS, file_digest
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
from residua.store.sealing.packed_index import INDEX, REBUILD, PackedIndex
from residua.store.verification.report import Check

_MAX_LISTED = 8


def check_index(check: Check, commits: Mapping[int, Commit]) -> None:
    """Check the packed index, if the archive names one, and compare the records that are there with it."""
    check.known.add(INDEX)
    if not isinstance(commits, PackedIndex):
        if check.archive.metadata.index is not None:
            check.problem(INDEX, f"it is missing, so that the records were read: {REBUILD}")
        return
    if _is_sound(check, commits):
        _compare_records(check, commits)


def _compare_records(check: Check, index: PackedIndex) -> None:
    """Compare the records that are there with a sound index."""
    recorded = committed_shards(check.root)
    for shard in sorted(recorded):
        name = f"{FOLDER}/{record_name(shard)}"
        try:
            if shard not in index:
                raise DamagedArchiveError("the archive has no such shard: remove the record")
            record = read_commit(check.root, check.archive.plan, shard, check.archive.n_rows)
            if not same_files(record, index[shard]):
                raise DamagedArchiveError(f"the record and {INDEX} differ: restore both from a copy")
        except (DamagedArchiveError, UnsafeArchiveError) as error:
            check.problem(name, str(error))
    if missing := len(index) - len(recorded):
        check.report.notes.append(
            f"{missing:,} of {len(index):,} records are missing in {FOLDER}/; {INDEX} says what they did"
        )


def check_remote_index(check: Check, commits: Mapping[int, Commit]) -> None:
    """Check the packed index of an archive at an address, whose records are not there."""
    if isinstance(commits, PackedIndex):
        _is_sound(check, commits)


def _is_sound(check: Check, index: PackedIndex) -> bool:
    try:
        index.check()
    except (ResiduaError, OSError) as error:
        check.problem(INDEX, str(error))
        return False
    check.count(index.n_bytes)
    return True


def check_side_files(check: Check, commits: Mapping[int, Commit]) -> None:
    """Compare examples, tokenizer and LM head with the SHA-256 that the metadata and the records name."""
    named = {} if isinstance(commits, PackedIndex) else named_example_files(commits)
    for name, digest in {**check.archive.metadata.files, **named}.items():
        path = check.root / name
        check.known.add(name)
        try:
            check_file(check.root, path, SIDECAR_FOLDERS[PurePosixPath(name).parts[0]])
        except (DamagedArchiveError, UnsafeArchiveError) as error:
            check.problem(name, str(error))
            continue
        if file_digest(path) != digest:
            check.problem(name, "the file was altered (its SHA-256 differs): restore it from a copy")
        else:
            check.count(path.stat().st_size)


def check_remote_side_files(check: Check) -> None:
    """Fetch examples, tokenizer and LM head of an archive at an address, whose metadata name all of them."""
    for name, digest in check.archive.metadata.files.items():
        try:
            path = check.archive.file(name, SIDECAR_FOLDERS[PurePosixPath(name).parts[0]])
            is_same = file_digest(path) == digest
        except FileNotFoundError:
            check.problem(name, "it is missing: copy the archive there again")
        except (ResiduaError, OSError) as error:
            check.problem(name, str(error))
        else:
            if is_same:
                check.count(path.stat().st_size)
            else:
                check.problem(name, "the file was altered (its SHA-256 differs): copy the archive there again")


def check_fidelity(check: Check) -> None:
    """Check the figures that `residua fidelity` left in a folder, if there are any."""
    path = check.root / FIDELITY_FILE
    if not path.exists():
        return
    check.known.add(FIDELITY_FILE)
    try:
        read_fidelity(check.root, check.archive.plan)
    except (DamagedArchiveError, UnsafeArchiveError, PlanError) as error:
        check.problem(path, str(error))
    else:
        check.count(path.stat().st_size)


def check_examples(check: Check) -> bool:
    """Check the example table; return whether its content is sound."""
    try:
        table = check.archive.example_table
        table.verify()
    except (ResiduaError, OSError) as error:
        check.problem("examples", str(error))
        return False
    return True


def check_side_tables(check: Check) -> None:
    """Check the side tables of sound examples: what names them, and the file of each part of the examples."""
    check.known.add(SIDE_TABLES)
    try:
        side = check.archive.example_table.side
    except (ResiduaError, OSError) as error:
        check.problem(SIDE_TABLES, str(error))
        return
    for each in side:
        for part, name in enumerate(each.table.paths()):
            check.known.add(name)
            try:
                each.read(part, list(each.types))
            except (ResiduaError, OSError) as error:
                check.problem(name, str(error))
            else:
                check.count((check.root / name).stat().st_size)


def check_complete(check: Check, commits: Mapping[int, Commit]) -> None:
    """Name what is missing of a sealed archive; note how far another one is."""
    archive, notes = check.archive, check.report.notes
    if archive.metadata.sealed is not None:
        _name_missing(check, commits)
        if absent := archive.absent_sites:
            notes.append(f"this copy has no rows of {few(absent)}: their folders are not there")
    elif not archive.is_sealed:
        rows, total, *_ = archive.progress
        of = "" if total is None else f" of {total:,}"
        notes.append(f"the archive is not sealed: {rows:,}{of} rows are captured")


def _name_missing(check: Check, commits: Mapping[int, Commit]) -> None:
    """Name the first missing records. Their number comes from the metadata, which may claim anything."""
    n_shards = check.archive.plan.n_shards(check.archive.n_rows)
    for shard in islice((shard for shard in range(n_shards) if shard not in commits), _MAX_LISTED):
        check.problem(f"{FOLDER}/{shard:08d}-0000.json", "the record is missing: restore it from a copy")
    n_more = n_shards - len(commits) - _MAX_LISTED
    if n_more > 0:
        check.problem(FOLDER, f"{n_more:,} more records are missing: restore them from a copy")

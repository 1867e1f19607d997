"""Files in an archive's folder that the archive does not name: leftovers of killed runs, and what others put there."""

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from residua.store.base.errors import UnsafeArchiveError
from residua.store.base.untrusted import check_inside
from residua.store.encoding.shard import shard_path
from residua.store.format.archive_metadata import ROOT
from residua.store.format.commits import FOLDER, Commit, record_name
from residua.store.verification.report import Check

_MAX_LISTED = 8


def note_unknown_files(check: Check, commits: Mapping[int, Commit]) -> None:
    """Name files without a record in notes, for they are no damage; a link that leads out of the archive is."""
    specs = [spec for array in check.archive.arrays for spec in array.file_specs]
    places = {shard_path(Path(), spec, 0).as_posix() for spec in specs}
    others: list[str] = []
    for folder, names, files in os.walk(check.root):
        names.sort()
        linked = [name for name in names if Path(folder, name).is_symlink()]
        for path in (Path(folder, name) for name in [*linked, *sorted(files)]):
            name = path.relative_to(check.root).as_posix()
            if path.name in linked and _is_inside(check, path) and path.is_dir():
                continue
            if name not in check.known and not _is_known(name, places, commits):
                _note(check, name, others)
    check.report.notes += [f"{name} is not part of the archive, and was not checked" for name in others[:_MAX_LISTED]]
    if len(others) > _MAX_LISTED:
        check.report.notes.append(f"{len(others) - _MAX_LISTED:,} more files are not part of the archive")


def _is_known(name: str, places: set[str], commits: Mapping[int, Commit]) -> bool:
    """Say whether a name is that of a shard or a record, without a list of all of them, which may be millions."""
    if name in places:
        return True
    folder, _, file = name.partition("/")
    if folder == FOLDER:
        number = file.partition("-")[0]
        return number.isdecimal() and int(number) in commits and file == record_name(int(number))
    array, _, place = name.partition("/c/")
    number, *across = place.split("/")
    is_shard = number.isdecimal() and number == str(int(number)) and int(number) in commits
    return is_shard and f"{array}/c/0{''.join(f'/{part}' for part in across)}" in places


def _note(check: Check, name: str, others: list[str]) -> None:
    archive, notes = check.archive, check.report.notes
    is_growing = archive.plan.n_rows is None and archive.metadata.sealed is None  # a user's own loop, open or failed
    if name.endswith(".tmp"):
        notes.append(f"{name} is a temporary file of a killed run; the next run removes it")
    elif any(name.startswith(f"{spec.path}/c/") for spec in archive.arrays):
        notes.append(f"{name} belongs to a shard without a commit; it will be written again")
    elif is_growing and name.startswith("examples/part-"):
        notes.append(f"{name} holds examples whose shard was not committed")
    elif PurePosixPath(name).name != ROOT:
        others.append(name)


def _is_inside(check: Check, path: Path) -> bool:
    """Return whether `path` lies inside the archive; report the problem if a link leads out."""
    try:
        check_inside(check.root, path)
    except UnsafeArchiveError as error:
        check.problem(path, str(error))
        return False
    return True

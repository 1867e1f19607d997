"""Sites of a second archive of the same rows put into an archive, without copying a shard.

The joined archive is made next to the old one: its shards are hard links, its records and its packed index are made
again, because they name the plan, and the plan names the sites. Then it takes the old one's place by two renames. Until
the first of them nothing has changed; after a crash between them the next run takes back the first.

In a bucket, which has no links and no renames, the new shards are copied next to the old ones, where nothing names them
yet. The new metadata are made next to the archive and then take the place of the old ones, the root last; after a crash
in between the next run goes on with them.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from residua.store.base.errors import PlanError
from residua.store.format.archive_metadata import ROOT, SIDECAR_FOLDERS, notes_in, read_metadata
from residua.store.format.commits import FOLDER, Commit, publish_commit
from residua.store.format.create import create_archive, workspace
from residua.store.format.plan import Plan
from residua.store.read.archive import Archive
from residua.store.read.remote_archive import RemoteArchive
from residua.store.read.stacks import open_archive
from residua.store.sealing.packed_index import INDEX
from residua.store.sealing.seal import seal
from residua.store.storage.destination import BucketFolder, Destination, DiskFolder
from residua.store.storage.files import sync_folder
from residua.store.storage.objects import ObjectFolder, in_parallel

_JOINED = "joined"
ADDED = "added_sites"
"""Entry of the provenance: for each addition, its sites and how they were captured."""


def refuse_other_rows(archive: Archive, plan: Plan, place: str) -> None:
    """Raise PlanError unless a plan has other sites of the same rows as an archive.

    Args:
        archive: The archive.
        plan: The plan of the sites to add.
        place: What has that plan, for the message.
    """
    known = {site.name for site in archive.plan.sites}
    if again := [site.name for site in plan.sites if site.name in known]:
        raise PlanError(f"{archive.place} has {again[0]} already: name only sites that it lacks")
    if other := replace(plan, sites=archive.plan.sites).differences(archive.plan):
        raise PlanError(
            f"sites cannot be added to {archive.place}, for {place} differs from how it was captured: "
            f"{'; '.join(other)}. Use the same model, data and settings"
        )


def join_sites(archive: Archive, added: Archive) -> Archive:
    """Put the sites of `added` into `archive`; `added` stays as it is.

    Returns:
        The archive, opened again.

    Raises:
        PlanError: The rows are not the same, or a site is in both.
        NotCapturedError: One of them is not finished.
        OSError: The place cannot be written, or has no hard links.
    """
    refuse_other_rows(archive, added.plan, added.place)
    if archive.metadata.sealed != added.metadata.sealed:  # of plans that grow, which say how the examples begin
        raise PlanError(f"{added.place} has other examples than {archive.place}: capture the same data")
    for each in (archive, added):
        each.require_captured(range(each.n_rows))
    if isinstance(archive, RemoteArchive) and isinstance(added, RemoteArchive):
        _join_objects(archive, added)
        return open_archive(archive.place, storage_options=archive.storage_options)
    out = archive.path
    joined = _beside(out, "joined")
    shutil.rmtree(joined, ignore_errors=True)
    with workspace(joined) as folder:
        _link(out, folder)
        _create(archive, added, folder, joined)
    _link(added.path / "sites", joined / "sites")
    _publish(archive, added, joined)
    seal(joined, read_metadata(joined), archive.metadata.sealed)
    before = _beside(out, "before")
    out.rename(before)
    joined.rename(out)
    sync_folder(out.parent)
    shutil.rmtree(before)
    return Archive(out)


def place_beside(out: Destination) -> str | Path:
    """Return the path or address of the hidden folder next to an archive in which its new sites are captured."""
    return _beside(out.path, "adding") if isinstance(out, DiskFolder) else _address_beside(out.objects)


def recover(out: Destination) -> None:
    """Take back what a run that was killed between its two renames has begun; in a bucket, go on with it."""
    if isinstance(out, BucketFolder):
        _put_in_place(out.objects)
        return
    before = _beside(out.path, "before")
    if before.exists() and not out.path.exists():
        before.rename(out.path)
        sync_folder(out.path.parent)


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f".{out.name}.{what}")


def _address_beside(folder: ObjectFolder) -> str:
    parent, _, name = folder.address.rpartition("/")
    return f"{parent}/.{name}.adding"


def _create(archive: Archive, added: Archive, folder: Path, joined: Path) -> None:
    """Make the joined archive of a folder with all files of the old one but its metadata and shards."""
    plan = replace(archive.plan, sites=(*archive.plan.sites, *added.plan.sites))
    shutil.copyfile(archive.path / ROOT, folder / ROOT)  # whose attributes of other programs stay
    create_archive(folder, joined, plan, _provenance(archive, added))


def _publish(archive: Archive, added: Archive, joined: Path) -> None:
    """Write the records of the joined archive."""
    plan = read_metadata(joined).plan
    of_added = {
        files.key for site in added.plan.sites for spec in site.arrays(plan.rows_per_shard) for files in spec.file_specs
    }
    for shard in range(plan.n_shards(archive.n_rows)):
        new = {key: file for key, file in added.commits[shard].arrays.items() if key in of_added}
        old = archive.commits[shard]
        arrays = dict(sorted({**old.arrays, **new}.items()))
        publish_commit(joined, Commit(plan=plan.digest, shard=shard, rows=old.rows, arrays=arrays))


class _JoinedMetadata(BucketFolder):
    """The metadata of a joined archive, whose shards are in another folder.

    Args:
        shards: That folder.
    """

    def __init__(self, shards: ObjectFolder) -> None:
        super().__init__(f"{_address_beside(shards)}/{_JOINED}", shards.options)
        self._shards = shards

    def n_bytes(self, name: str) -> int | None:
        return self._shards.size(name)

    def sizes(self) -> Callable[[str], int | None]:
        return {entry.name: entry.n_bytes for entry in self._shards.list()}.get


def _join_objects(archive: RemoteArchive, added: RemoteArchive) -> None:
    target = archive.folder
    _copy(added.folder, target, [entry.name for entry in added.folder.list("sites") if "/c/" in entry.name])
    joined = _JoinedMetadata(target)
    with workspace(joined.path) as folder:
        for name, sha256 in archive.metadata.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(archive.file(name, SIDECAR_FOLDERS[name.split("/")[0]], sha256), folder / name)
        _create(archive, added, folder, joined.path)
    _publish(archive, added, joined.path)
    seal(joined, read_metadata(joined.path), archive.metadata.sealed)  # its root goes last, and says that all is there
    _put_in_place(target)


def _put_in_place(target: ObjectFolder) -> None:
    """Let the joined metadata, if they are complete, take the place of those of an archive, and remove what is left."""
    adding = ObjectFolder(_address_beside(target), target.options)
    joined = ObjectFolder(f"{adding.address}/{_JOINED}", target.options)
    if joined.size(ROOT) is None:
        return
    names = {entry.name for entry in joined.list()} - {ROOT, INDEX}
    _copy(joined, target, sorted(names))
    target.delete([entry.name for entry in target.list(FOLDER)])  # of the old plan; the index has what they say
    for name in (INDEX, ROOT):
        _copy(joined, target, [name])
    adding.delete(sorted((entry.name for entry in adding.list()), key=lambda name: name != f"{_JOINED}/{ROOT}"))


def _copy(source: ObjectFolder, target: ObjectFolder, names: Sequence[str]) -> None:
    """Copy objects from one folder to another in the same bucket."""
    bucket = "/".join(target.address.split("/")[:3])
    both = ObjectFolder(bucket, target.options)
    start, end = (folder.address.removeprefix(f"{bucket}/") for folder in (source, target))
    in_parallel(lambda name: both.copy(f"{start}/{name}", f"{end}/{name}"), names)


def _link(source: Path, target: Path) -> None:
    """Link all files of a folder but those that say what the archive is: its metadata, records and index."""
    for path in source.rglob("*"):
        name = path.relative_to(source)
        if path.is_file() and path.name not in (ROOT, INDEX) and name.parts[0] != FOLDER:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target / name)


def _provenance(archive: Archive, added: Archive) -> dict[str, Any]:
    old: Mapping[str, Any] = archive.provenance
    entry = {"sites": list(added.sites), **{key: value for key, value in added.provenance.items() if key != "notes"}}
    known = old.get(ADDED)
    notes = dict.fromkeys([*notes_in(archive.provenance), *notes_in(added.provenance)])
    return {**old, ADDED: [*(known if isinstance(known, list) else []), entry], "notes": list(notes)}

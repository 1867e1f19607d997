"""Sites of a second archive of the same rows put into an archive, without copying a shard.

The joined archive is made next to the old one: its shards are hard links, its records and its packed index are made
again, because they name the plan, and the plan names the sites. Then it takes the old one's place by two renames. Until
the first of them nothing has changed; after a crash between them the next run takes back the first.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from residua.pipelines.copies.rewritten import notes_of
from residua.store.base.errors import PlanError
from residua.store.format.archive_metadata import ROOT, read_metadata
from residua.store.format.commits import FOLDER, Commit, publish_commit
from residua.store.format.create import create_archive, workspace
from residua.store.format.plan import Plan
from residua.store.read.archive import Archive
from residua.store.sealing.packed_index import INDEX
from residua.store.sealing.seal import seal
from residua.store.storage.files import sync_folder

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
    for each in (archive, added):
        each.require_captured(range(each.n_rows))
    out = archive.path
    joined = _beside(out, "joined")
    shutil.rmtree(joined, ignore_errors=True)
    plan = replace(archive.plan, sites=(*archive.plan.sites, *added.plan.sites))
    with workspace(joined) as folder:
        _link(out, folder)
        shutil.copyfile(out / ROOT, folder / ROOT)  # whose attributes of other programs stay
        create_archive(folder, joined, plan, _provenance(archive, added))
    _link(added.path / "sites", joined / "sites")
    of_added = {
        files.key for site in added.plan.sites for spec in site.arrays(plan.rows_per_shard) for files in spec.file_specs
    }
    for shard in range(plan.n_shards(archive.n_rows)):
        new = {key: file for key, file in added.commits[shard].arrays.items() if key in of_added}
        old = archive.commits[shard]
        arrays = dict(sorted({**old.arrays, **new}.items()))
        publish_commit(joined, Commit(plan=plan.digest, shard=shard, rows=old.rows, arrays=arrays))
    seal(joined, read_metadata(joined))
    before = _beside(out, "before")
    out.rename(before)
    joined.rename(out)
    sync_folder(out.parent)
    shutil.rmtree(before)
    return Archive(out)


def recover(out: Path) -> None:
    """Take back what a run that was killed between its two renames has begun."""
    before = _beside(out, "before")
    if before.exists() and not out.exists():
        before.rename(out)
        sync_folder(out.parent)


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f".{out.name}.{what}")


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
    notes = dict.fromkeys([*notes_of(archive), *notes_of(added)])
    return {**old, ADDED: [*(known if isinstance(known, list) else []), entry], "notes": list(notes)}

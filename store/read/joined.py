"""Archives of the same rows read as one: a site that was captured later, or follows a replay, beside the others."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import zarr

from residua.store.base.canonical import differences
from residua.store.base.errors import NotCapturedError, PlanError, few
from residua.store.base.untrusted import parse_json
from residua.store.encoding.spec import ArraySpec
from residua.store.examples.side_tables import SideTable
from residua.store.examples.table import ExampleTable
from residua.store.format.archive_metadata import notes_in
from residua.store.format.commits import Commit
from residua.store.format.sidecars import ATTENTION_FILE
from residua.store.read.archive import Archive, Rows
from residua.store.read.array import ArchiveArray
from residua.store.read.rows_in_shards import RowNumbers
from residua.store.sealing.packed_index import file_record


class JoinedArchive(Archive):
    """Finished archives of the same rows, with the sites of all of them; `residua.open` makes one of a list.

    Rows, examples, side tables and provenance are those of the first one. Nothing is copied.

    Args:
        archives: The archives.

    Raises:
        PlanError: They are of other examples, tokens or positions, or of another model; a site is in two of them and
            not equal; or one has several stacks.
        NotCapturedError: One is not finished.
    """

    def __init__(self, archives: Sequence[Archive]) -> None:
        first = archives[0]
        self.archives = tuple(archives)
        self.path = first.path
        self._owners: dict[str, Archive] = {}
        for archive in archives:
            _refuse_other_rows(first, archive)
            for site in archive.sites:
                owner = self._owners.setdefault(site, archive)
                if owner is not archive and not _is_same_site(owner, archive, site):
                    raise PlanError(
                        f"{site} is in {owner.place} and in {archive.place}, and is not the same there: take the sites "
                        "that you want of one of them with residua extract, or open one alone"
                    )
        sites = tuple(owner.plan.site(site) for site, owner in self._owners.items())
        self.metadata = replace(first.metadata, plan=replace(first.plan, sites=sites), provenance=self._provenance())

    def _provenance(self) -> dict[str, Any]:
        found: list[str] = []
        for archive in self.archives:
            found += notes_in(archive.provenance)
            if archive.plan.is_replay:
                own = [site for site, owner in self._owners.items() if owner is archive]
                found.append(f"the rows of {few(own)} follow a replay: the provenance of {archive.place} says which")
        return {**self.archives[0].provenance, "joined": [one.place for one in self.archives], "notes": found}

    def __reduce__(self) -> tuple[object, ...]:
        return JoinedArchive, (self.archives,)

    def __fspath__(self) -> str:
        self._refuse("a path or an address")

    def _refuse(self, what: str) -> NoReturn:
        raise PlanError(f"{self.place} are several archives, and {what} belongs to one: name one of them")

    @property
    def place(self) -> str:
        """Where the archives are."""
        return " + ".join(archive.place for archive in self.archives)

    @property
    def is_remote(self) -> bool:
        """Whether one of them is at an address."""
        return any(archive.is_remote for archive in self.archives)

    @cached_property
    def absent_sites(self) -> tuple[str, ...]:
        """None: sites that a copy lacks are not among those of the archives."""
        return ()

    @cached_property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """The stored arrays: the columns of the rows of the first archive, and those of all sites."""
        found = {spec.path: spec for archive in self.archives[::-1] for spec in archive.arrays}
        return tuple(found.values())

    @cached_property
    def commits(self) -> Mapping[int, Commit]:
        """The commits of the first archive."""
        return self.archives[0].commits

    @property
    def n_rows(self) -> int:
        """Rows of each archive."""
        return self.archives[0].n_rows

    @cached_property
    def _arrays(self) -> dict[str, ArchiveArray]:
        return {site: owner[site] for site, owner in self._owners.items()}

    @cached_property
    def rows(self) -> Rows:
        """Token, position and example of every row."""
        return self.archives[0].rows

    @property
    def example_table(self) -> ExampleTable:
        """The example table."""
        return self.archives[0].example_table

    def refuse_losses(self, sites: Iterable[str], job: str) -> None:
        """Raise PlanError if the stored rows of one of `sites` lack finite values that the model had."""
        for site in sites:
            self._owners[site].refuse_losses([site], job)

    def require_captured(self, rows: range | RowNumbers) -> None:
        """Raise DamagedArchiveError unless every one of `rows` lies in a committed shard of each archive."""
        for archive in self.archives:
            archive.require_captured(rows)

    def annotate(self, table: Any, **settings: Any) -> SideTable:
        """Keep a side table in the first archive; see `Archive.annotate`."""
        return self.archives[0].annotate(table, **settings)

    def remove_annotations(self, name: str) -> None:
        """Remove a side table of the first archive."""
        self.archives[0].remove_annotations(name)

    def side_file(self, name: str) -> bytes | None:
        """Return a sidecar file of the first archive that has it; of the attention, what all of them say."""
        found = [content for archive in self.archives if (content := archive.side_file(name)) is not None]
        if name != f"head/{ATTENTION_FILE}" or len(found) < 2:
            return found[0] if found else None
        layers: dict[str, Any] = {}
        for content in found[::-1]:
            said: Any = parse_json(content)
            layers |= said if isinstance(said, dict) else {}
        return json.dumps(layers).encode()

    def file(self, name: str, most_bytes: int, sha256: str | None = None) -> Path:
        """Return where a file of the first archive is on this machine."""
        return self.archives[0].file(name, most_bytes, sha256)

    @property
    def head(self) -> Path:
        """The folder of the LM head of the first archive that has one; there may be none."""
        has_head = [one for one in self.archives if any(name.startswith("head/") for name in one.metadata.files)]
        return (has_head or self.archives)[0].head

    @property
    def group(self) -> zarr.Group:
        """Refused: a Zarr group belongs to one archive."""
        self._refuse("a Zarr group")


def _refuse_other_rows(first: Archive, other: Archive) -> None:
    """Raise PlanError unless two archives are of the same rows; an archive is of its own."""
    for archive in (first, other):
        if archive.stacks:
            raise PlanError(
                f"{archive.place} holds {' and '.join(archive.stacks)}, each with rows of its own: name one of them, "
                f"such as {archive.place}/{next(iter(archive.stacks))}"
            )
    if not other.is_sealed:
        raise NotCapturedError(
            f"{other.place} is not finished, or has lost shards, and only finished archives are read as one: finish or "
            "restore it, or open the others alone"
        )
    found = differences(_rows_of(first), _rows_of(other), (first.place, other.place))
    if found:
        raise PlanError(
            f"{first.place} and {other.place} are not of the same rows, and cannot be opened as one: {'; '.join(found)}"
        )


def _rows_of(archive: Archive) -> Mapping[str, Any]:
    """Return what archives of the same rows have in common."""
    source = archive.metadata.sealed or archive.plan.dataset
    return {
        "rows": archive.n_rows,
        "examples (digest of tokens and positions)": source.get("examples", source.get("digest")),
        "model": archive.plan.model,
    }


def _is_same_site(one: Archive, other: Archive, site: str) -> bool:
    """Say whether a site is stored alike, with equal digests of all shards."""
    mine, theirs = one.plan, other.plan
    if mine.site(site) != theirs.site(site) or mine.rows_per_shard != theirs.rows_per_shard:
        return False
    keys = [files.key for spec in mine.site(site).arrays(mine.rows_per_shard) for files in spec.file_specs]
    return all(
        file_record(one.commits, key, shard).digest == file_record(other.commits, key, shard).digest
        for shard in one.commits
        for key in keys
    )

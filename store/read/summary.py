"""The contents of an archive in numbers, for `residua info` and as JSON."""

from dataclasses import asdict, dataclass
from typing import Any

from residua.store.encoding.codecs import PRESETS
from residua.store.format.archive_metadata import notes_in
from residua.store.format.sidecars import (
    FIDELITY_FILE,
    MAX_FIDELITY_BYTES,
    PARAMETERS_FILE,
    SiteFidelity,
    read_fidelity,
)
from residua.store.read.archive import Archive
from residua.store.sealing.losses import cast_from, loss_notes, losses_of
from residua.store.sealing.packed_index import file_totals
from residua.store.sealing.seal import relative_error


@dataclass(frozen=True, kw_only=True)
class SiteSummary:
    """One site of an archive.

    Attributes:
        name: The site.
        shape: (rows, *row shape).
        dtype: Data type that a reader gets.
        codec: Codec preset.
        logical_bytes: Bytes of the captured rows as readers get them.
        stored_bytes: Bytes of their shard files.
        n_nonfinite: NaN and infinite values that the model itself had.
        n_overflowed: Finite values that the cast to `dtype` made infinite.
        n_spoiled: Finite values that a lossy codec made NaN or infinite.
        cast_from: Data type that the model computed, if `dtype` cannot hold all of its values; None if it can.
        relative_rms_error: Measured error of a lossy preset; None for a lossless one.
        fidelity: Effect of that error on the model, if `residua fidelity` has measured it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    codec: str
    logical_bytes: int
    stored_bytes: int
    n_nonfinite: int
    n_overflowed: int
    n_spoiled: int
    cast_from: str | None
    relative_rms_error: float | None
    fidelity: SiteFidelity | None

    @property
    def ratio(self) -> float:
        """Logical over stored bytes; 1 while nothing is captured."""
        return self.logical_bytes / self.stored_bytes if self.stored_bytes else 1.0


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One archive; see `SiteSummary` for its sites.

    Attributes:
        path: Folder or address of the archive.
        digest: Digest of the plan.
        rows: Captured rows.
        total_rows: Rows of the sealed archive; None while a user's own loop is still open.
        shards: Captured shards.
        total_shards: Shards of the sealed archive; None while a user's own loop is still open.
        n_examples: Examples.
        n_tokens: Tokens of the examples.
        columns: Columns of the example table besides its own, those of side tables included.
        side_tables: Columns of each side table, by its name.
        sealed: Whether every shard is captured.
        finished: Whether the capture was finished once; if it was and the archive is not sealed, shards are lost.
        rows_per_shard: Rows of a shard.
        sites: The sites.
        logical_bytes: Bytes of all captured rows, without the row columns.
        stored_bytes: Bytes of all shard files, with the row columns.
        has_head: Whether the archive has the model's final norm and unembedding.
        provenance: Sources of model, data and numbers.
        notes: What a reader of the numbers should know, one sentence each.
    """

    path: str
    digest: str
    rows: int
    total_rows: int | None
    shards: int
    total_shards: int | None
    n_examples: int
    n_tokens: int
    columns: tuple[str, ...]
    side_tables: dict[str, tuple[str, ...]]
    sealed: bool
    finished: bool
    rows_per_shard: int
    sites: tuple[SiteSummary, ...]
    logical_bytes: int
    stored_bytes: int
    has_head: bool
    provenance: dict[str, Any]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the summary as JSON values, with each site's ratio."""
        sites = [{**asdict(site), "ratio": site.ratio} for site in self.sites]
        return {**asdict(self), "sites": sites, "ratio": self.ratio}

    @property
    def ratio(self) -> float:
        """Logical over stored bytes of the archive; 1 while nothing is captured."""
        return self.logical_bytes / self.stored_bytes if self.stored_bytes else 1.0


def summarise(archive: Archive) -> Summary:
    """Summarise an archive from its metadata and commits; no activation is read."""
    progress = archive.progress
    archive.file(FIDELITY_FILE, MAX_FIDELITY_BYTES)
    measured = read_fidelity(archive.path, archive.plan)
    fidelity = {} if measured is None else measured.sites
    sites = tuple(_site(archive, name, fidelity.get(name)) for name in archive.sites)
    index = archive.example_table.index()
    return Summary(
        path=archive.place,
        digest=archive.plan.digest,
        rows=progress.rows,
        total_rows=progress.total_rows,
        shards=progress.shards,
        total_shards=progress.total_shards,
        n_examples=index.n_examples,
        n_tokens=index.total_tokens,
        columns=tuple(archive.example_table.column_types()),
        side_tables={table.name: tuple(table.columns) for table in archive.side_tables},
        sealed=archive.is_sealed,
        finished=archive.was_finished,
        rows_per_shard=archive.plan.rows_per_shard,
        sites=sites,
        logical_bytes=sum(site.logical_bytes for site in sites),
        stored_bytes=sum(file_totals(archive.commits, key).n_bytes for key in archive.plan.file_keys),
        has_head=f"head/{PARAMETERS_FILE}" in archive.metadata.files,
        provenance=dict(archive.provenance),
        notes=_notes(archive),
    )


def _notes(archive: Archive) -> tuple[str, ...]:
    """Return the notes of the provenance, of side tables, and on lost values, which are known while it grows."""
    side = [note for table in archive.side_tables for note in table.notes]
    return tuple(dict.fromkeys([*notes_in(archive.provenance), *loss_notes(archive.plan, archive.commits), *side]))


def _site(archive: Archive, name: str, fidelity: SiteFidelity | None) -> SiteSummary:
    site = archive.plan.site(name)
    keys = [spec.key for array in site.arrays(archive.plan.rows_per_shard) for spec in array.file_specs]
    losses = losses_of(site, archive.commits)
    lossy = not PRESETS[site.codec].is_lossless and len(archive.commits) > 0
    return SiteSummary(
        name=name,
        shape=(archive.n_rows, *site.row_shape),
        dtype=site.dtype,
        codec=site.codec,
        logical_bytes=archive.progress.rows * site.row_bytes,
        stored_bytes=sum(file_totals(archive.commits, key).n_bytes for key in keys),
        n_nonfinite=losses.n_nonfinite,
        n_overflowed=losses.n_overflowed,
        n_spoiled=losses.n_spoiled,
        cast_from=cast_from(site, archive.plan, archive.provenance),
        relative_rms_error=relative_error(site, archive.commits) if lossy else None,
        fidelity=fidelity,
    )

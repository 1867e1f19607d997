"""A subset of an archive as a new archive: some examples, some of their rows, some sites.

Rows keep their values bit for bit, their tokens and their positions; examples keep all their tokens and columns, and
`source_example` is their number in the archive that they come from. The plan says what was taken from which archive. It
forms no batches, since the examples that ran together may have been taken apart.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from residua.pipelines.copies.rewritten import (
    SOURCE_EXAMPLE,
    Numbers,
    Planned,
    copy_sidecars,
    lossy_note,
    refuse_inexact,
    stored_rows,
    write_archive,
)
from residua.store.base.canonical import Json, digest_of
from residua.store.base.errors import PlanError
from residua.store.examples.index import Example, dataset_entry
from residua.store.examples.writer import ExampleWriter
from residua.store.format.archive_metadata import notes_in
from residua.store.format.plan import Plan
from residua.store.format.writer import FilledShard
from residua.store.read.archive import Archive
from residua.store.read.stacks import open_source
from residua.store.selection.examples import ExampleChoice
from residua.store.selection.row_filter import RowFilter

EXTRACTED = "extracted"
"""Entry of the plan's `rules` (digest of what was taken) and of the provenance (its description)."""


def extract(
    archive: Archive | str | PathLike[str],
    out: str | PathLike[str],
    *,
    examples: Sequence[int] | None = None,
    rows: str | None = None,
    sites: str | Iterable[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    on_row: Callable[[int, int], None] = lambda *_: None,
) -> Archive:
    """Write some examples, rows and sites of an archive into a new one.

    Args:
        archive: The archive, or its folder or address.
        out: Folder of the new archive, or its address in a bucket; one that was stopped goes on.
        examples: Numbers of the examples; all by default.
        rows: A condition on rows, for example ``position > 0``; only rows that meet it are kept, and only examples
            with such a row. All rows by default.
        sites: Sites; all by default.
        storage_options: For addresses, as for `residua.open`; of `out` alone, if their services differ.
        on_row: Called as rows are written, with the number done and the total.

    Returns:
        The new archive.

    Example:
        >>> residua.extract("acts.zarr", "part.zarr", rows="position == 0")  # doctest: +SKIP

    Raises:
        PlanError: A site cannot be copied exactly, the archive has images, or nothing is left.
        UnknownSiteError: `sites` matches no stored site.
        NotCapturedError: The archive is not finished.
        FileExistsError: `out` exists.
        OSError: `out` cannot be written.
    """
    source = open_source(archive, out, storage_options)
    if sites is not None:
        source = source.of_sites(sites)
    names = source.sites if sites is None else source.select(sites)
    refuse_inexact(source, names)
    kept = _kept_rows(source, examples, rows)

    def plan(folder: Path) -> Planned:
        index = _write_examples(source, kept, folder / "examples")
        copy_sidecars(source, folder)
        taken: dict[str, Json] = {
            "archive": source.plan.digest,
            "examples": None if examples is None else len(set(examples)),
            "rows": rows,
            "sites": list(names),
        }
        planned = replace(
            source.plan,
            dataset={**index, "longest_example": source.plan.dataset.get("longest_example", index["longest_example"])},
            rules={**source.plan.rules, EXTRACTED: digest_of({**taken, "kept": digest_of(kept.tolist())})},
            sites=tuple(source.plan.site(name) for name in names),
            batch_tokens=0,
            n_rows=len(kept),
        )
        provenance: dict[str, Any] = {**source.provenance, EXTRACTED: {**taken, "path": source.place}}
        taken_from = f"these rows were taken from another archive, of plan {source.plan.digest[:12]}"
        notes = [*notes_in(source.provenance), taken_from, *filter(None, [lossy_note(source, names)])]
        return Planned(planned, {**provenance, "notes": notes})

    return write_archive(out, storage_options, plan, partial(_shards, source, kept, on_row))


def _kept_rows(source: Archive, examples: Sequence[int] | None, rows: str | None) -> Numbers:
    """Return the rows to keep, ascending."""
    first_row = source.example_table.index().first_row
    kept = np.arange(source.n_rows) if rows is None else RowFilter.parse(rows).rows(source)
    if examples is not None:
        chosen = ExampleChoice(examples=examples).of(source)
        kept = kept[chosen[np.searchsorted(first_row, kept, side="right") - 1]]
    if not len(kept):
        raise PlanError("no row is left: choose other examples, or another condition")
    return kept


def _write_examples(source: Archive, kept: Numbers, folder: Path) -> dict[str, Json]:
    table, index = source.example_table, source.example_table.index()
    owner = np.searchsorted(index.first_row, kept, side="right") - 1
    numbers, starts = np.unique(owner, return_index=True)
    rows_of = np.split(kept - index.first_row[owner], starts[1:])
    writer = ExampleWriter(folder)
    for (number, columns), local in zip(table.own_columns(numbers), rows_of, strict=True):
        tokens, positions = table.tokens(number), table.positions(number)
        columns = {**columns, SOURCE_EXAMPLE: columns.get(SOURCE_EXAMPLE, number)}
        writer.add(Example(input_ids=tokens, positions=positions[local], columns=columns))
    return dataset_entry(writer.close())


def _shards(
    source: Archive, kept: Numbers, on_row: Callable[[int, int], None], plan: Plan, done: Collection[int]
) -> Iterator[FilledShard]:
    """Yield the shards that are not done, one at a time: memory holds it, and those that are being written."""
    examples = np.searchsorted(source.example_table.index().first_row, kept, side="right") - 1
    _, number = np.unique(examples, return_inverse=True)
    for shard in range(plan.n_shards(len(kept))):
        rows = slice(shard * plan.rows_per_shard, min((shard + 1) * plan.rows_per_shard, len(kept)))
        if shard not in done:
            yield FilledShard(
                index=shard,
                first_row=rows.start,
                sites={site.name: stored_rows(source, site, kept[rows]) for site in plan.sites},
                columns={
                    "token": source.rows.token[kept[rows]],
                    "position": source.rows.position[kept[rows]],
                    "example": number[rows].astype(np.int64),
                },
            )
        on_row(rows.stop, len(kept))

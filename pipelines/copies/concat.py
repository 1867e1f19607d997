"""Archives of the same model and sites over several datasets, joined into a new archive.

Rows keep their values bit for bit, their tokens and positions, and examples their columns. `source_archive` is the
number of the archive that an example is from, in the order in which they were given, and `source_example` its number
there. The provenance has one entry for each archive. The plan forms no batches, since examples of several archives
would share some.

Memory stays at a shard of every site, and those that are being written.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

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
from residua.store.base.canonical import Json, differences, digest_of
from residua.store.base.errors import PlanError
from residua.store.examples.index import Example, dataset_entry
from residua.store.examples.writer import ExampleWriter
from residua.store.format.archive_metadata import notes_in
from residua.store.format.plan import REPLAY_RULE, STACK_RULE, Plan
from residua.store.format.writer import FilledShard
from residua.store.read.archive import Archive
from residua.store.read.stacks import open_source

SOURCE_ARCHIVE = "source_archive"
"""Column of the example table: the number of the archive that each example is from."""

CONCATENATED = "concatenated"
"""Entry of the plan's `rules` (digest of what was joined) and of the provenance (one entry for each archive)."""


def concat(
    archives: Sequence[Archive | str | PathLike[str]],
    out: str | PathLike[str],
    *,
    sites: str | Iterable[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    on_row: Callable[[int, int], None] = lambda *_: None,
) -> Archive:
    """Join archives of the same model and sites over several datasets into a new archive.

    Args:
        archives: The archives, or their folders or addresses, in the order of their rows.
        out: Folder of the new archive, or its address in a bucket; one that was stopped goes on.
        sites: Sites to keep, as patterns; by default all, which every archive has to have.
        storage_options: For addresses, as for `residua.open`; of `out` alone, if their services differ.
        on_row: Called as rows are written, with the number done and the total.

    Returns:
        The new archive.

    Raises:
        PlanError: The archives are of different models, stacks or replays; a site has another shape, type or codec in
            one of them; columns of the same name have other types; or a site cannot be copied exactly.
        UnknownSiteError: `sites` matches no stored site.
        NotCapturedError: An archive is not finished.
        FileExistsError: `out` exists.
        OSError: `out` cannot be written.

    Example:
        >>> residua.concat(["news.zarr", "code.zarr"], "both.zarr")  # doctest: +SKIP
    """
    sources = [open_source(each, out, storage_options) for each in archives]
    if sites is not None:
        sources = [source.of_sites(sites) for source in sources]
    names = _common_sites(sources, sites)
    for source in sources:
        refuse_inexact(source, names)
        _refuse_other(sources[0], source, names)
    _refuse_columns(sources)

    def plan(folder: Path) -> Planned:
        dataset = _write_examples(sources, folder / "examples")
        for source in sources[::-1]:  # those of the first count
            copy_sidecars(source, folder)
        return Planned(_plan(sources, names, dataset), _provenance(sources, names))

    return write_archive(out, storage_options, plan, partial(_shards, sources, on_row))


def _common_sites(sources: Sequence[Archive], sites: str | Iterable[str] | None) -> tuple[str, ...]:
    if len(sources) < 2:
        raise PlanError(f"{len(sources)} archive was given, and at least two are joined: name the others, too")
    wanted = None if sites is None else [sites] if isinstance(sites, str) else list(sites)
    first = sources[0].sites if wanted is None else sources[0].select(wanted)
    for source in sources[1:]:
        other = source.sites if wanted is None else source.select(wanted)
        if lacking := sorted(set(first) ^ set(other)):
            has, lacks = (sources[0], source) if lacking[0] in first else (source, sources[0])
            raise PlanError(
                f"{lacking[0]} is in {has.place}, and not in {lacks.place}: choose sites that all archives have, for "
                f"example --sites {next(iter(set(first) & set(other)), 'resid_post.*')}"
            )
    return first


def _refuse_other(first: Archive, source: Archive, names: Sequence[str]) -> None:
    """Raise PlanError unless the rows of two archives mean the same."""
    places = first.place, source.place
    if other := differences(first.plan.model, source.plan.model, places):
        raise PlanError(f"these archives are of different models, and are not joined: {'; '.join(other)}")
    for rule, what in ((STACK_RULE, "stacks of the model"), (REPLAY_RULE, "replays")):
        if first.plan.rules.get(rule) != source.plan.rules.get(rule):
            raise PlanError(
                f"{places[0]} and {places[1]} are of different {what} ({first.plan.rules.get(rule)} and "
                f"{source.plan.rules.get(rule)}), and are not joined"
            )
    for name in names:
        one, another = first.plan.site(name), source.plan.site(name)
        for field in ("row_shape", "dtype", "codec"):
            if getattr(one, field) != getattr(another, field):
                raise PlanError(
                    f"{name} has the {field} {getattr(one, field)} in {places[0]}, and {getattr(another, field)} in "
                    f"{places[1]}: choose other sites, or capture one of them again like the other"
                )
    mine, theirs = (
        {name: sha256 for name, sha256 in each.metadata.files.items() if name.startswith("tokenizer/")}
        for each in (first, source)
    )
    if mine and theirs and mine != theirs:
        raise PlanError(
            f"{places[0]} and {places[1]} have different tokenizers, so that their token ids would mean other texts: "
            "tokenize both datasets with the same tokenizer"
        )


def _refuse_columns(sources: Sequence[Archive]) -> None:
    known: dict[str, tuple[pa.DataType, Archive]] = {}
    for source in sources:
        for name, kind in source.example_table.column_types().items():
            if pa.types.is_null(kind) or name in (SOURCE_ARCHIVE, SOURCE_EXAMPLE):
                continue
            before, first = known.setdefault(name, (kind, source))
            if before != kind:
                raise PlanError(
                    f"the column {name} of the examples is {before} in {first.place}, and {kind} in {source.place}: "
                    "capture one of them again with another name or type"
                )


def _write_examples(sources: Sequence[Archive], folder: Path) -> dict[str, Json]:
    writer = ExampleWriter(folder)
    for i, source in enumerate(sources):
        table = source.example_table
        for number, columns in table.own_columns():
            where = {SOURCE_ARCHIVE: i, SOURCE_EXAMPLE: number}
            tokens, positions = table.tokens(number), table.positions(number)
            writer.add(Example(input_ids=tokens, positions=positions, columns={**columns, **where}))
    return dataset_entry(writer.close())


def _plan(sources: Sequence[Archive], names: Sequence[str], dataset: dict[str, Json]) -> Plan:
    first = sources[0].plan
    longest = [source.plan.dataset.get("longest_example", dataset["longest_example"]) for source in sources]
    joined = digest_of([source.plan.digest for source in sources])
    return replace(
        first,
        dataset={**dataset, "longest_example": max(int(str(length)) for length in longest)},
        rules={**_shared([source.plan.rules for source in sources]), CONCATENATED: joined},
        sites=tuple(first.site(name) for name in names),
        batch_tokens=0,
        n_rows=sum(source.n_rows for source in sources),
    )


def _shared(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what all entries have alike."""
    return {key: value for key, value in entries[0].items() if all(key in e and e[key] == value for e in entries)}


def _provenance(sources: Sequence[Archive], names: Sequence[str]) -> dict[str, Any]:
    shared = {"model": sources[0].provenance.get("model"), **_shared([source.provenance for source in sources])}
    shared = {key: value for key, value in shared.items() if value is not None and key != "notes"}
    first_rows = np.cumsum([0, *(source.n_rows for source in sources)]).tolist()
    first_examples = np.cumsum([0, *(len(source.example_table) for source in sources)]).tolist()
    entries = [
        {
            "archive": source.plan.digest,
            "path": source.place,
            "rows": list(rows),
            "examples": list(examples),
            "rules": dict(source.plan.rules),
            "provenance": {key: value for key, value in source.provenance.items() if key not in shared},
        }
        for source, rows, examples in zip(sources, pairwise(first_rows), pairwise(first_examples), strict=True)
    ]
    joined = f"these rows are those of {len(sources)} archives, one after the other"
    notes = [note for source in sources for note in notes_in(source.provenance)]
    made = [joined, lossy_note(sources[0], names)]
    return {**shared, CONCATENATED: entries, "notes": [*dict.fromkeys(notes), *filter(None, made)]}


def _shards(
    sources: Sequence[Archive], on_row: Callable[[int, int], None], plan: Plan, done: Collection[int]
) -> Iterator[FilledShard]:
    """Yield the shards that are not done."""
    total, height = plan.n_rows or 0, plan.rows_per_shard
    for shard, start in enumerate(range(0, total, height)):
        stop = min(start + height, total)
        if shard not in done:
            yield _shard(list(_pieces(sources, start, stop)), plan, shard)
        on_row(stop, total)


def _shard(pieces: Sequence[tuple[Archive, Numbers, int]], plan: Plan, shard: int) -> FilledShard:
    columns: dict[str, npt.NDArray[np.generic]] = {
        name: np.concatenate([getattr(source.rows, name)[rows] for source, rows, _ in pieces])
        for name in ("token", "position")
    }
    columns["example"] = np.concatenate([np.add(source.rows.example[rows], first) for source, rows, first in pieces])
    sites = {
        site.name: np.concatenate([stored_rows(source, site, rows) for source, rows, _ in pieces])
        for site in plan.sites
    }
    return FilledShard(index=shard, first_row=shard * plan.rows_per_shard, sites=sites, columns=columns)


def _pieces(sources: Sequence[Archive], start: int, stop: int) -> Iterable[tuple[Archive, Numbers, int]]:
    """Yield the archives that have rows `start` to `stop` of the new one, their rows, and what examples count from."""
    first_row = first_example = 0
    for source in sources:
        rows = np.arange(max(start - first_row, 0), min(stop - first_row, source.n_rows))
        if len(rows):
            yield source, rows, first_example
        first_row += source.n_rows
        first_example += len(source.example_table)

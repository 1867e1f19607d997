"""The job behind `patch` and `attribute`: a grid of sites, positions and heads for every pair, a table, a heat map."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from residua.analysis.support.plots import heat_map
from residua.capture.patching.pair import Pair, PairMetric, pair_metric
from residua.capture.patching.patcher import Cell, PatchedPair, Patcher
from residua.capture.runtime.wrappers import evaluating, running_uncompiled
from residua.pipelines.circuits.circuit_settings import SweepSettings
from residua.pipelines.circuits.read_pairs import PairSource, read_pairs
from residua.pipelines.jobs.sharing import SharedWork
from residua.pipelines.jobs.workers import working_together
from residua.pipelines.replay.result_folder import write_table
from residua.pipelines.setup.capture_settings import CaptureSettings
from residua.pipelines.setup.models import named_model
from residua.store.base.canonical import digest_of
from residua.store.read.archive import Archive
from residua.store.read.stacks import open_archive
from residua.store.storage.place import try_result_place

TABLE, PICTURE = "cells.parquet", "cells.png"

Measure = Callable[[Patcher, Pair, list[Cell], PairMetric], PatchedPair]
"""Measures the cells of a pair, by patching or by its estimate."""


def sweep(
    model: str | PathLike[str] | PreTrainedModel,
    source: PairSource,
    measure: Measure,
    asked: SweepSettings,
    *,
    title: str,
    tokenizer: PreTrainedTokenizerBase | None,
    archive: Archive | str | PathLike[str] | None,
    out: str | PathLike[str] | None,
    storage_options: Mapping[str, Any] | None,
    on_pair: Callable[[int, int], None],
) -> pa.Table:
    """Return one line per cell of every pair.

    Args:
        model: A transformers model, or a hub id or folder of one.
        source: The pairs, as `read_pairs` takes them.
        measure: Measures the cells of a pair.
        asked: The grid.
        title: Title of the heat map, and name of the method.
        tokenizer: Tokenizer of a model that is passed as an object, for texts; by default the one that it was loaded
            with.
        archive: The archive of examples that are named by number.
        out: Folder for the table and the heat map, or its address in a bucket, if they are to be written.
        storage_options: For addresses, as for `residua.open`.
        on_pair: Called with the numbers of finished pairs and of all pairs.

    Raises:
        PlanError: There is no such metric.
    """
    metric = pair_metric(asked.metric)
    place = None if out is None else try_result_place(out, storage_options, locks=True).out
    opened = None if archive is None else open_archive(archive, storage_options=storage_options)
    settings = CaptureSettings(device=asked.device, tp=asked.tp, pp=asked.pp)
    with working_together(place, settings, job=title) as membership:
        model, tokenizer = named_model(model, tokenizer, settings)
        pairs = read_pairs(source, model, tokenizer=tokenizer, archive=opened)
        patcher = Patcher(model, asked.sites, by_head=asked.heads)
        positions = [asked.positions_of(pair, number) for number, pair in enumerate(pairs, start=1)]
        cells = [patcher.cells(of_pair) for of_pair in positions]
        shared = SharedWork(membership, model, alike=False)
        grid = {"places": [list(of_pair) for of_pair in positions], "heads": asked.heads}
        content = digest_of({"pairs": [asdict(pair) for pair in pairs], **grid})
        shared.agree_on({"pairs": content, "sites": patcher.sites, "metric": asked.metric, "way": title})

        def find(index: int) -> dict[str, Any]:
            return asdict(measure(patcher, pairs[index], cells[index], metric))

        def write(found: list[Mapping[str, Any]]) -> None:
            if place is not None:
                table = _table(pairs, cells, found)
                write_table(place, TABLE, table)
                _draw(place.path / PICTURE, table, f"{title}: {asked.metric.replace('_', ' ')}", pairs, tokenizer)
                place.upload([PICTURE])

        with running_uncompiled(model), evaluating(model):
            found = shared.found(len(pairs), find, close=write, on_unit=on_pair)
    return _table(pairs, cells, found)


def _table(pairs: Sequence[Pair], cells: Sequence[list[Cell]], found: Sequence[Mapping[str, Any]]) -> pa.Table:
    lines = [
        line
        for number, (pair, of_pair, values) in enumerate(zip(pairs, cells, found, strict=True))
        for line in _lines(number, pair, of_pair, PatchedPair(**values))
    ]
    types = dict.fromkeys(("pair", "position", "head", "token"), pa.int64()) | {"site": pa.string()}
    return pa.Table.from_pylist(lines, schema=pa.schema([(name, types.get(name, pa.float64())) for name in lines[0]]))


def _lines(number: int, pair: Pair, cells: list[Cell], found: PatchedPair) -> list[dict[str, Any]]:
    distance = found.clean - found.corrupted
    return [
        {
            "pair": number,
            "site": cell.site,
            "position": cell.position,
            **({} if cell.head is None else {"head": cell.head}),
            "token": None if cell.position is None else pair.corrupted[cell.position],
            "clean": found.clean,
            "corrupted": found.corrupted,
            "value": value,
            "effect": value - found.corrupted,
            "recovered": (value - found.corrupted) / distance if distance else None,
        }
        for cell, value in zip(cells, found.values, strict=True)
    ]


def _draw(
    path: Path, table: pa.Table, title: str, pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Draw the share recovered, mean over pairs; positions count from the start of each.

    Rows are sites and columns positions. With heads, each head of a site is a row, or, if all positions are patched
    together, a column.
    """
    by_head, together = "head" in table.column_names, table["position"].null_count == table.num_rows
    x, y = "head" if by_head and together else "position", ("site", "head") if by_head and not together else ("site",)
    means = table.group_by([*y, x], use_threads=False).aggregate([("recovered", "mean")]).to_pylist()
    rows = list(dict.fromkeys(tuple(line[name] for name in y) for line in means))
    columns = list(dict.fromkeys(line[x] for line in means))
    columns = columns if None in columns else sorted(columns)
    values = np.full((len(rows), len(columns)), np.nan)
    for line in means:
        if line["recovered_mean"] is not None:
            values[rows.index(tuple(line[name] for name in y)), columns.index(line[x])] = line["recovered_mean"]
    names = [] if together else _token_names(pairs, tokenizer, columns)
    heat_map(
        path,
        values,
        title=f"{title}, {'one pair' if len(pairs) == 1 else f'{len(pairs)} pairs'}",
        x_name="position (token of the corrupted example)" if names else x,
        y_name=" and ".join(y),
        value_name="share recovered",
        x_ticks=names or ["all" if column is None else str(column) for column in columns],
        y_ticks=[" ".join(map(str, row)) for row in rows],
        centred=True,
    )


def _token_names(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase | None, columns: list[int]) -> list[str]:
    """Return the text of the token at each position, if there is one pair and a tokenizer."""
    if len(pairs) > 1 or tokenizer is None:
        return []
    ids = pairs[0].corrupted
    return [f"{column} {_printable(str(tokenizer.decode([ids[column]])))}" for column in columns]


def _printable(text: str) -> str:
    """Return text without control characters, and with dollars escaped, which would start a formula."""
    return (repr(text)[1:-1] if text.strip() else repr(text)[:6])[:14].replace("$", r"\$")

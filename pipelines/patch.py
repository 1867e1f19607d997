"""Activation patching over a grid of sites and positions, and its estimate from gradients: a table and a heat map."""

from collections.abc import Callable, Iterable, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from residua.analysis.plots import heat_map
from residua.capture.compiled import running_uncompiled
from residua.capture.pairs import Pair, pair_metric
from residua.capture.patching import Cell, Patcher, Swept
from residua.capture.probing import evaluating
from residua.pipelines.models import load_model, load_tokenizer
from residua.pipelines.pairs import PairSource, read_pairs
from residua.pipelines.replay_tables import write_table
from residua.pipelines.settings import CaptureSettings
from residua.store.archive import Archive
from residua.store.errors import PlanError

TABLE, PICTURE = "cells.parquet", "cells.png"
_Way = Literal["Activation patching", "Attribution patching (estimated)"]


def patch(
    model: str | PathLike[str] | PreTrainedModel,
    pairs: PairSource,
    *,
    sites: str | Iterable[str] = "resid_post.*",
    positions: Sequence[int] | None = None,
    metric: str = "logit_difference",
    batch_cells: int = 64,
    tokenizer: PreTrainedTokenizerBase | None = None,
    archive: Archive | str | PathLike[str] | None = None,
    out: str | PathLike[str] | None = None,
    device: str = "auto",
    on_pair: Callable[[int, int], None] = lambda *_: None,
) -> pa.Table:
    """Put the clean run's value into the corrupted run, one site and position at a time, and measure the answer.

    Args:
        model: A transformers model, or a hub id or folder of one.
        pairs: Clean and corrupted examples of equal length with the answers to them: a file of JSON lines, or
            dictionaries with ``clean``, ``corrupted``, ``answer`` and, for ``logit_difference``, ``wrong``.
        sites: Names or patterns of sites, the rows of the grid.
        positions: Positions, its columns, negative ones from the end; all unless given.
        metric: What is measured behind the last position: ``logit_difference`` (answer minus wrong), ``loss`` (of the
            answer), ``probability`` (of the answer) or ``kl`` (from the clean run).
        batch_cells: How many cells share one forward pass, as copies of the example.
        tokenizer: Tokenizer of a model that is passed as an object, for texts.
        archive: Where examples that are named by number lie.
        out: Folder for ``cells.parquet`` and ``cells.png``.
        device: Device of the model, if it is loaded here.
        on_pair: Called with the pairs done and in all.

    Returns:
        One line a cell: pair, site, position, token (of the corrupted example), clean and corrupted (the measure of
        both runs), value (with the cell patched), effect (value - corrupted), and recovered (the share of the way from
        corrupted to clean; null where these are equal).

    Raises:
        PlanError: Pairs, positions, sites or metric do not fit.
        UnknownSiteError: The model has no such site.

    Example:
        >>> pairs = [{"clean": [1, 5, 6, 5], "corrupted": [1, 7, 6, 5], "answer": 6, "wrong": 8}]
        >>> residua.patch("models/pydoc-1m", pairs, sites="attn_out.*", out="patched")  # doctest: +SKIP
    """
    if batch_cells < 1:
        raise PlanError(f"batch_cells is {batch_cells}: at least one cell has to run at a time")
    measure = pair_metric(metric)
    job = _Job(model, pairs, sites, positions, tokenizer, archive, device)
    found = job.run(lambda patcher, pair, cells: patcher.sweep(pair, cells, measure, batch_cells=batch_cells), on_pair)
    return _finished(found, job, metric, out, "Activation patching")


def attribute(
    model: str | PathLike[str] | PreTrainedModel,
    pairs: PairSource,
    *,
    sites: str | Iterable[str] = "resid_post.*",
    positions: Sequence[int] | None = None,
    metric: str = "logit_difference",
    tokenizer: PreTrainedTokenizerBase | None = None,
    archive: Archive | str | PathLike[str] | None = None,
    out: str | PathLike[str] | None = None,
    device: str = "auto",
    on_pair: Callable[[int, int], None] = lambda *_: None,
) -> pa.Table:
    """Estimate what `patch` measures, for all cells of a pair from two forward passes and one backward pass.

    The estimate of a cell is the gradient of the metric by the corrupted run's value times the difference of the clean
    and the corrupted value (attribution patching). It is exact where the metric is linear in the site, good where the
    difference is small, and can be far off elsewhere: confirm what stands out with `patch`.

    Args and what is returned are those of `patch`; value and effect are estimates.

    Raises:
        PlanError: Pairs, positions, sites or metric do not fit.
        UnknownSiteError: The model has no such site.

    Example:
        >>> residua.attribute("models/pydoc-1m", "pairs.jsonl", sites="attn_out.*,mlp_out.*")  # doctest: +SKIP
    """
    measure = pair_metric(metric)
    job = _Job(model, pairs, sites, positions, tokenizer, archive, device)
    found = job.run(lambda patcher, pair, cells: patcher.estimate(pair, cells, measure), on_pair)
    return _finished(found, job, metric, out, "Attribution patching (estimated)")


class _Job:
    """What both ways share: the model, its pairs, and the grid."""

    def __init__(
        self,
        model: str | PathLike[str] | PreTrainedModel,
        pairs: PairSource,
        sites: str | Iterable[str],
        positions: Sequence[int] | None,
        tokenizer: PreTrainedTokenizerBase | None,
        archive: Archive | str | PathLike[str] | None,
        device: str,
    ) -> None:
        if isinstance(model, str | PathLike):
            settings = CaptureSettings(device=device)
            tokenizer = tokenizer or load_tokenizer(fspath(model), settings)
            model = load_model(fspath(model), settings)
        opened = archive if isinstance(archive, Archive | None) else Archive(archive)
        self.tokenizer = tokenizer
        self._model = model
        self.pairs = read_pairs(pairs, model, tokenizer=tokenizer, archive=opened)
        self._patcher = Patcher(model, sites)
        self.sites = self._patcher.sites
        self._positions = positions

    def run(
        self, way: Callable[[Patcher, Pair, list[Cell]], Swept], on_pair: Callable[[int, int], None]
    ) -> list[dict[str, Any]]:
        """Return one line a cell of every pair."""
        places = [self._places(pair, number) for number, pair in enumerate(self.pairs, start=1)]
        lines: list[dict[str, Any]] = []
        with running_uncompiled(self._model), evaluating(self._model):
            for number, (pair, positions) in enumerate(zip(self.pairs, places, strict=True)):
                cells = [(site, position) for site in self.sites for position in positions]
                lines += _lines(number, pair, cells, way(self._patcher, pair, cells))
                on_pair(number + 1, len(self.pairs))
        return lines

    def _places(self, pair: Pair, number: int) -> list[int]:
        length = len(pair.clean)
        if self._positions is None:
            return list(range(length))
        wrong = [position for position in self._positions if not -length <= position < length]
        if wrong or not self._positions:
            raise PlanError(
                f"pair {number} has {length} tokens: there is no position {wrong[0] if wrong else 'chosen'}"
            )
        return sorted({position % length for position in self._positions})


def _lines(number: int, pair: Pair, cells: list[Cell], found: Swept) -> list[dict[str, Any]]:
    way = found.clean - found.corrupted
    return [
        {
            "pair": number,
            "site": site,
            "position": position,
            "token": pair.corrupted[position],
            "clean": found.clean,
            "corrupted": found.corrupted,
            "value": value,
            "effect": value - found.corrupted,
            "recovered": (value - found.corrupted) / way if way else None,
        }
        for (site, position), value in zip(cells, found.values, strict=True)
    ]


def _finished(
    lines: list[dict[str, Any]], job: _Job, metric: str, out: str | PathLike[str] | None, way: _Way
) -> pa.Table:
    whole, text = dict.fromkeys(("pair", "position", "token"), pa.int64()), {"site": pa.string()}
    types = {name: {**whole, **text}.get(name, pa.float64()) for name in lines[0]}
    table = pa.Table.from_pylist(lines, schema=pa.schema(list(types.items())))
    if out is not None:
        write_table(Path(out) / TABLE, table)
        _draw(Path(out) / PICTURE, lines, job, metric, way)
    return table


def _draw(path: Path, lines: list[dict[str, Any]], job: _Job, metric: str, way: _Way) -> None:
    """Draw the mean over pairs; positions count from the start of each."""
    columns = sorted({line["position"] for line in lines})
    sums, counts = np.zeros((2, len(job.sites), len(columns)))
    for line in lines:
        if line["recovered"] is not None:
            place = job.sites.index(line["site"]), columns.index(line["position"])
            sums[place] += line["recovered"]
            counts[place] += 1
    values = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    of = "one pair" if len(job.pairs) == 1 else f"{len(job.pairs)} pairs"
    heat_map(
        path,
        values,
        title=f"{way}: {metric.replace('_', ' ')}, {of}",
        x_name="position (token of the corrupted example)" if _names(job, columns) else "position",
        y_name="site",
        value_name="share recovered",
        x_ticks=_names(job, columns) or [str(column) for column in columns],
        y_ticks=list(job.sites),
        centred=True,
    )


def _names(job: _Job, columns: list[int]) -> list[str]:
    """Return what stands at each position, where there is one pair and a tokenizer to tell."""
    if len(job.pairs) > 1 or job.tokenizer is None:
        return []
    ids = job.pairs[0].corrupted
    return [f"{column} {_safe(str(job.tokenizer.decode([ids[column]])))}" for column in columns]


def _safe(text: str) -> str:
    """Keep control characters out of the picture, and dollars, which would begin a formula."""
    return (repr(text)[1:-1] if text.strip() else repr(text)[:6])[:14].replace("$", r"\$")

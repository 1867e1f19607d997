"""Activation patching over a grid of sites and positions, and its estimate from gradients: a table and a heat map."""

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from residua.capture.patching.patching import Patcher
from residua.pipelines.circuits.pairs import PairSource
from residua.pipelines.circuits.sweep import Sweep, SweepSettings, Way
from residua.store.base.errors import PlanError
from residua.store.read.archive import Archive


def patch(
    model: str | PathLike[str] | PreTrainedModel,
    pairs: PairSource,
    *,
    batch_cells: int = 64,
    tokenizer: PreTrainedTokenizerBase | None = None,
    archive: Archive | str | PathLike[str] | None = None,
    out: str | PathLike[str] | None = None,
    on_pair: Callable[[int, int], None] = lambda *_: None,
    **options: Any,
) -> pa.Table:
    """Put the clean run's value into the corrupted run, one cell of a grid at a time, and measure the answer.

    A cell is a site at a position, or all positions; or one head of a site there.

    Called by every process of a distributed launch, they share the pairs; see docs/distributed.md.

    Args:
        model: A transformers model, or a hub id or folder of one.
        pairs: Clean and corrupted examples of equal length with the answers to them: a file of JSON lines, or
            dictionaries with ``clean``, ``corrupted``, ``answer`` and, for ``logit_difference``, ``wrong``.
        batch_cells: How many cells share one forward pass, as copies of the example.
        tokenizer: Tokenizer of a model that is passed as an object, for texts.
        archive: Where examples that are named by number lie.
        out: Folder for ``cells.parquet`` and ``cells.png``.
        on_pair: Called with the pairs done and in all.
        **options: Which sites, positions and metric, and where the model runs: the fields of `SweepSettings`
            (``sites``, ``positions``, ``heads``, ``metric``, ``device``, ``tp``, ``pp``).

    Returns:
        One line a cell: pair, site, position (null for all), head (if ``heads`` were asked for), token (of the
        corrupted example), clean and corrupted (the measure of both runs), value (with the cell patched), effect
        (value - corrupted), and recovered (the share of the way from corrupted to clean; null where these are equal).

    Raises:
        PlanError: Pairs, positions, sites or metric do not fit.
        UnknownSiteError: The model has no such site.
        ArchiveInUseError: Another run is at work on `out`.
        CaptureError: Another process that shares the work is gone.

    Example:
        >>> pairs = [{"clean": [1, 5, 6, 5], "corrupted": [1, 7, 6, 5], "answer": 6, "wrong": 8}]
        >>> residua.patch("models/pydoc-1m", pairs, sites="attn_out.*", out="patched")  # doctest: +SKIP
    """
    if batch_cells < 1:
        raise PlanError(f"--batch-cells is {batch_cells}: at least one cell has to run at a time")
    way = Way(
        "Activation patching",
        lambda patcher, pair, cells, metric: patcher.sweep(pair, cells, metric, batch_cells=batch_cells),
    )
    sweep = Sweep(model, pairs, SweepSettings(**options), tokenizer=tokenizer, archive=archive)
    return sweep.run(way, None if out is None else Path(out), on_pair)


def attribute(
    model: str | PathLike[str] | PreTrainedModel,
    pairs: PairSource,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    archive: Archive | str | PathLike[str] | None = None,
    out: str | PathLike[str] | None = None,
    on_pair: Callable[[int, int], None] = lambda *_: None,
    **options: Any,
) -> pa.Table:
    """Estimate what `patch` measures, for all cells of a pair from two forward passes and one backward pass.

    The estimate of a cell is the gradient of the metric by the corrupted run's value times the difference of the clean
    and the corrupted value (attribution patching). It is exact where the metric is linear in the site, good where the
    difference is small, and can be far off elsewhere: confirm what stands out with `patch`.

    Args and what is returned are those of `patch`; value and effect are estimates.

    Raises:
        PlanError: Pairs, positions, sites or metric do not fit.
        UnknownSiteError: The model has no such site.
        ArchiveInUseError: Another run is at work on `out`.
        CaptureError: Another process that shares the work is gone.

    Example:
        >>> residua.attribute("models/pydoc-1m", "pairs.jsonl", sites="attn_out.*,mlp_out.*")  # doctest: +SKIP
    """
    sweep = Sweep(model, pairs, SweepSettings(**options), tokenizer=tokenizer, archive=archive)
    way = Way("Attribution patching (estimated)", Patcher.estimate)
    return sweep.run(way, None if out is None else Path(out), on_pair)

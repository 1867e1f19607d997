"""`residua.patch` and `residua.attribute`: activation patching over a grid, and its estimate from gradients.

Both return a table and write it with a heat map; `residua.capture.patching.patcher` holds the methods and their papers.
"""

from collections.abc import Callable, Mapping
from functools import partial
from os import PathLike
from typing import Any, Unpack

import pyarrow as pa
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from residua.capture.patching.patcher import Patcher
from residua.pipelines.circuits.circuit_settings import SweepOptions, SweepSettings
from residua.pipelines.circuits.read_pairs import PairSource
from residua.pipelines.circuits.sweep import sweep
from residua.store.base.errors import PlanError
from residua.store.base.naming import named
from residua.store.read.archive import Archive


def patch(
    model: str | PathLike[str] | PreTrainedModel,
    pairs: PairSource,
    *,
    batch_cells: int = 64,
    tokenizer: PreTrainedTokenizerBase | None = None,
    archive: Archive | str | PathLike[str] | None = None,
    out: str | PathLike[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    on_pair: Callable[[int, int], None] = lambda *_: None,
    **options: Unpack[SweepOptions],
) -> pa.Table:
    """Put the clean run's value into the corrupted run, one cell of a grid at a time, and measure the answer.

    A cell is a site at a position or at all positions, or one head of a site there.

    If every process of a distributed launch calls it, they share the pairs; see docs/distributed.md.

    Args:
        model: A transformers model, or a hub id or folder of one.
        pairs: Clean and corrupted examples of equal length with their answers: a file of JSON lines, or dictionaries
            with ``clean``, ``corrupted``, ``answer`` and, for ``logit_difference``, ``wrong``.
        batch_cells: How many cells share one forward pass, as copies of the example.
        tokenizer: Tokenizer of a model that is passed as an object, for texts; by default the one that it was loaded
            with.
        archive: The archive of examples that are named by number.
        out: Folder for ``cells.parquet`` and ``cells.png``, or its address in a bucket.
        storage_options: For addresses, as for `residua.open`.
        on_pair: Called with the numbers of finished pairs and of all pairs.
        **options: Sites, positions and metric, and where the model runs: the fields of `SweepSettings` (``sites``,
            ``positions``, ``heads``, ``metric``, ``device``, ``tp``, ``pp``).

    Returns:
        One line per cell: pair, site, position (null for all), head (if ``heads`` is set), token (of the corrupted
        example), clean and corrupted (the metric of both runs), value (with the cell patched), effect (value -
        corrupted), and recovered (the share of the way from corrupted to clean; null if these are equal).

    Raises:
        PlanError: Pairs, positions, sites or metric do not fit.
        UnknownSiteError: The model has no such site.
        ArchiveInUseError: Another run works on `out`.
        CaptureError: Another process that shares the work is gone.

    Example:
        >>> pairs = [{"clean": [1, 5, 6, 5], "corrupted": [1, 7, 6, 5], "answer": 6, "wrong": 8}]
        >>> residua.patch("models/pydoc-1m", pairs, sites="attn_out.*", out="patched")  # doctest: +SKIP
    """
    if batch_cells < 1:
        raise PlanError(f"{named('batch_cells', batch_cells)}: at least one cell has to run at a time")
    return sweep(
        model,
        pairs,
        partial(Patcher.patch, batch_cells=batch_cells),
        SweepSettings(**options),
        title="Activation patching",
        tokenizer=tokenizer,
        archive=archive,
        out=out,
        storage_options=storage_options,
        on_pair=on_pair,
    )


def attribute(
    model: str | PathLike[str] | PreTrainedModel,
    pairs: PairSource,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    archive: Archive | str | PathLike[str] | None = None,
    out: str | PathLike[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    on_pair: Callable[[int, int], None] = lambda *_: None,
    **options: Unpack[SweepOptions],
) -> pa.Table:
    """Estimate what `patch` measures, for all cells of a pair from two forward passes and one backward pass.

    The estimate of a cell is the gradient of the metric at the corrupted run's value times the difference of the clean
    and the corrupted value (attribution patching). It is exact if the metric is linear in the site, good if the
    difference is small, and can be far off elsewhere: confirm large values with `patch`.

    Args and returns are those of `patch`; value and effect are estimates.

    Raises:
        PlanError: Pairs, positions, sites or metric do not fit.
        UnknownSiteError: The model has no such site.
        ArchiveInUseError: Another run works on `out`.
        CaptureError: Another process that shares the work is gone.

    Example:
        >>> residua.attribute("models/pydoc-1m", "pairs.jsonl", sites="attn_out.*,mlp_out.*")  # doctest: +SKIP
    """
    return sweep(
        model,
        pairs,
        Patcher.attribute,
        SweepSettings(**options),
        title="Attribution patching (estimated)",
        tokenizer=tokenizer,
        archive=archive,
        out=out,
        storage_options=storage_options,
        on_pair=on_pair,
    )

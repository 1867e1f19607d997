"""Captures for the table of layouts: every site, by all ranks, against the plain model batch by batch."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from residua.capture.taps.reading import reading
from residua.pipelines.capture.capture import capture_dataset
from tests.distributed.checks.one_process import computed_once
from tests.distributed.checks.replay import bare
from tests.distributed.layouts.case import Case, Row
from tests.distributed.layouts.single_process import batch, site_names

PAIRS = (slice(0, 2), slice(2, 4))
"""The examples that begin in each shard of 16 rows, and so make up a batch."""


def captured(case: Case, model: Any = None) -> Row:
    """Capture the examples of one batch with a case's model, or with the schedule of its pipeline.

    Whoever wrote a row, the archive is one: rank 0 compares it.
    """
    inputs, out = batch(0), Path(sys.argv[1]) / f"{case.layout} {case.name}.zarr"
    kept = inputs["attention_mask"].bool()
    tokens = [ids[mask].tolist() for ids, mask in zip(inputs["input_ids"], kept, strict=True)]
    captured_model: Any = case.model if model is None else model
    dtype = case.expected.logits.dtype
    wanted = computed_once(f"rows {case.name} {dtype}", lambda: expected_rows(case.name, dtype))
    archive = capture_dataset(
        captured_model,
        tokens,
        out=out,
        sites=",".join(wanted),
        rows_per_shard=16,
        batch_tokens=64,
        tensor_parallel=case.group,
    ).archive
    assert archive.is_sealed
    got = {site: archive[site].torch().to(rows.dtype) for site, rows in wanted.items()}
    is_first = dist.get_rank() == 0
    return case.noted("capture", got if is_first else {}, wanted if is_first else {}, n_sites=len(wanted))


def expected_rows(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the bare model gives for the kept tokens, batch by batch as a capture makes them up: (rows, *row)."""
    model, found = bare(name, dtype), dict[str, list[Tensor]]()
    for pair in PAIRS:
        inputs = {key: value[pair] if isinstance(value, Tensor) else value for key, value in batch(0).items()}
        kept = inputs["attention_mask"].bool()

        def keep(site: str, tensor: Tensor, kept: Tensor = kept) -> None:
            found.setdefault(site, []).append(tensor[kept].clone())

        with reading(model, site_names(model, name), keep), torch.no_grad():
            model(**inputs)
    return {site: torch.cat(rows) for site, rows in found.items()}

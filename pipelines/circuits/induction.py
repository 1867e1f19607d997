"""Which heads of a model are induction heads: capture repeated random tokens, score the heads, draw the scores.

`residua.analysis.attention` computes the scores and cites their papers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from residua.analysis.attention.induction import induction_scores
from residua.analysis.support.cluster import Cluster
from residua.analysis.support.plots import heat_map
from residua.pipelines.capture.capture import capture_dataset
from residua.pipelines.capture.result import CaptureResult
from residua.pipelines.circuits.circuit_settings import RepeatSettings
from residua.pipelines.circuits.repeats import repeated_tokens
from residua.pipelines.replay.result_folder import write_table
from residua.pipelines.setup.capture_settings import CaptureSettings
from residua.pipelines.setup.models import named_model
from residua.store.base.errors import PlanError
from residua.store.base.naming import named
from residua.store.read.archive import Archive
from residua.store.storage.address import is_remote
from residua.store.storage.destination import DiskFolder
from residua.store.storage.place import ResultPlace, try_result_place

CapturedFrom = Literal["qk", "pattern"]
_SITES: dict[CapturedFrom, str] = {"qk": "q.*,k.*", "pattern": "pattern.*"}
_HEADS = "-heads"
TABLE, PICTURE = "heads.parquet", "induction.png"


@dataclass(frozen=True, kw_only=True)
class InductionResult:
    """The scores of the heads.

    Attributes:
        scores: One line per head; see `residua.induction_scores`.
        folder: Folder of ``heads.parquet`` and ``induction.png``, or its address.
    """

    scores: pa.Table
    folder: Path | str

    def strongest(self, count: int) -> list[dict[str, Any]]:
        """Return the lines of the `count` heads with the highest induction score, highest first."""
        lines: list[dict[str, Any]] = self.scores.sort_by([("induction", "descending")]).slice(0, count).to_pylist()
        return lines


def capture_repeats(
    model: str | PathLike[str] | PreTrainedModel,
    *,
    out: str | PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    repeats: RepeatSettings | None = None,
    captured_from: CapturedFrom = "qk",
    settings: CaptureSettings | None = None,
    **capture: Any,
) -> CaptureResult:
    """Capture what the scores need, on repeated random tokens; resume an unfinished archive.

    Args:
        model: A transformers model, or a hub id or folder of one.
        out: Folder of the archive, or its address in a bucket (``s3://``, ``gs://``, ``az://``).
        tokenizer: Tokenizer of a model that is passed as an object; otherwise it is loaded with the model.
        repeats: How to make the sequences.
        captured_from: ``qk`` for queries and keys, ``pattern`` for full attention patterns (eager attention).
        settings: Settings of the capture; its sites are replaced.
        **capture: Further arguments of `residua.capture_dataset`.

    Raises:
        PlanError: The settings contradict the model or an existing archive.
        CaptureError: The capture failed; committed rows are safe.
    """
    if captured_from not in _SITES:
        raise PlanError(f"{named('captured_from', captured_from)} is not known: choose qk or pattern")
    chosen = settings or CaptureSettings()
    loaded, tokenizer = named_model(model, tokenizer, chosen)
    rows = repeated_tokens(loaded, tokenizer, repeats or RepeatSettings())
    asked = replace(chosen, sites=_SITES[captured_from])
    return capture_dataset(loaded, rows, out=out, tokenizer=tokenizer, settings=asked, **capture)


def heads_place(archive: str | PathLike[str], storage_options: Mapping[str, Any] | None = None) -> ResultPlace:
    """Return the place of the scores of an archive, after a trial whether files can be written there.

    Args:
        archive: Path or address of the archive.
        storage_options: For an address, as for `residua.open`.
    """
    if is_remote(archive):
        return try_result_place(f"{fspath(archive).rstrip('/').removesuffix('.zarr')}{_HEADS}", storage_options)
    path = Path(archive).resolve() if Path(archive).exists() else Path(archive)
    return try_result_place(path.with_name(path.name.removesuffix(".zarr") + _HEADS))


def score_repeats(archive: Archive, *, name: str, cluster: Cluster | None = None) -> InductionResult:
    """Score the heads of an archive of repeats, and write a table and a heat map.

    The files go to a folder next to the archive, with ``-heads`` added to its name; the archive stays as it is.

    Args:
        archive: An archive that `capture_repeats` made.
        name: The model's name, for the title of the heat map.
        cluster: Runs the jobs; None runs them in this process.

    Raises:
        AnalysisError: The scores cannot be computed; the message says why.
        OSError: The folder cannot be written; this is tried before anything is computed.
    """
    out = heads_place(archive.place, archive.storage_options).out
    scores = induction_scores(archive, cluster=cluster)
    write_table(out, TABLE, scores)
    _draw(out.path / PICTURE, scores, name)
    out.upload([PICTURE])
    return InductionResult(scores=scores, folder=out.path if isinstance(out, DiskFolder) else str(out))


def _draw(path: Path, scores: pa.Table, name: str) -> None:
    lines = scores.to_pylist()
    layers = sorted({line["layer"] for line in lines})
    values = np.full((len(layers), 1 + max(line["head"] for line in lines)), np.nan)
    for line in lines:
        if line["induction"] is not None:
            values[layers.index(line["layer"]), line["head"]] = line["induction"]
    heat_map(
        path,
        values,
        title=f"Induction heads of {name}",
        x_name="head",
        y_name="layer",
        value_name="induction score (share of attention)",
        y_ticks=[str(layer) for layer in layers],
    )

"""TransformerLens's head detector, on the attention weights of an archive.

The definition is that of ``transformer_lens.head_detector.detect_head`` (Cooney and Nanda, TransformerLens 4.3). It
compares a detection pattern D of zeros and ones with an attention pattern A of L tokens. Its names are kept because its
numbers differ from ours: ``mul`` is the share of *all* attention of a head that lies on D. That includes the attention
of the first copy and to the BOS token, so it reads 0.5 to 0.7 where prefix matching reads 0.98.
"""

from collections.abc import Sequence
from functools import partial
from os import PathLike
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
from torch import Tensor

from residua.analysis.attention.jobs import (
    MOST_BYTES,
    AttentionJob,
    Source,
    attention_jobs,
    example_sums,
    head_table,
    run_jobs,
)
from residua.analysis.attention.token_matches import Match, duplicate_token, left_out, prefix, previous_token, without
from residua.analysis.attention.weights import ExampleSums, Floats
from residua.analysis.support.cluster import Cluster
from residua.store.base.errors import AnalysisError
from residua.store.base.sizes import Size
from residua.store.read.archive import Archive
from residua.store.read.stacks import open_archive

HeadName = Literal["previous_token_head", "duplicate_token_head", "induction_head"]
ErrorMeasure = Literal["mul", "abs"]


def head_detector(
    archive: Archive | str | PathLike[str],
    detection_pattern: HeadName,
    *,
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
    error_measure: ErrorMeasure = "mul",
    layers: Sequence[int] | None = None,
    source: Source | None = None,
    cluster: Cluster | None = None,
    most_bytes: Size = MOST_BYTES,
) -> pa.Table:
    """Score every head as TransformerLens's ``detect_head`` does; the score is the mean over the examples.

    Args:
        archive: The archive, or its path. It holds `pattern` sites, or `q` and `k` sites, with all positions.
        detection_pattern: ``previous_token_head``: the token before; ``duplicate_token_head``: every earlier
            occurrence of the same token; ``induction_head``: every token that followed an earlier occurrence.
        exclude_bos: Leave out attention to the first token.
        exclude_current_token: Leave out the attention of a token to itself.
        error_measure: ``mul``: sum(A * D) / sum(A); ``abs``: 1 - round(sum(abs(A - D)) / L, 3).
        layers: Layers to score; None: all layers whose weights are known.
        source: ``pattern`` or ``qk``; None: patterns if they are stored.
        cluster: Where the jobs run; None: in this process.
        most_bytes: Memory limit of a job, in bytes or as a text such as ``1GiB``, not counting the tokens of an
            example.

    Returns:
        One line for each head, with the columns ``layer`` and ``head`` (int32) and ``score`` (float64).

    Raises:
        AnalysisError: A name is unknown, or the archive lacks the sites.
        NotCapturedError: The archive is not fully captured.
    """
    for name, known in ((detection_pattern, get_args(HeadName)), (error_measure, get_args(ErrorMeasure))):
        if name not in known:
            raise AnalysisError(f"the head detector does not know {name!r}: choose one of {', '.join(known)}")
    archive = open_archive(archive)
    jobs = attention_jobs(archive, layers=layers, source=source, most_bytes=most_bytes)
    detect = partial(
        _detect, name=detection_pattern, measure=error_measure, bos=exclude_bos, current=exclude_current_token
    )
    n_examples = archive.example_table.index().n_examples
    found = run_jobs(detect, jobs, cluster=cluster, label=f"detecting {detection_pattern}s")
    return head_table({layer: {"score": np.sum(sums, axis=0) / n_examples} for layer, sums in found.items()})


def _detect(job: AttentionJob, *, name: HeadName, measure: ErrorMeasure, bos: bool, current: bool) -> Floats:
    """Return the scores of one job's heads, summed over its examples, float64, (heads)."""
    excluded = left_out(bos=bos, current=current)

    def matches(_: int, tokens: Tensor) -> Sequence[Match]:
        detection = {
            "previous_token_head": previous_token(),
            "duplicate_token_head": duplicate_token(tokens),
            "induction_head": prefix(tokens),
        }[name]
        return without(detection, excluded), excluded

    measured = _mul if measure == "mul" else _abs
    scores = [measured(sums) for sums in example_sums(job, matches, need_all=True)]
    summed: Floats = np.sum(scores, axis=0)
    return summed


def _mul(sums: ExampleSums) -> Floats:
    matched, excluded = sums.matched
    scores: Floats = matched / (sums.total - excluded)
    return scores


def _abs(sums: ExampleSums) -> Floats:
    """Where D is 1, abs(A - D) is 1 - A, elsewhere it is A."""
    matched, excluded = sums.matched
    distance = sums.total - excluded - 2 * matched + sums.n_pairs[0]
    scores: Floats = 1 - np.round(distance / sums.n_tokens, 3)
    return scores

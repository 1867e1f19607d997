"""`residua.heads`: the measures of all heads as a table, a picture, and the JSON tree that HeadVis's page opens.

The tree is that of HeadVis's ``data_pipeline.py``; docs/heads.md describes its files. Besides the measures it shows
examples of each head, at ten levels of its strongest attention. A head's attention in an example is stored as the keys
of each query that get most of it.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch

from residua.analysis.attention.heads import MEASURES, HeadMeasures, measure_heads
from residua.analysis.attention.jobs import JOB_PAIRS, MOST_BYTES, AttentionJob, Source, weights_of
from residua.analysis.attention.weights import ExampleRows
from residua.analysis.support.cluster import Cluster, or_inline
from residua.analysis.support.open_archives import opened
from residua.analysis.support.plots import heat_maps
from residua.analysis.support.sums import in_order
from residua.store.base.errors import AnalysisError
from residua.store.base.naming import named
from residua.store.base.sizes import Size
from residua.store.format.archive_metadata import said_of
from residua.store.read.archive import Archive
from residua.store.read.stacks import open_archive
from residua.store.read.text import token_texts
from residua.store.storage.files import write_file
from residua.store.storage.place import result_folder

TABLE, LINES, PICTURE = "measures.parquet", "measures.csv", "measures.png"
_MOST_TOKENS = 1_024  # of an example that is shown: its file grows with them
_MOST_EXAMPLES = 2_000  # that examples are chosen from
_INTERVALS = 10
_KEYS = 8  # stored for a query
_LEAST_WEIGHT = 0.005  # stored
_DIGITS = 4  # HeadVis advises to round weights
_MOST_LISTED = 50  # tokens of a list
_JOB_EXAMPLES = 8
_DISTANCES = (0, *(2**power for power in range(13)))
_LEVELS = 50  # bins of the strongest weights

_TEXTS = {
    "self_attention_score": "Mean attention of a token to itself",
    "previous_token_score": "Mean attention to the token before",
    "pattern_entropy": "Mean Shannon entropy of a query's attention (nats)",
    "qk_distance": "Mean distance of query and key, weighted by attention (tokens)",
    "qk_distance_variance": "Variance of that distance (tokens squared)",
    "induction_score": "Mean attention to all tokens that followed an earlier occurrence of the query's token",
}


def heads(
    archive: Archive | str | PathLike[str],
    *,
    out: str | PathLike[str] | None = None,
    layers: Sequence[int] | None = None,
    source: Source | None = None,
    sequences: int = 2,
    cluster: Cluster | None = None,
    most_bytes: Size = MOST_BYTES,
    job_pairs: int = JOB_PAIRS,
    storage_options: Mapping[str, Any] | None = None,
) -> pa.Table:
    """Measure what every attention head looks at, as HeadVis does, and write the files that its page opens.

    The definitions are in `residua.analysis.attention.heads`. The model is not needed.

    Args:
        archive: The archive, or its path or address. It holds `q` and `k` sites with all positions, or `pattern` sites.
        out: Folder for ``measures.parquet``, ``measures.csv``, ``measures.png`` and HeadVis's tree, which replace files
            of the same names, or its address in a bucket; None writes nothing.
        layers: Layers to measure; None: all layers whose weights are known.
        source: ``pattern`` or ``qk``; None: patterns if they are stored.
        sequences: Examples that are shown of each head at each of ten levels of its strongest attention; 0 shows none.
        cluster: Where the jobs run, from `residua.analysis.support.cluster.connect`; None: in this process.
        most_bytes: Memory limit of a job, in bytes or as a text such as ``1GiB``, not counting the tokens of an
            example. To show examples, a job also holds the keys of one of up to 1,024 tokens.
        job_pairs: Pairs of query and key that a job covers at most, if it has more than one example.
        storage_options: For addresses, as for `residua.open`.

    Returns:
        One line for each head, with the columns ``layer`` and ``head`` (int32) and, float64, ``self_attention_score``,
        ``previous_token_score``, ``pattern_entropy`` (nats), ``qk_distance`` (tokens), ``qk_distance_variance`` and
        ``induction_score``. A measure is null if no stored query has a key that counts.

    Raises:
        AnalysisError: The archive lacks the sites, or its attention weights do not follow from queries and keys.
        NotCapturedError: The archive is not fully captured.
        OSError: The folder cannot be written; this is tried before anything is computed.

    Example:
        >>> residua.heads("acts.zarr", out="heads").sort_by([("induction_score", "descending")])  # doctest: +SKIP
    """
    if sequences < 0:
        raise AnalysisError(f"{named('sequences', sequences)}: give 0, which shows no examples, or more")
    archive = open_archive(archive, storage_options=storage_options)
    with nullcontext() if out is None else result_folder(out, storage_options) as folder:
        found = measure_heads(
            archive, layers=layers, source=source, cluster=cluster, most_bytes=most_bytes, job_pairs=job_pairs
        )
        if folder is not None:
            _write(folder, archive, found, sequences, or_inline(cluster))
    return found.table


def _write(folder: Path, archive: Archive, found: HeadMeasures, sequences: int, cluster: Cluster) -> None:
    chosen = _choose(archive, found, sequences)
    for name in ("heads", "attributions"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    texts: dict[int, list[str]] = {}
    for layer, of_heads in _attention(found, chosen, cluster):
        for head, shown in enumerate(of_heads):
            for one in shown:
                if one.example not in texts:
                    texts[one.example] = _texts(archive, one.example)
            content = _head_file(shown, texts, found.strongest[layer][:, head])
            _write_json(folder / "heads" / f"L{layer}H{head}.json", content)
    rows = [
        {name: value if name in ("layer", "head") else _rounded(value, 6) for name, value in line.items()}
        for line in found.table.to_pylist()
    ]
    _write_json(folder / "scatter_data.json", rows)
    _write_json(folder / "server_config.json", {})
    _write_json(folder / "attributions" / "manifest.json", {})
    pq.write_table(found.table, folder / TABLE)
    pyarrow.csv.write_csv(found.table, folder / LINES)
    _draw(folder / PICTURE, found.table, _model_name(archive))
    _write_json(folder / "config.json", _config(archive, found.table, chosen.n_intervals))


class _Shown(NamedTuple):
    """An example that is shown of a head, and the head's strongest pairs in it."""

    example: int
    interval: int
    strongest: float
    indices: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64]


class _Chosen(NamedTuple):
    """Which examples are shown.

    Attributes:
        n_intervals: Number of levels.
        examples: By layer, for each head its examples and their levels, from 1, the strongest last.
    """

    n_intervals: int
    examples: dict[int, list[list[tuple[int, int]]]]


def _choose(archive: Archive, found: HeadMeasures, sequences: int) -> _Chosen:
    """Choose `sequences` examples of each level of each head, evenly over the level; of the highest, the strongest."""
    n_tokens = archive.example_table.index().n_tokens
    fitting = np.flatnonzero((n_tokens > 1) & (n_tokens <= _MOST_TOKENS))
    among = fitting[np.linspace(0, len(fitting) - 1, min(len(fitting), _MOST_EXAMPLES)).astype(np.int64)]
    n_intervals = max(1, min(_INTERVALS, len(among)))

    def of_head(strongest: npt.NDArray[np.float32]) -> list[tuple[int, int]]:
        levels = np.array_split(among[np.argsort(strongest[among], kind="stable")], n_intervals)
        picked = []
        for number, level in enumerate(levels, start=1):
            count = min(sequences, len(level))
            first = len(level) - count if number == n_intervals else 0
            places = np.linspace(first, len(level) - 1, count).round().astype(np.int64)
            picked += [(int(example), number) for example in level[places]]
        return picked

    return _Chosen(
        n_intervals, {layer: [of_head(values) for values in by_head.T] for layer, by_head in found.strongest.items()}
    )


class _ShowJob(NamedTuple):
    """The heads whose attention is needed, by example, in one layer."""

    job: AttentionJob
    heads: dict[int, list[int]]


_Pairs = dict[tuple[int, int], tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]
"""By example and head: the flat indices of its strongest pairs, and their weights."""


def _attention(found: HeadMeasures, chosen: _Chosen, cluster: Cluster) -> Iterator[tuple[int, list[list[_Shown]]]]:
    """Yield each layer with what is shown of each of its heads."""
    by_layer = {job.layer: job for job in found.jobs}
    jobs: list[_ShowJob] = []
    for layer, of_heads in chosen.examples.items():
        needed: dict[int, list[int]] = {}
        for head, picked in enumerate(of_heads):
            for example, _ in picked:
                needed.setdefault(example, []).append(head)
        examples = sorted(needed)
        groups = [examples[i : i + _JOB_EXAMPLES] for i in range(0, len(examples), _JOB_EXAMPLES)] or [[]]
        jobs += [_ShowJob(by_layer[layer], {example: needed[example] for example in group}) for group in groups]
    pairs: _Pairs = {}
    results = in_order(cluster.map(_pairs, jobs, label="reading attention"))
    for number, part in enumerate(results):
        pairs |= part
        layer = jobs[number].job.layer
        if number + 1 == len(jobs) or jobs[number + 1].job.layer != layer:
            yield (
                layer,
                [
                    [
                        _Shown(example, level, float(found.strongest[layer][example, head]), *pairs[example, head])
                        for example, level in picked
                    ]
                    for head, picked in enumerate(chosen.examples[layer])
                ],
            )
            pairs = {}


def _pairs(asked: _ShowJob) -> _Pairs:
    """Return the strongest pairs of some heads in some examples."""
    archive = opened(asked.job.location)
    found: _Pairs = {}
    for example, of_example in asked.heads.items():
        weights = weights_of(archive, asked.job._replace(first=example, last=example + 1))
        rows = ExampleRows.of(archive.example_table, example)
        for head in of_example:
            indices, values = [], []
            for query_Q, weight_QK in weights.rows(rows, head):
                top, key = weight_QK.topk(min(_KEYS, rows.n_tokens), dim=-1)
                kept = top >= _LEAST_WEIGHT
                indices.append((query_Q[:, None] * rows.n_tokens + key)[kept])
                values.append(top[kept])
            order = torch.cat(indices).argsort()
            found[example, head] = (
                torch.cat(indices)[order].numpy(),
                torch.cat(values)[order].double().numpy().round(_DIGITS),
            )
    return found


def _head_file(
    shown: Sequence[_Shown], texts_of: Mapping[int, list[str]], strongest: npt.NDArray[np.float32]
) -> dict[str, Any]:
    """Return the content of one head's file."""
    distances = np.zeros(len(_DISTANCES) - 1)
    marginals: list[dict[str, float]] = [defaultdict(float), defaultdict(float)]  # by the text of query and key
    sequences = []
    for one in shown:
        texts = texts_of[one.example]
        places = np.divmod(one.indices, len(texts))
        distances += np.histogram(np.abs(places[0] - places[1]), _DISTANCES, weights=one.weights)[0]
        for marginal, at in zip(marginals, places, strict=True):
            for text, weight in zip(texts, np.bincount(at, one.weights, len(texts)).tolist(), strict=True):
                marginal[text] += weight
        sequences.append(
            {
                "sequence_id": one.example,
                "interval": one.interval,
                "tokens": texts,
                "attention_indices": one.indices.tolist(),
                "attention_values": one.weights.tolist(),
                "seq_len": len(texts),
                "max_activation": _rounded(one.strongest, _DIGITS),
            }
        )
    counts, edges = np.histogram(strongest, _LEVELS, (0, 1))
    query, key = (
        [
            {"token": token, "weight": _rounded(weight, _DIGITS)}
            for token, weight in sorted(marginal.items(), key=lambda item: -item[1])[:_MOST_LISTED]
            if weight
        ]
        for marginal in marginals
    )
    return {
        "sequences": sequences,
        "qk_distance_histogram": {
            "bin_edges": list(_DISTANCES),
            "bin_values": [_rounded(value, _DIGITS) for value in distances.tolist()],
        },
        "top_query_tokens": query,
        "top_key_tokens": key,
        "histogram": {"bin_edges": edges.round(_DIGITS).tolist(), "bin_values": counts.tolist()},
        "statistics": {
            "n_samples": len(sequences),
            "mean_max_activation": _rounded(float(strongest.mean(dtype=np.float64)), _DIGITS),
        },
    }


def _texts(archive: Archive, example: int) -> list[str]:
    """Return a text for each token: its own, or its name in the vocabulary if it is a part of a character."""
    tokens = archive.example_table.tokens(example).tolist()
    tokenizer = archive.tokenizer
    if tokenizer is None:
        return [str(token) for token in tokens]
    texts = token_texts(tokenizer, tokens)
    return [
        text if text is not None else tokenizer.id_to_token(token) or str(token)
        for token, text in zip(tokens, texts, strict=True)
    ]


def _config(archive: Archive, table: pa.Table, n_intervals: int) -> dict[str, Any]:
    """Return what the page reads first."""
    places = list(zip(table["layer"].to_pylist(), table["head"].to_pylist(), strict=True))
    return {
        "model_name": _model_name(archive),
        "heads": places,
        "n_layers": len({layer for layer, _ in places}),
        "n_heads": 1 + max(head for _, head in places),
        "n_intervals": n_intervals,
        "metrics": list(MEASURES),
        "metric_descriptions": _TEXTS,
        "head_data_pattern": "L{layer}H{head}.json",
        "has_umap": False,
        "umap_heads": [],
        "custom_plots": [
            {"key": "qk_distance_histogram", "label": "Q-K distance"},
            {"key": "histogram", "label": "Strongest attention of an example"},
        ],
        "custom_tables": [
            {"key": "top_query_tokens", "label": "Query tokens with most attention"},
            {"key": "top_key_tokens", "label": "Key tokens with most attention"},
        ],
        "statistics_display": {
            "n_samples": {"label": "Examples shown", "format": "default"},
            "mean_max_activation": {"label": "Mean strongest attention", "format": "default"},
        },
    }


def _model_name(archive: Archive) -> str:
    facts = said_of("model", archive.provenance)
    return str(facts.get("id") or facts.get("class") or archive.plan.model.get("class") or "model")


def _rounded(value: float | None, digits: int) -> float | None:
    """Return a number for JSON, which has no NaN."""
    return None if value is None or not np.isfinite(value) else round(float(value), digits)


def _write_json(path: Path, content: object) -> None:
    write_file(path, [json.dumps(content, ensure_ascii=False, allow_nan=False).encode()])


def _draw(path: Path, table: pa.Table, name: str) -> None:
    layers = sorted(set(table["layer"].to_pylist()))
    places = [layers.index(layer) for layer in table["layer"].to_pylist()], table["head"].to_pylist()
    panels = {}
    for measure in MEASURES:
        panels[measure.replace("_", " ")] = cells = np.full((len(layers), 1 + max(places[1])), np.nan)
        cells[places] = table[measure].to_numpy()
    title = f"Attention heads of {name}".replace("$", r"\$")
    heat_maps(path, panels, title=title, x_name="head", y_name="layer", y_ticks=[str(layer) for layer in layers])

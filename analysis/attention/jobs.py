"""Scoring attention as jobs: one layer of some examples each, opened where it runs."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from residua.analysis.attention.queries_and_keys import QueriesAndKeys
from residua.analysis.attention.token_matches import Match
from residua.analysis.attention.weights import ExampleRows, ExampleSums, StoredPattern, Weights
from residua.analysis.support.cluster import Cluster, or_inline
from residua.analysis.support.open_archives import address, opened
from residua.store.base.errors import AnalysisError
from residua.store.format.sidecars import ATTENTION_FILE, AttentionSpec, attention_from_json
from residua.store.format.site_names import parse_site
from residua.store.read.archive import Archive

Result = TypeVar("Result")
Source = Literal["pattern", "qk"]
MOST_BYTES = 64 * 2**20
_JOB_PAIRS = 2**27  # of query and key: seconds of work, so that jobs are many and their overhead is none


class AttentionJob(NamedTuple):
    """One layer of the examples `first` to `last` (not included) of the archive at `path`."""

    path: str
    layer: int
    source: Source
    first: int
    last: int
    most_bytes: int


def attention_jobs(
    archive: Archive, *, layers: Sequence[int] | None, source: Source | None, most_bytes: int
) -> list[AttentionJob]:
    """Cut the scoring of an archive into jobs, the same however many workers there are.

    Args:
        archive: The archive.
        layers: Layers to score; None: all that have what is needed.
        source: Whether weights come from `pattern` sites or from `q` and `k`; None: from patterns where they are
            stored, else from the others.
        most_bytes: Memory that a job keeps to.

    Raises:
        AnalysisError: A layer lacks what is needed, or its weights do not follow from queries and keys.
    """
    index = archive.example_table.index()
    if not index.n_examples:
        raise AnalysisError(f"{archive.path} has no examples, so there is nothing to score")
    examples: list[tuple[int, int]] = []
    first, pairs = 0, 0
    for example, n_tokens in enumerate(index.n_tokens.tolist()):
        if pairs and pairs + n_tokens**2 > _JOB_PAIRS:
            examples.append((first, example))
            first, pairs = example, 0
        pairs += n_tokens**2
    examples.append((first, index.n_examples))
    return [
        AttentionJob(address(archive), layer, how, first, last, most_bytes)
        for layer, how in _sources(archive, layers, source).items()
        for first, last in examples
    ]


def _sources(archive: Archive, layers: Sequence[int] | None, source: Source | None) -> dict[int, Source]:
    """Return where the weights of each layer come from."""
    kinds: dict[int, set[str]] = {}
    for site in map(parse_site, archive.sites):
        kinds.setdefault(-1 if site.layer is None else site.layer, set()).add(site.kind)
    there: dict[int, Source] = {}
    for layer in sorted(kinds):
        if (how := _source(kinds[layer], source)) is not None:
            there[layer] = how
    missing = sorted(set(layers or ()) - set(there))
    if missing or not there:
        what = {"pattern": "pattern sites", "qk": "q and k sites", None: "pattern sites, nor q and k sites"}[source]
        where = f"layer {missing[0]} of {archive.path}" if missing else str(archive.path)
        raise AnalysisError(f"{where} has no {what}: capture with --sites 'q.*,k.*', which is the smaller way")
    chosen: dict[int, Source] = {layer: there[layer] for layer in there if layers is None or layer in layers}
    for layer, from_where in chosen.items():
        if from_where == "qk":
            attention_spec(archive, layer)  # here, so that jobs that cannot be done are not begun
    return chosen


def _source(kinds: set[str], wanted: Source | None) -> Source | None:
    if "pattern" in kinds and wanted != "qk":
        return "pattern"
    return "qk" if {"q", "k"} <= kinds and wanted != "pattern" else None


def attention_spec(archive: Archive, layer: int) -> AttentionSpec:
    """Return how the weights of `layer` follow from its stored queries and keys.

    Raises:
        AnalysisError: They do not, or the archive does not say it.
    """
    text = archive.side_file(f"head/{ATTENTION_FILE}")
    spec = None if text is None else attention_from_json(text).get(layer)
    if isinstance(spec, AttentionSpec):
        return spec
    reason = spec or "the archive does not say how; it was captured before this was written down"
    raise AnalysisError(
        f"the attention weights of layer {layer} of {archive.path} cannot be made from q and k: {reason}. Capture "
        "pattern sites, or choose other layers."
    )


def run_jobs(
    function: Callable[[AttentionJob], Result], jobs: Sequence[AttentionJob], *, cluster: Cluster | None, label: str
) -> dict[int, list[Result]]:
    """Return the results of each layer in the order of its jobs, so that sums do not depend on who was faster."""
    done = dict(or_inline(cluster).map(function, jobs, label=label))
    layers: dict[int, list[Result]] = {}
    for number, job in enumerate(jobs):
        layers.setdefault(job.layer, []).append(done[number])
    return layers


def example_sums(job: AttentionJob, matches: Callable[[int, Tensor], Sequence[Match]]) -> Iterator[ExampleSums]:
    """Yield what each example of a job adds up to; `matches` is called with its number and its tokens (int64).

    Raises:
        AnalysisError: The budget is too small, or an example lacks rows that its weights depend on.
    """
    archive = opened(job.path)
    weights = _weights(archive, job)
    table = archive.example_table
    for example in range(job.first, job.last):
        rows = range(*table.rows(example))
        tokens = torch.from_numpy(table.tokens(example).astype("int64"))
        if job.source == "qk" and len(rows) < len(tokens):
            raise AnalysisError(
                f"example {example} of {archive.path} keeps {len(rows)} of its {len(tokens)} positions, and attention "
                "weights need every key: capture all positions, special tokens too, or capture pattern sites"
            )
        positions = torch.from_numpy(table.positions(example).astype("int64"))
        yield weights.sums(ExampleRows(rows, positions, len(tokens)), matches(example, tokens))


def _weights(archive: Archive, job: AttentionJob) -> Weights:
    if job.source == "pattern":
        return StoredPattern(archive[f"pattern.{job.layer}"], most_bytes=job.most_bytes)
    query, key = (archive[f"{kind}.{job.layer}"] for kind in ("q", "k"))
    spec = attention_spec(archive, job.layer)
    if query.shape[1] % key.shape[1] or (spec.sinks is not None and len(spec.sinks) != query.shape[1]):
        raise AnalysisError(
            f"{archive.path}: {query.name} has {query.shape[1]} heads, which fits neither {key.name} with "
            f"{key.shape[1]} nor the sinks of layer {job.layer}: the archive is not one that Residua writes"
        )
    end = archive.example_table.rows(job.last - 1)[1]
    return QueriesAndKeys(query, key, spec, end=end, most_bytes=job.most_bytes)

"""Jobs that score attention heads: each reads one layer of some examples, and opens the archive where it runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

import pyarrow as pa
import torch
from torch import Tensor

from residua.analysis.attention.token_matches import Match
from residua.analysis.attention.weights import ExampleRows, ExampleSums, QueriesAndKeys, StoredPattern, Weights
from residua.analysis.support.cluster import Cluster, or_inline
from residua.analysis.support.open_archives import Location, location, opened
from residua.store.base.errors import AnalysisError
from residua.store.base.naming import named
from residua.store.base.sizes import Size, n_bytes
from residua.store.examples.index import has_no_tokens
from residua.store.format.sidecars import ATTENTION_FILE, AttentionSpec, attention_from_json
from residua.store.format.site_names import parse_site
from residua.store.read.archive import Archive

Result = TypeVar("Result")
Source = Literal["pattern", "qk"]
MOST_BYTES = 64 * 2**20
JOB_PAIRS = 2**27


class AttentionJob(NamedTuple):
    """One layer of the examples `first` to `last` (not included) of the archive at `location`."""

    location: Location
    layer: int
    source: Source
    first: int
    last: int
    most_bytes: int


def attention_jobs(
    archive: Archive,
    *,
    layers: Sequence[int] | None,
    source: Source | None,
    most_bytes: Size,
    job_pairs: int = JOB_PAIRS,
) -> list[AttentionJob]:
    """Return the jobs that score an archive; they are the same for any number of workers.

    Args:
        archive: The archive.
        layers: Layers to score; None: all layers whose weights are known.
        source: ``pattern``: use `pattern` sites; ``qk``: use `q` and `k` sites; None: use patterns if they are stored.
        most_bytes: Memory limit of a job: bytes, or a text such as ``1GiB``.
        job_pairs: Pairs of query and key that a job covers at most, if it has more than one example. The default takes
            seconds, so that there are many jobs and starting them costs little.

    Raises:
        AnalysisError: A layer lacks the sites, or its weights do not follow from queries and keys.
    """
    index = archive.example_table.index()
    if not index.n_examples:
        raise AnalysisError(f"{archive.place} has no examples, so there is nothing to score")
    examples: list[tuple[int, int]] = []
    first, pairs = 0, 0
    for example, n_tokens in enumerate(index.n_tokens.tolist()):
        if pairs and pairs + n_tokens**2 > job_pairs:
            examples.append((first, example))
            first, pairs = example, 0
        pairs += n_tokens**2
    examples.append((first, index.n_examples))
    memory = n_bytes(most_bytes, "most_bytes")
    return [
        AttentionJob(location(archive), layer, layer_source, first, last, memory)
        for layer, layer_source in _sources(archive, layers, source).items()
        for first, last in examples
    ]


def _sources(archive: Archive, layers: Sequence[int] | None, source: Source | None) -> dict[int, Source]:
    """Return where the weights of each layer come from."""
    stored = {(site.layer, site.kind) for site in map(parse_site, archive.sites)}
    found: dict[int, Source] = {}
    for layer in sorted({layer for layer, _ in stored if layer is not None}):
        if (layer, "pattern") in stored and source != "qk":
            found[layer] = "pattern"
        elif {(layer, "q"), (layer, "k")} <= stored and source != "pattern":
            found[layer] = "qk"
    missing = sorted(set(layers or ()) - set(found))
    if missing or not found:
        what = {"pattern": "pattern sites", "qk": "q and k sites", None: "pattern sites, nor q and k sites"}[source]
        where = f"layer {missing[0]} of {archive.place}" if missing else archive.place
        raise AnalysisError(f"{where} has no {what}: capture with {named('sites', 'q.*,k.*')}, which takes less space")
    asked: dict[int, Source] = {layer: found[layer] for layer in found if layers is None or layer in layers}
    for layer, layer_source in asked.items():
        if layer_source == "qk":
            attention_spec(archive, layer)  # raises here, before any job starts
    return asked


def attention_spec(archive: Archive, layer: int) -> AttentionSpec:
    """Return how the weights of `layer` follow from its stored queries and keys.

    Raises:
        AnalysisError: They do not follow, or the archive does not say how.
    """
    text = archive.side_file(f"head/{ATTENTION_FILE}")
    spec = None if text is None else attention_from_json(text).get(layer)
    if isinstance(spec, AttentionSpec):
        return spec
    reason = spec or "the archive does not say how; it comes from a version that did not record this"
    raise AnalysisError(
        f"the attention weights of layer {layer} of {archive.place} cannot be computed from q and k: {reason}. Capture "
        "pattern sites, or choose other layers."
    )


def run_jobs(
    function: Callable[[AttentionJob], Result], jobs: Sequence[AttentionJob], *, cluster: Cluster | None, label: str
) -> dict[int, list[Result]]:
    """Return the results of each layer in the order of its jobs, so that sums do not depend on which ended first."""
    done = dict(or_inline(cluster).map(function, jobs, label=label))
    layers: dict[int, list[Result]] = {}
    for number, job in enumerate(jobs):
        layers.setdefault(job.layer, []).append(done[number])
    return layers


def head_table(scores: Mapping[int, Mapping[str, Sequence[float | None]]]) -> pa.Table:
    """Return a table with one line for each head, from the scores of each layer's heads by name.

    Its columns are ``layer`` and ``head``, int32, and the scores, float64; a score that is None is null.
    """
    layers = []
    for layer, columns in scores.items():
        values = {name: pa.array(heads, pa.float64()) for name, heads in columns.items()}
        n_heads = len(next(iter(values.values())))
        heads = pa.array(range(n_heads), pa.int32())
        layers.append(pa.table({"layer": pa.repeat(pa.scalar(layer, pa.int32()), n_heads), "head": heads, **values}))
    return pa.concat_tables(layers).combine_chunks()


def example_sums(
    job: AttentionJob,
    matches: Callable[[int, Tensor], Sequence[Match]],
    *,
    need_all: bool = False,
    shape: bool = False,
) -> Iterator[ExampleSums]:
    """Yield the sums of each example of a job.

    Args:
        job: The job.
        matches: Given the number of an example and its tokens (int64), returns which keys count.
        need_all: Whether patterns need all positions too, as weights from queries and keys do.
        shape: Whether to sum entropies and distances, too.

    Raises:
        AnalysisError: The memory limit is too small, or an example lacks rows that its weights depend on.
    """
    archive = opened(job.location)
    weights = weights_of(archive, job)
    table = archive.example_table
    for example in range(job.first, job.last):
        if has_no_tokens(table.tokens(example)):
            raise AnalysisError(
                f"example {example} of {archive.place} has no tokens, by which the scores of heads choose keys: it was "
                "recorded from embeddings or other inputs. Record calls with input_ids."
            )
        example_rows = ExampleRows.of(table, example)
        n_kept, n_tokens = len(example_rows.rows), example_rows.n_tokens
        if (need_all or job.source == "qk") and n_kept < n_tokens:
            why = "scores of full patterns need all" if need_all else "attention weights need every key"
            raise AnalysisError(
                f"example {example} of {archive.place} keeps {n_kept} of its {n_tokens} positions, but {why}: "
                f"capture all positions, special tokens too{'' if need_all else ', or capture pattern sites'}"
            )
        tokens = torch.from_numpy(table.tokens(example).astype("int64"))
        yield weights.sums(example_rows, matches(example, tokens), shape=shape)


def weights_of(archive: Archive, job: AttentionJob) -> Weights:
    """Return what computes or reads the attention weights of a job's layer."""
    if job.source == "pattern":
        return StoredPattern(archive[f"pattern.{job.layer}"], most_bytes=job.most_bytes)
    query, key = (archive[f"{kind}.{job.layer}"] for kind in ("q", "k"))
    spec = attention_spec(archive, job.layer)
    if query.shape[1] % key.shape[1] or (spec.sinks is not None and len(spec.sinks) != query.shape[1]):
        raise AnalysisError(
            f"{archive.place}: {query.name} has {query.shape[1]} heads, which fits neither {key.name} with "
            f"{key.shape[1]} nor the sinks of layer {job.layer}: Residua did not write this archive"
        )
    end = archive.example_table.rows(job.last - 1)[1]
    return QueriesAndKeys(query, key, spec, end=end, most_bytes=job.most_bytes)

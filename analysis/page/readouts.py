"""What a lens reads out of the residual stream under each token: its most probable tokens."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from residua.analysis.lens.checkpoint import Translator
from residua.analysis.lens.lens import TunedLens
from residua.analysis.lens.lm_head import LMHead, load_lm_head
from residua.analysis.lens.rows import layer_of
from residua.analysis.lens.unembedding import Decoder
from residua.analysis.page.measures import ShownRows
from residua.analysis.rows.blocks import grouped
from residua.analysis.support.cluster import Cluster
from residua.analysis.support.kept import kept
from residua.analysis.support.open_archives import Location, location, opened
from residua.analysis.support.sums import by_key
from residua.store.base.errors import AnalysisError
from residua.store.edits.lens_files import BLOCKS_BEFORE
from residua.store.format.sidecars import LM_HEAD_FILE
from residua.store.format.site_names import parse_site
from residua.store.read.archive import Archive

ANALYSIS = "page"
"""Name of what a worker keeps for the read-outs."""

_DECODED = ("", "decoder", "text")  # stacks that the LM head belongs to
_ROWS_PER_JOB = 4096
_LOGITS_BYTES = 2**28  # of one piece of a job
_LENS_SHARE = 4  # of a worker's memory, which a kept lens may fill


class Readouts(NamedTuple):
    """The most probable tokens of rows: ids int32 and probabilities float32, (rows, k) each."""

    tokens: npt.NDArray[np.int32]
    probabilities: npt.NDArray[np.float32]


class _Job(NamedTuple):
    location: Location
    site: str
    rows: Sequence[ShownRows]
    lens: Location | None
    k: int
    most_bytes: int


class _Loaded(NamedTuple):
    decoder: Decoder
    tuned: TunedLens | None
    n_bytes: int


def lens_sites(archive: Archive, sites: Sequence[str], lens: Location | None) -> list[str]:
    """Return those of `sites` that a lens decodes: `resid_pre`, `resid_post`, and where a tuned lens was trained.

    Without a tuned lens it is the logit lens, if the archive has an LM head.

    Raises:
        AnalysisError: A tuned lens was given, and it decodes none of the sites.
    """
    parsed = {site: parse_site(site) for site in sites}
    stream = [name for name, site in parsed.items() if site.kind in BLOCKS_BEFORE and site.stack in _DECODED]
    if lens is None:
        if not stream or f"head/{LM_HEAD_FILE}" not in archive.metadata.files:
            return []
        width = load_lm_head(archive.head).width
        return [site for site in stream if archive[site].shape[1:] == (width,)]
    tuned = TunedLens.load(lens.place, **lens.options)
    width, known = tuned.config.d_model, {*tuned.translators, tuned.config.num_hidden_layers}
    found = [site for site in stream if layer_of(site) in known and archive[site].shape[1:] == (width,)]
    if not found:
        raise AnalysisError(
            f"the lens {lens} decodes layers {', '.join(map(str, sorted(known)))} of width {width}, and the page has "
            f"none of them: its sites are {', '.join(sites)}"
        )
    return found


def read_out(
    archive: Archive,
    sites: Sequence[str],
    rows: Sequence[ShownRows],
    *,
    lens: Location | None,
    k: int,
    cluster: Cluster,
) -> Iterator[tuple[str, Readouts]]:
    """Decode rows of the residual stream.

    Args:
        archive: The archive.
        sites: Sites of `lens_sites`.
        rows: The rows of the examples that are decoded.
        lens: Where a tuned lens is, with what loading it takes; None: the logit lens.
        k: Tokens to keep of each row.
        cluster: Where to compute.

    Yields:
        Each site, as it is done, and its read-outs, for the rows of all examples.
    """
    groups = grouped(rows, _ROWS_PER_JOB)
    most_bytes = cluster.memory_limit // _LENS_SHARE
    jobs = [_Job(location(archive), site, group, lens, k, most_bytes) for site in sites for group in groups]
    results = cluster.map(_read_out, jobs, label="lens read-outs")
    for site, found in by_key(results, [job.site for job in jobs], len(groups)):
        yield site, Readouts(*map(np.concatenate, zip(*found, strict=True)))
    cluster.let_go(ANALYSIS)


def _read_out(job: _Job) -> Readouts:
    """Decode the rows of one job; runs where the job runs."""
    archive = opened(job.location)
    key = (str(job.location), str(job.lens))
    loaded = kept(ANALYSIS, key, partial(_load, archive, job.lens), lambda one: one.n_bytes, most_bytes=job.most_bytes)
    n_tokens = loaded.decoder.unembedding.n_tokens
    height, k = max(1, _LOGITS_BYTES // (4 * n_tokens)), min(job.k, n_tokens)
    tokens, probabilities = [torch.zeros(0, k, dtype=torch.int64)], [torch.zeros(0, k)]
    for first, stop in job.rows:
        for start in range(first, stop, height):
            hidden = archive[job.site].torch(slice(start, min(start + height, stop)), dtype=torch.float32)
            final = hidden if loaded.tuned is None else loaded.tuned.apply(job.site, hidden)
            found = torch.softmax(loaded.decoder.logits(final), -1).topk(k)
            tokens.append(found.indices)
            probabilities.append(found.values)
    return Readouts(torch.cat(tokens).numpy().astype(np.int32), torch.cat(probabilities).numpy())


def _load(archive: Archive, lens: Location | None) -> _Loaded:
    tuned = None if lens is None else TunedLens.load(lens.place, **lens.options)
    head = load_lm_head(archive.head) if tuned is None else tuned.head
    maps = () if tuned is None else tuned.translators.values()
    n_bytes = _bytes_of(head) + sum(tensor.numel() * 4 for one in maps for tensor in Translator(*one))
    return _Loaded(Decoder(head, most_bytes=_LOGITS_BYTES), tuned, n_bytes)


def _bytes_of(head: LMHead) -> int:
    return sum(tensor.numel() * 4 for tensor in head.parameters.values())

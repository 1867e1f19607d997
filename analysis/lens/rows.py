"""The data of a lens: the points of the residual stream that it maps, and the rows that train and evaluate it.

A lens numbers points by the block that reads them, as the `tuned-lens` package does: layer *l* is the input of block
*l*, which is the output of block *l* - 1. The last layer, the number of blocks, is the input of the final norm.

Training rows are chunks of 128 rows drawn at random from the full archive. A document is held out with all its rows,
and with all documents of equal content, by a hash of its number. Everything follows from the archive and the settings
alone, so every job finds the same rows.
"""

import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from residua.analysis.lens.lens_settings import LensSettings
from residua.analysis.rows.blocks import blocks
from residua.analysis.rows.columns import checked_examples
from residua.analysis.rows.groups import example_groups
from residua.analysis.rows.held_out import held_out_groups
from residua.store.base.errors import AnalysisError, PlanError
from residua.store.base.naming import named
from residua.store.base.untrusted import check_file
from residua.store.edits.lens_files import BLOCKS_BEFORE, lens_layer
from residua.store.format.archive_metadata import said_of
from residua.store.format.sidecars import CONFIG_FILE, LM_HEAD_FILE, why_no_lm_head
from residua.store.format.site_names import parse_site
from residua.store.read.archive import Archive

MOST_BLOCKS = 4096  # the deepest models have some hundreds
_BLOCK_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")  # keys of a model's config
_DECODER_COUNTS = ("num_decoder_layers", "decoder_layers")  # of an encoder-decoder
_MOST_CONFIG_BYTES = 2**24
CHUNK_ROWS = 128
_MOST_SITE_BYTES = 2**28  # rows of one site in memory at a time

Rows = npt.NDArray[np.int64]


class LensPoints(NamedTuple):
    """The points of an archive that a lens is trained on.

    Attributes:
        sites: Sites by layer.
        final: Site of the final residual stream.
        n_blocks: Number of blocks of the model.
        width: Width of the residual stream.
    """

    sites: dict[int, str]
    final: str
    n_blocks: int
    width: int


def layer_of(site: str) -> int:
    """Return the layer of `site` in a lens, the number of blocks before it.

    Raises:
        AnalysisError: The site is not a `resid_pre` or `resid_post`.
        UnknownSiteError: It is not a site.
    """
    try:
        return lens_layer(parse_site(site))
    except PlanError as error:
        raise AnalysisError(str(error)) from None


def lens_points(archive: Archive, sites: str | Iterable[str] | None = None) -> LensPoints:
    """Find the points of an archive that a lens can be trained on.

    If `final` was not captured, the output of the last block replaces it; both have the same values. The final residual
    stream itself needs no lens and is left out.

    Args:
        archive: The archive.
        sites: Patterns of `resid_pre` and `resid_post` sites; by default all stored ones.

    Raises:
        AnalysisError: The final residual stream is not stored, or no other point is.
        UnknownSiteError: A pattern matches no stored site.
    """
    stored = [site for site in archive.sites if parse_site(site).kind in BLOCKS_BEFORE]
    chosen = stored if sites is None else list(archive.select(sites))
    stack = next((parse_site(site).stack for site in stored), "")
    prefix = f"{stack}." if stack else ""
    n_blocks = _count_blocks(archive, stack)
    last = f"{prefix}resid_post.{n_blocks - 1}"
    final = f"{prefix}final" if f"{prefix}final" in archive.sites else last
    if final not in archive.sites:
        raise AnalysisError(
            f"{archive.place} holds neither final nor {last}, the residual stream that a lens maps to: capture again "
            f"with {named('sites', 'resid_post.*')}; it holds {', '.join(archive.sites)}"
        )
    by_layer = {layer_of(site): site for site in chosen if site != final and layer_of(site) < n_blocks}
    if not by_layer:
        raise AnalysisError(
            f"a lens needs resid_pre or resid_post sites before the final residual stream, but the chosen sites are "
            f"{', '.join(chosen) or 'none'}; {archive.place} holds {', '.join(archive.sites)}"
        )
    (width,) = archive.plan.site(final).row_shape
    return LensPoints(dict(sorted(by_layer.items())), final, n_blocks, width)


def _count_blocks(archive: Archive, stack: str) -> int:
    """Return the number of blocks of the model, or of its decoder, from its config, which the archive stores."""
    name = f"head/{CONFIG_FILE}"
    where = f"{archive.place}/{name}"
    if f"head/{LM_HEAD_FILE}" not in archive.metadata.files:
        raise AnalysisError(f"{archive.place}: {why_no_lm_head(archive.provenance)}")
    try:
        if name in archive.metadata.files:
            check_file(archive.path, archive.file(name, _MOST_CONFIG_BYTES), _MOST_CONFIG_BYTES)
        config = json.loads(archive.side_file(name) or b"")
    except (ValueError, RecursionError) as error:
        raise AnalysisError(
            f"{where} cannot be read ({error}): a lens decodes with the model's final norm and unembedding, which an "
            "archive of a causal or masked language model has in its folder head; capture such a model again"
        ) from error
    counts = (*_DECODER_COUNTS, *_BLOCK_COUNTS) if stack == "decoder" else _BLOCK_COUNTS
    mappings = (config.get("text_config"), config.get(stack), config) if isinstance(config, dict) else ()
    for mapping in mappings:
        for key in counts:
            found = mapping.get(key) if isinstance(mapping, dict) else None
            if isinstance(found, int) and 0 < found <= MOST_BLOCKS:
                return found
    raise AnalysisError(f"{where} does not give the number of blocks of the model, as {' or '.join(_BLOCK_COUNTS)}")


class LensRows:
    """The rows of one archive that train and evaluate a lens.

    Args:
        archive: The archive; only committed rows are used.
        settings: How many rows to use, and which examples are held out.
        held_out: `held_out` of another object for the same archive and settings: finding it reads all tokens.
        chunk_rows: Rows that are chosen together, unless a shard has fewer.

    Attributes:
        settings: The settings.
        held_out: Whether each example is held out, as packed bits.
    """

    def __init__(
        self,
        archive: Archive,
        settings: LensSettings,
        *,
        held_out: npt.NDArray[np.uint8] | None = None,
        chunk_rows: int = CHUNK_ROWS,
    ) -> None:
        self._archive = archive
        self.settings = settings
        if held_out is None:
            groups = example_groups(archive, settings.group)
            held_out = np.packbits(held_out_groups(groups, fraction=settings.held_out, seed=settings.seed))
        self.held_out = held_out
        n_examples = archive.example_table.index().n_examples
        self._is_held_out = np.unpackbits(held_out, count=n_examples).astype(np.bool_)
        self._height = min(chunk_rows, archive.plan.rows_per_shard)

    def chunks(self) -> Rows:
        """Return the first rows of the chunks that train, in ascending order."""
        starts = [np.arange(start, stop, self._height) for start, stop in blocks(self._archive)]
        found = np.concatenate([np.zeros(0, np.int64), *starts])
        wanted = self.settings.rows
        if wanted is not None:
            n_chunks = max(1, round(wanted / self._height / (1 - self.settings.held_out)))
            found = np.random.default_rng(self.settings.seed).permutation(found)[:n_chunks]
        return np.sort(found)

    def estimated_training_rows(self) -> int:
        """Return about how many rows train, without reading any."""
        return round(len(self.chunks()) * self._height * (1 - self.settings.held_out))

    def training_rows(self, chunks: Rows) -> Rows:
        """Return the rows of `chunks` that train: no held-out example, no first position."""
        rows = (chunks[:, None] + np.arange(self._height)).reshape(-1)
        rows = rows[rows < self._archive.n_rows]  # only the last shard may be short
        stored = self._archive.rows.example.numpy(rows).astype(np.int64)
        examples = checked_examples(self._archive, rows, stored)
        is_used = ~self._is_held_out[examples] & self._is_late(rows)
        return np.asarray(rows[is_used])

    def epoch_rows(self, site: str, epoch: int, part: int, n_parts: int) -> Iterator[Rows]:
        """Yield the training rows of one pass, with chunks in random order, at most 256 MiB per site at a time.

        Args:
            site: One of the sites that are read.
            epoch: Number of the pass; decides the order.
            part: Which of `n_parts` disjoint sets of rows to use.
            n_parts: Number of these sets.
        """
        chunks = np.random.default_rng([self.settings.seed, 1]).permutation(self.chunks())[part::n_parts]
        order = np.random.default_rng([self.settings.seed, 2, epoch]).permutation(chunks)
        n_chunks = max(1, _MOST_SITE_BYTES // (self._archive.plan.site(site).row_bytes * self._height))
        for start in range(0, len(order), n_chunks):
            yield self.training_rows(np.sort(order[start : start + n_chunks]))

    def held_out_rows(self, most: int | None = None) -> Rows:
        """Return rows of held-out examples drawn at random, in ascending order.

        Args:
            most: Most rows; by default the setting `held_out_rows`.

        Raises:
            AnalysisError: No captured example is held out.
        """
        most = self.settings.held_out_rows if most is None else most
        index = self._archive.example_table.index()
        examples = np.flatnonzero(self._is_held_out)
        examples = np.random.default_rng([self.settings.seed, 3]).permutation(examples)
        examples = examples[self._is_captured(index.first_row[examples])]
        enough = int(np.searchsorted(np.cumsum(index.n_rows[examples], dtype=np.int64), most)) + 1
        first, counts = index.first_row[examples[:enough]], index.n_rows[examples[:enough]]
        ranges = [np.arange(start, start + count) for start, count in zip(first, counts, strict=True)]
        rows = np.concatenate([np.zeros(0, np.int64), *ranges])
        rows = rows[self._is_captured(rows)][:most]
        rows = np.sort(rows[self._is_late(rows)])
        if not len(rows):
            raise AnalysisError(
                f"none of the {index.n_examples:,} examples of {self._archive.place} is both held out and captured, "
                "and a lens is evaluated on such examples. The windows of a document, and documents of equal content, "
                f"are held out together: capture more documents, or raise {named('held_out')} from "
                f"{self.settings.held_out}"
            )
        return rows

    def next_tokens(self, rows: Rows) -> Rows:
        """Return the token after each row; -1 at the end of its example, and for models that predict none."""
        found = np.full(len(rows), -1, np.int64)
        model = said_of("model", self._archive.provenance)
        if model.get("predicts") in ("tokens", "examples") or "MaskedLM" in str(model.get("class")):
            return found
        examples, following = self._archive.rows.example.numpy(rows), self._positions(rows) + 1
        for example in np.unique(examples).tolist():
            tokens = self._archive.example_table.tokens(example)
            here = np.flatnonzero(examples == example)
            here = here[following[here] < len(tokens)]
            found[here] = tokens[following[here]]
        return found

    def read(self, site: str, rows: Rows) -> Tensor:
        """Return the values of `rows` at `site`, (rows, width), in the stored type."""
        return self._archive[site].torch(rows)

    def _is_captured(self, rows: Rows) -> npt.NDArray[np.bool_]:
        return np.isin(rows // self._archive.plan.rows_per_shard, list(self._archive.commits))

    def _is_late(self, rows: Rows) -> npt.NDArray[np.bool_]:
        if not self.settings.skip_positions:
            return np.ones(len(rows), np.bool_)
        return self._positions(rows) >= self.settings.skip_positions

    def _positions(self, rows: Rows) -> Rows:
        return self._archive.rows.position.numpy(rows).astype(np.int64)

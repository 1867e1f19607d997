"""Which rows train a lens, and which judge it.

Training rows are chunks of 128 rows drawn from all over the archive, never its beginning alone, without those of
held-out examples. An example is held out whole, by a hash of its number. The answers depend on archive and settings
only, so every task finds them by itself.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
from torch import Tensor

from residua.analysis.lens.settings import LensSettings
from residua.analysis.rows.blocks import blocks
from residua.analysis.rows.held_out import held_out
from residua.store.base.errors import AnalysisError
from residua.store.read.archive import Archive

_CHUNK_ROWS = 128
_WAVE_BYTES = 2**28  # of one site in memory at a time

Rows = npt.NDArray[np.int64]


class LensRows:
    """The rows of one archive that a lens sees.

    Args:
        archive: The archive; only committed rows are used.
        settings: How many, and which are held out.
    """

    def __init__(self, archive: Archive, settings: LensSettings) -> None:
        self._archive = archive
        self._settings = settings
        self._height = min(_CHUNK_ROWS, archive.plan.rows_per_shard)

    def chunks(self) -> Rows:
        """Return the first rows of the chunks that train, in ascending order."""
        starts = [np.arange(start, stop, self._height) for start, stop in blocks(self._archive)]
        found = np.concatenate([np.zeros(0, np.int64), *starts])
        wanted = self._settings.rows
        if wanted is not None:
            n_chunks = max(1, round(wanted / self._height / (1 - self._settings.held_out)))
            found = np.random.default_rng(self._settings.seed).permutation(found)[:n_chunks]
        return np.sort(found)

    def n_chosen(self) -> int:
        """Return about how many rows train, without a look at any."""
        return round(len(self.chunks()) * self._height * (1 - self._settings.held_out))

    def training(self, chunks: Rows) -> Rows:
        """Return the rows of `chunks` that train: no held-out example, no first position."""
        rows = (chunks[:, None] + np.arange(self._height)).reshape(-1)
        rows = rows[rows < self._archive.n_rows]  # only the last shard may be short
        return rows[~self._is_held_out(self._archive.rows.example.numpy(rows)) & self._is_late(rows)]

    def waves(self, row_bytes: int, epoch: int, part: int, n_parts: int) -> Iterator[Rows]:
        """Yield the training rows of one pass, in random order of chunks, as many at a time as memory takes.

        Args:
            row_bytes: Bytes of one row of a site.
            epoch: Number of the pass, which decides the order.
            part: Which of `n_parts` shares of the rows.
            n_parts: Shares.
        """
        chunks = np.random.default_rng([self._settings.seed, 1]).permutation(self.chunks())[part::n_parts]
        order = np.random.default_rng([self._settings.seed, 2, epoch]).permutation(chunks)
        n_chunks = max(1, _WAVE_BYTES // (row_bytes * self._height))
        for start in range(0, len(order), n_chunks):
            yield self.training(np.sort(order[start : start + n_chunks]))

    def judging(self, most: int | None = None) -> Rows:
        """Return rows of held-out examples drawn at random, in ascending order.

        Args:
            most: Most rows; by default what the settings say.

        Raises:
            AnalysisError: No example is held out.
        """
        most = self._settings.held_out_rows if most is None else most
        index = self._archive.example_table.index()
        examples = np.flatnonzero(self._is_held_out(np.arange(index.n_examples)))
        examples = np.random.default_rng([self._settings.seed, 3]).permutation(examples)
        examples = examples[self._is_captured(index.first_row[examples])]
        enough = int(np.searchsorted(np.cumsum(index.n_rows[examples], dtype=np.int64), most)) + 1
        first, counts = index.first_row[examples[:enough]], index.n_rows[examples[:enough]]
        ranges = [np.arange(start, start + count) for start, count in zip(first, counts, strict=True)]
        rows = np.concatenate([np.zeros(0, np.int64), *ranges])
        rows = rows[self._is_captured(rows)][:most]
        rows = np.sort(rows[self._is_late(rows)])
        if not len(rows):
            raise AnalysisError(
                f"of the {index.n_examples:,} examples of {self._archive.path} none is held out and captured, and a "
                f"lens is judged by such: capture more examples (--max-length splits long ones), or raise --held-out "
                f"from {self._settings.held_out}"
            )
        return rows

    def next_tokens(self, rows: Rows) -> Rows:
        """Return the token after each row; -1 where its example ends, and of a masked model, which predicts none."""
        if self._is_masked():
            return np.full(len(rows), -1, np.int64)
        examples, following = self._archive.rows.example.numpy(rows), self._positions(rows) + 1
        found = np.full(len(rows), -1, np.int64)
        for example in np.unique(examples).tolist():
            tokens = self._archive.example_table.tokens(example)
            here = np.flatnonzero(examples == example)
            here = here[following[here] < len(tokens)]
            found[here] = tokens[following[here]]
        return found

    def read(self, site: str, rows: Rows) -> Tensor:
        """Return the values of `rows` at `site`, (rows, width), in the type that is stored."""
        return self._archive[site].torch(rows)

    def _is_held_out(self, examples: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
        return held_out(examples.astype(np.int64), fraction=self._settings.held_out, seed=self._settings.seed)

    def _is_captured(self, rows: Rows) -> npt.NDArray[np.bool_]:
        return np.isin(rows // self._archive.plan.rows_per_shard, list(self._archive.commits))

    def _is_late(self, rows: Rows) -> npt.NDArray[np.bool_]:
        if not self._settings.skip_positions:
            return np.ones(len(rows), np.bool_)
        return self._positions(rows) >= self._settings.skip_positions

    def _is_masked(self) -> bool:
        model = self._archive.provenance.get("model")
        return isinstance(model, Mapping) and "MaskedLM" in str(model.get("class"))

    def _positions(self, rows: Rows) -> Rows:
        return self._archive.rows.position.numpy(rows).astype(np.int64)

"""An archive, opened for reading: sites, rows, examples, progress, provenance. Needs no torch and no model."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import zarr
from tokenizers import Tokenizer

from residua.store.base.errors import (
    DamagedArchiveError,
    NotCapturedError,
    PlanError,
    ResiduaError,
    UnsafeArchiveError,
)
from residua.store.encoding.spec import ArraySpec
from residua.store.examples.schedule import Schedule
from residua.store.examples.table import ExampleTable
from residua.store.format.archive_metadata import read_metadata, read_sidecar
from residua.store.format.array_metadata import check_arrays
from residua.store.format.commits import Commit, check_commits, named_parts, read_commits
from residua.store.format.plan import ROW_COLUMNS, Plan
from residua.store.format.site_names import select
from residua.store.read.array import ArchiveArray
from residua.store.read.reader import Array, Check, RowNumbers
from residua.store.read.text import read_tokenizer, text_around

REPLAY_RULE = "replay"
"""Entry of the plan's `rules` (digest of what was replayed) and of the provenance (its description)."""

REPLAYED_EXAMPLE = "replayed_example"
"""Column of the example table: the number of each example in the replayed archive."""

_TOKENIZER = "tokenizer/tokenizer.json"

if TYPE_CHECKING:
    import residua


class Rows(NamedTuple):
    """What each row is: token id, position in its example, and number of its example."""

    token: ArchiveArray
    position: ArchiveArray
    example: ArchiveArray


class Progress(NamedTuple):
    """How much of an archive is captured."""

    rows: int
    total_rows: int | None
    shards: int
    total_shards: int | None


class Archive(Mapping[str, ArchiveArray]):
    """A dataset of activations, read without the model. Open one with `residua.open`.

    Args:
        path: Folder of the archive.
        check: When chunks are verified: ``once`` (at first touch), ``always`` or ``never``.
        threads: Threads that decode compressed chunks; by default the processor's, up to four.

    Raises:
        FileNotFoundError: There is no archive at that path.
        DamagedArchiveError: A file is missing or altered; the message names it.
        UnsafeArchiveError: The metadata is not what an honest writer makes.
    """

    def __init__(self, path: str | PathLike[str], *, check: Check = "once", threads: int | None = None) -> None:
        self.path = Path(path)
        self._check: Check = check
        self._threads = threads
        self.metadata = read_metadata(self.path)
        check_arrays(self.path, self.plan.arrays, self.metadata.n_rows)

    @property
    def plan(self) -> Plan:
        """The plan that everything follows from."""
        return self.metadata.plan

    @property
    def provenance(self) -> Mapping[str, object]:
        """Where model, data and numbers came from."""
        return self.metadata.provenance

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the stored sites, in the model's order."""
        return tuple(site.name for site in self.plan.sites)

    @cached_property
    def commits(self) -> Mapping[int, Commit]:
        """The commit of each captured shard, as they were when first asked for.

        Raises:
            DamagedArchiveError: A record is altered, or is not of a shard of this archive; the message names it.
        """
        commits = read_commits(self.path, self.plan.digest)
        check_commits(self.path, self.plan, commits, self.metadata.n_rows)
        return commits

    @property
    def n_rows(self) -> int:
        """Rows of the archive; of one that is not sealed and of open size, those captured without a gap."""
        if self.metadata.n_rows is not None:
            return self.metadata.n_rows
        n_rows = 0
        for shard in range(len(self.commits)):
            if shard not in self.commits:
                break
            n_rows = self.commits[shard].rows[1]
        return n_rows

    @property
    def progress(self) -> Progress:
        """Captured and total rows and shards; the totals are None while a user's own loop is open."""
        rows = sum(commit.rows[1] - commit.rows[0] for commit in self.commits.values())
        if self.metadata.n_rows is None:
            return Progress(rows, None, len(self.commits), None)
        return Progress(rows, self.n_rows, len(self.commits), self.plan.n_shards(self.n_rows))

    @property
    def is_sealed(self) -> bool:
        """Whether every shard is captured."""
        return self.progress.shards == self.progress.total_shards

    def __getitem__(self, site: str) -> ArchiveArray:
        return self._arrays[self.select(site)[0]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __repr__(self) -> str:
        state = "sealed" if self.is_sealed else f"{self.progress.rows:,} captured"
        return f"<Archive {self.path} of {self.n_rows:,} rows ({state}), {len(self)} sites>"

    def select(self, patterns: str | Iterable[str]) -> tuple[str, ...]:
        """Return the stored sites that `patterns` name, for example ``resid_post.*``.

        Raises:
            UnknownSiteError: A pattern names no stored site.
        """
        return select(patterns, self.sites, on_demand=False)

    @cached_property
    def _arrays(self) -> dict[str, ArchiveArray]:
        height = self.plan.rows_per_shard
        return {site.name: self._stored(site.name, site.arrays(height), site.dtype) for site in self.plan.sites}

    @cached_property
    def rows(self) -> Rows:
        """Token, position and example of every row, each lazily."""
        specs = {spec.path.removeprefix("rows/"): spec for spec in self.plan.row_arrays}
        columns = {name: self._stored(f"rows/{name}", (specs[name],), dtype) for name, dtype in ROW_COLUMNS.items()}
        return Rows(**columns)

    def _stored(self, name: str, specs: tuple[ArraySpec, ...], dtype: str) -> ArchiveArray:
        return ArchiveArray(
            self.path,
            name,
            specs,
            dtype=dtype,
            n_rows=self.n_rows,
            require=self.require_captured,
            check=self._check,
            threads=self._threads,
        )

    def require_captured(self, rows: range | RowNumbers) -> None:
        """Raise NotCapturedError unless every one of `rows` lies in a committed shard."""
        if self._is_complete:
            return
        missing = next((shard for shard in self.plan.shards_of(rows) if shard not in self.commits), None)
        if missing is not None:
            first = missing * self.plan.rows_per_shard
            raise NotCapturedError(
                f"rows from {first:,} on are not captured yet ({self.progress.rows:,} of {self.n_rows:,} are): "
                "run the same capture again to go on, then open the archive anew."
            )

    @cached_property
    def _is_complete(self) -> bool:
        return self.is_sealed

    @cached_property
    def example_table(self) -> ExampleTable:
        """The example table, read part by part; a part's SHA-256 is compared before its content is used.

        Raises:
            DamagedArchiveError: A part is missing, or they are not those that this archive was made with.
        """
        parts = {name: digest for name, digest in self.metadata.files.items() if name.startswith("examples/")}
        parts |= named_parts(self.commits)
        for name in sorted(parts):
            if not (self.path / name).is_file():
                raise DamagedArchiveError(f"{self.path / name} is missing: restore the file from a copy")
        # Parquet has no checksum over its footer and page headers, and a flipped bit there changes numbers.
        digests = {} if self._check == "never" else {Path(name).name: digest for name, digest in parts.items()}
        source = self.metadata.sealed or self.plan.dataset  # neither says it while a user's own loop is open
        table = ExampleTable(self.path / "examples", digests=digests)
        table.require(n_rows=self.metadata.n_rows, digest=source.get("examples", source.get("digest")))
        return table

    @cached_property
    def examples(self) -> pa.Table:
        """One line an example: first_row, n_rows, n_tokens, input_ids, positions, and the user's own columns."""
        return self.example_table.table()

    def example(self, index: int, sites: str | Iterable[str] | None = None) -> dict[str, Array]:
        """Return the rows of example `index`, for every site or for those that `sites` names.

        Raises:
            IndexError: There is no such example.
            NotCapturedError: The example has rows that are not captured yet.
            UnknownSiteError: `sites` names no stored site.
        """
        start, stop = self.example_table.rows(index)
        if stop > self.n_rows:  # a slice would end there without a word
            raise NotCapturedError(
                f"example {index} is not captured whole: it has the rows {start:,} to {stop:,}, and of this archive, "
                f"which is not sealed, {self.n_rows:,} rows can be read: choose an example that ends before."
            )
        names = self.sites if sites is None else self.select(sites)
        return {name: self._arrays[name][start:stop] for name in names}

    def batch_of(self, example: int) -> tuple[int, ...]:
        """Return the examples that ran with `example` when it was captured, itself included, in their order.

        Replayed together they give the captured logits bit for bit. None of a loop of the user's own: nobody knows.

        Raises:
            IndexError: There is no such example.
        """
        self.example_table.rows(example)
        plan, index = self.plan, self.example_table.index()
        if not plan.batch_tokens or plan.n_rows is None:
            return ()
        schedule = Schedule(index, rows_per_shard=plan.rows_per_shard, batch_tokens=plan.batch_tokens)
        batch = schedule.batch_of(example)
        return () if batch is None else tuple(batch.examples.tolist())

    def loader(self, sites: str | Iterable[str], *, batch_size: int, **settings: Any) -> "residua.analysis.Loader":
        """Return batches of rows for training with torch; `residua.analysis.Loader` has the settings.

        >>> for batch in archive.loader("resid_post.3", batch_size=4096, seed=0):  # doctest: +SKIP
        ...     step(batch["resid_post.3"])

        Raises:
            UnknownSiteError: `sites` names no stored site.
            AnalysisError: The settings do not fit each other or the archive.
        """
        import residua

        make: Any = residua.analysis.Loader
        loader: residua.analysis.Loader = make(self, sites, batch_size=batch_size, **settings)
        return loader

    def text(self, row: int, context: int = 10) -> str:
        """Return the text around `row`, with the row's own token between « and ».

        Args:
            row: Number of the row.
            context: Tokens to show on either side.

        Raises:
            IndexError: There is no such row.
            ResiduaError: The archive has no tokenizer.
        """
        if not -self.n_rows <= row < self.n_rows:
            raise IndexError(f"the text of row {row:,} was asked for, and {self.path} has {self.n_rows:,} rows")
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise ResiduaError(
                f"{self.path} has no tokenizer: row {row} is token {self.rows.token[row]} by number only"
            )
        example, at = int(self.rows.example[row]), int(self.rows.position[row])
        table = self.example_table
        tokens = table.tokens(example).tolist() if 0 <= example < len(table) else []
        if not 0 <= at < len(tokens):
            raise UnsafeArchiveError(
                f"{self.path}: row {row:,} is said to be position {at} of example {example}, and there is no such "
                "token: run residua verify on the archive"
            )
        return text_around(tokenizer, tokens, at, context)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The stored tokenizer (of the `tokenizers` package), or None if the archive has none."""
        content = self.side_file(_TOKENIZER)
        return None if content is None else read_tokenizer(content, self.path / _TOKENIZER)

    def side_file(self, name: str) -> bytes | None:
        """Return the content of a small file beside the arrays, ``head/attention.json`` say; None if there is none.

        Raises:
            DamagedArchiveError: It is missing, or is not what was written.
        """
        return read_sidecar(self.path, self.metadata, name)

    @property
    def group(self) -> zarr.Group:
        """The archive as a plain Zarr group, read-only."""
        return zarr.open_group(str(self.path), mode="r")


def is_replay(archive: Archive) -> bool:
    """Return whether the archive was captured during a replay: its rows follow from stored rows and edits."""
    return REPLAY_RULE in archive.plan.rules


def refuse_replay(archive: Archive, job: str) -> None:
    """Raise PlanError if the archive was captured during a replay, which `job` would compare with the plain model."""
    if is_replay(archive):
        raise PlanError(
            f"{archive.path} was captured during a replay: its rows are not what the model computes by itself, so "
            f"{job} has nothing to compare them with. Its provenance says what to replay: residua info"
        )

"""An archive opened for reading: sites, rows, examples, progress and provenance. Needs no torch and no model."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import pyarrow as pa
import zarr
from tokenizers import Tokenizer

from residua.store.base.errors import (
    DamagedArchiveError,
    NotCapturedError,
    PlanError,
    ResiduaError,
    UnknownSiteError,
    UnsafeArchiveError,
    few,
)
from residua.store.encoding.spec import ArraySpec
from residua.store.examples.annotate import annotate, remove_annotations
from residua.store.examples.index import NO_TOKEN, ExampleIndex
from residua.store.examples.schedule import Schedule
from residua.store.examples.side_tables import (
    MAX_SIDE_TABLES_BYTES,
    SIDE_TABLES,
    SideColumns,
    SideTable,
    read_side_tables,
)
from residua.store.examples.table import ExampleTable
from residua.store.format.archive_metadata import SIDECAR_FOLDERS, read_metadata, read_sidecar
from residua.store.format.array_metadata import check_arrays
from residua.store.format.commits import Commit, check_commits, committed_shards, named_example_files, read_commits
from residua.store.format.plan import Plan
from residua.store.format.site_aliases import BySite
from residua.store.format.site_names import select
from residua.store.read.array import ArchiveArray
from residua.store.read.rows_in_shards import Array, ArrayReader, Check, RowNumbers
from residua.store.read.text import read_tokenizer, text_around
from residua.store.read.zarr_group import ArchiveStore, open_zarr_group
from residua.store.sealing.losses import describe_losses, losses_of
from residua.store.sealing.packed_index import INDEX, PackedIndex
from residua.store.storage.address import is_remote, shown
from residua.store.storage.destination import Destination, DiskFolder

_TOKENIZER = "tokenizer/tokenizer.json"

if TYPE_CHECKING:
    import xarray

    import residua
    from residua.analysis.loader.loader import LoaderOptions


class Rows(NamedTuple):
    """The columns of the rows: token id, position in its example, and number of its example.

    An archive of examples with images also has what a row is (``MODALITIES`` of `residua.store.format.row_columns` says
    what the numbers mean), the image of its example, the view of that image, and row and column of its patch.
    """

    token: ArchiveArray
    position: ArchiveArray
    example: ArchiveArray
    modality: ArchiveArray | None = None
    image: ArchiveArray | None = None
    view: ArchiveArray | None = None
    patch_row: ArchiveArray | None = None
    patch_column: ArchiveArray | None = None


class Progress(NamedTuple):
    """Captured and total rows and shards; the totals are None while a user's own loop is still open."""

    rows: int
    total_rows: int | None
    shards: int
    total_shards: int | None


class Archive(Mapping[str, ArchiveArray]):
    """A dataset of activations, read without the model. Open one with `residua.open`.

    Args:
        path: Folder of the archive.
        check: When chunks are verified: ``once`` (when they are used first), ``always`` or ``never``.
        threads: Threads that decode compressed chunks; by default the processor's, up to four.

    Raises:
        FileNotFoundError: There is no archive at that path.
        DamagedArchiveError: A file is missing or altered; the message names it.
        UnsafeArchiveError: Residua does not write such metadata.
    """

    def __init__(self, path: str | PathLike[str], *, check: Check = "once", threads: int | None = None) -> None:
        if is_remote(path):
            raise PlanError(f"{shown(path)} is an address, and this class reads folders: open it with residua.open")
        self.path = Path(path)
        self._check: Check = check
        self._threads = threads
        self._examples: tuple[tuple[int, ...], ExampleTable] | None = None
        self.metadata = read_metadata(self.path)
        # With an index the root has copies of the arrays' metadata, and no other file is read.
        documents = None if self.metadata.index is None else self.metadata.documents
        check_arrays(self.path, self.arrays, self.metadata.n_rows, documents)

    def __fspath__(self) -> str:
        """Return `place`: an open archive may be given wherever a path or an address may."""
        return self.place

    @property
    def place(self) -> str:
        """Where the archive is: its folder, or its address."""
        return str(self.path)

    @property
    def storage_options(self) -> Mapping[str, Any] | None:
        """What `residua.open` was given for the address; None for a folder."""
        return None

    @property
    def is_remote(self) -> bool:
        """Whether rows come over the network."""
        return False

    @property
    def plan(self) -> Plan:
        """The plan of the archive."""
        return self.metadata.plan

    @property
    def provenance(self) -> Mapping[str, object]:
        """The sources of model, data and numbers."""
        return self.metadata.provenance

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the stored sites, in the model's order, without those in `absent_sites`."""
        return tuple(site.name for site in self.plan.sites if site.name not in set(self.absent_sites))

    @cached_property
    def absent_sites(self) -> tuple[str, ...]:
        """Names of captured sites that this copy of a finished archive lacks, as in a download of some sites."""
        if not self.was_finished:
            return ()
        height, there = self.plan.rows_per_shard, {spec.path for spec in self.arrays}
        return tuple(site.name for site in self.plan.sites if not {spec.path for spec in site.arrays(height)} <= there)

    @cached_property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """The stored arrays, as they are on disk: all of the plan, or those that this copy of the archive has."""
        arrays = self.plan.arrays
        return tuple(spec for spec in arrays if not self.was_finished or (self.path / spec.path).exists())

    @cached_property
    def commits(self) -> Mapping[int, Commit]:
        """The commit of each captured shard; read once.

        Raises:
            DamagedArchiveError: The index or a record is altered, or belongs to no shard of this archive; the message
                names it.
        """
        n_rows, index = self.metadata.n_rows, self.metadata.index
        if index is not None and n_rows is not None and self._has_index:
            return PackedIndex(self.path, self.plan, n_rows, index)
        commits = read_commits(self.path, self.plan.digest)
        check_commits(self.path, self.plan, commits, self.metadata.n_rows)
        return commits

    @property
    def _has_index(self) -> bool:
        """Whether the packed index is there, or at least no record is that would do as well."""
        return os.path.lexists(self.path / INDEX) or not committed_shards(self.path)

    @property
    def n_rows(self) -> int:
        """Rows of the archive; while its size is open, the rows captured without a gap."""
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
        """Captured and total rows and shards."""
        if isinstance(self.commits, PackedIndex):
            return Progress(self.n_rows, self.n_rows, len(self.commits), len(self.commits))
        rows = sum(commit.rows[1] - commit.rows[0] for commit in self.commits.values())
        if self.metadata.n_rows is None:
            return Progress(rows, None, len(self.commits), None)
        return Progress(rows, self.n_rows, len(self.commits), self.plan.n_shards(self.n_rows))

    @property
    def is_sealed(self) -> bool:
        """Whether every shard is captured, and none is lost."""
        return self.progress.shards == self.progress.total_shards

    @property
    def was_finished(self) -> bool:
        """Whether the capture or recording was finished once; shards that are missing since then are lost."""
        return self.metadata.sealed is not None

    def captured_rows(self) -> list[tuple[int, int]]:
        """Return the captured rows, shard by shard: the first row of each, and the row after its last.

        Raises:
            DamagedArchiveError: The archive was finished, and has lost shards since: it is not used in part.
        """
        if isinstance(self.commits, PackedIndex):
            return [self.commits.rows(shard) for shard in self.commits]
        if self.was_finished and not self.is_sealed:
            raise self._missing(self._first_missing() * self.plan.rows_per_shard)
        return sorted(commit.rows for commit in self.commits.values())

    def refuse_losses(self, sites: Iterable[str], job: str) -> None:
        """Raise PlanError if the stored rows of one of `sites` lack finite values that the model had.

        Args:
            sites: Names of stored sites.
            job: What the rows are wanted for, for the message.
        """
        for name in sites:
            site = self.plan.site(name)
            if said := describe_losses(site, losses_of(site, self.commits)):
                raise PlanError(f"{self.place} has not all values of {name} that {job} needs: {said}. Capture it again")

    def _first_missing(self) -> int:
        return next(shard for shard in range(len(self.commits) + 1) if shard not in self.commits)

    @property
    def _missing(self) -> Callable[[int], ResiduaError]:
        """Returns the error for rows from a given one on, whose shard is not captured."""
        return partial(_missing_rows, self.path, self.progress, self.was_finished, self.plan.n_rows is not None)

    def __getitem__(self, site: str) -> ArchiveArray:
        return self._arrays[self.select(site)[0]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __repr__(self) -> str:
        state = "sealed" if self.is_sealed else f"{self.progress.rows:,} {'left' if self.was_finished else 'captured'}"
        absent = f" of {len(self.plan.sites)}" if self.absent_sites else ""
        return f"<Archive {self.place} of {self.n_rows:,} rows ({state}), {len(self)}{absent} sites>"

    def select(self, patterns: str | Iterable[str]) -> tuple[str, ...]:
        """Return the stored sites that match `patterns`, for example ``resid_post.*``.

        Raises:
            UnknownSiteError: A pattern matches no stored site.
        """
        try:
            return select(patterns, self.sites, on_demand=False)
        except UnknownSiteError as error:
            if self.absent_sites:
                raise UnknownSiteError(
                    f"{error} This copy of the archive lacks {few(self.absent_sites)}: copy their folders, too"
                ) from error
            raise

    @property
    def stacks(self) -> "Mapping[str, Archive]":
        """The archives of several stacks of a model, if this is not one archive but several; else empty."""
        return {}

    def of_sites(self, sites: str | Iterable[str]) -> "Archive":
        """Return the archive whose rows have all of these sites: this one, unless it is several.

        Raises:
            UnknownSiteError: `sites` matches no stored site.
        """
        self.select(sites)
        return self

    @cached_property
    def _arrays(self) -> dict[str, ArchiveArray]:
        height = self.plan.rows_per_shard
        absent = set(self.absent_sites)
        sites = [site for site in self.plan.sites if site.name not in absent]
        return {site.name: self._array(site.name, site.arrays(height), site.dtype) for site in sites}

    @cached_property
    def rows(self) -> Rows:
        """Token, position and example of every row, read lazily.

        Raises:
            DamagedArchiveError: They are not in this copy of the archive.
        """
        specs = {spec.path.removeprefix("rows/"): spec for spec in self.plan.row_arrays}
        if absent := [spec.path for spec in specs.values() if spec not in self.arrays]:
            raise DamagedArchiveError(f"{self.path / absent[0]} is missing: copy the folder rows of the archive, too")
        columns = {
            name: self._array(f"rows/{name}", (specs[name],), dtype) for name, dtype in self.plan.row_columns.items()
        }
        return Rows(**columns)

    def _array(self, name: str, specs: tuple[ArraySpec, ...], dtype: str) -> ArchiveArray:
        return ArchiveArray(
            name, specs, dtype=dtype, n_rows=self.n_rows, require=self.require_captured, reader=self.file_reader
        )

    def file_reader(self, spec: ArraySpec, *, check: Check | None = None) -> ArrayReader:
        """Return what reads the rows of one array, or of one of its column shards; `check` is that of the archive."""
        return ArrayReader(self.path, spec, self.n_rows, check=check or self._check, threads=self._threads)

    def require_captured(self, rows: range | RowNumbers) -> None:
        """Raise NotCapturedError, or DamagedArchiveError, unless every one of `rows` lies in a committed shard."""
        if self._is_complete:
            return
        missing = next((shard for shard in self.plan.shards_of(rows) if shard not in self.commits), None)
        if missing is not None:
            raise self._missing(missing * self.plan.rows_per_shard)

    @cached_property
    def _is_complete(self) -> bool:
        return self.is_sealed

    @property
    def example_table(self) -> ExampleTable:
        """The example table, read part by part. A part's SHA-256 is compared before its content is used.

        Raises:
            DamagedArchiveError: A part is missing, or belongs to another archive.
        """
        state = self._side_state()
        if self._examples is None or self._examples[0] != state:
            self._examples = state, self._open_examples()
        return self._examples[1]

    def _side_state(self) -> tuple[int, ...]:
        """Return numbers that change when a side table is written, by any process."""
        try:
            found = (self.path / SIDE_TABLES).stat()
        except OSError:
            return ()
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _open_examples(self) -> ExampleTable:
        parts = {name: digest for name, digest in self.metadata.files.items() if name.startswith("examples/")}
        if not isinstance(self.commits, PackedIndex):  # whose files are all in the metadata
            parts |= named_example_files(self.commits)
        for name, digest in sorted(parts.items()):
            if not self.file(name, SIDECAR_FOLDERS["examples"], digest).is_file():
                raise DamagedArchiveError(f"{self.place}/{name} is missing: restore the file from a copy")
        # Parquet has no checksum of its footer and page headers, where a flipped bit changes numbers.
        digests = {} if self._check == "never" else {Path(name).name: digest for name, digest in parts.items()}
        source = self.metadata.sealed or self.plan.dataset  # neither has it while a user's own loop is open
        table = ExampleTable(self.path / "examples", digests=digests, side=self._side_columns)
        table.require(n_rows=self.metadata.n_rows, digest=source.get("examples", source.get("digest")))
        return table

    def _side_columns(self, index: ExampleIndex) -> list[SideColumns]:
        self.file(SIDE_TABLES, MAX_SIDE_TABLES_BYTES)
        return [SideColumns(table, self.path, self.file, index) for table in read_side_tables(self.path, index)]

    @property
    def side_tables(self) -> tuple[SideTable, ...]:
        """What is known of the side tables: name, key, columns and digest of each; see `annotate`."""
        return tuple(side.table for side in self.example_table.side)

    def annotate(
        self,
        table: Any,
        *,
        name: str,
        key: str = "example",
        columns: Sequence[str] | None = None,
        replace: bool = False,
        allow_unmatched: bool = False,
    ) -> SideTable:
        """Keep columns that came later, such as labels of annotators, in a side table beside the examples.

        From then on they are columns of the examples as those of the dataset are: in ``where``, ``columns``, probes and
        the loader, in this process and in others. No file of the capture changes, the plan included. An example or row
        without a line has null.

        Args:
            table: A line for each example or row: a table of pyarrow, pandas or polars, a mapping from columns to
                values, a list of mappings, or a file (``.csv``, ``.parquet``, ``.jsonl``). Values are texts, numbers,
                true and false, or lists of these with one value for each token of the example. None and NaN are null.
            name: Name of the side table; an archive may have several.
            key: Column of `table` that says to what a line belongs: ``example`` (number of the example), ``row``
                (number of the row), or a column that the examples have too, such as ``source_index`` (row of the
                dataset; all windows of it get the values).
            columns: Columns of `table` to keep; by default all but the key.
            replace: Whether to replace a side table of that name.
            allow_unmatched: Whether to leave out lines that match nothing.

        Returns:
            The side table; its `notes` say how many examples have no line.

        Raises:
            DatasetError: The key or a column cannot be used, lines match nothing or the same, or the examples have a
                column of that name.
            PlanError: There is a side table of that name, or the archive is at an address that is not written to.
            NotCapturedError: The number of examples is not known yet.
            OSError: The archive cannot be written.

        Example:
            >>> archive.annotate({"example": [0, 1], "toxic": [True, False]}, name="judge")  # doctest: +SKIP
        """
        settings: dict[str, Any] = {"replace": replace, "allow_unmatched": allow_unmatched}
        return annotate(
            self._for_side_tables(), self.example_table, table, key=key, name=name, columns=columns, **settings
        )

    def remove_annotations(self, name: str) -> None:
        """Remove a side table.

        Raises:
            PlanError: There is none of that name, or the archive is at an address that is not written to.
            OSError: The archive cannot be written.
        """
        remove_annotations(self._for_side_tables(), self.example_table, name)

    def _for_side_tables(self) -> Destination:
        """Return where side tables are written; raises NotCapturedError while there may come more examples."""
        if self.metadata.n_rows is None:
            raise NotCapturedError(
                f"{self.place} is not finished, and how many examples it will have is not known: annotate it when it is"
            )
        return DiskFolder(self.path)

    @property
    def examples(self) -> pa.Table:
        """One line for each example: first_row, n_rows, n_tokens, input_ids, positions, and the other columns."""
        return self.example_table.table()

    def example(self, index: int, sites: str | Iterable[str] | None = None) -> dict[str, Array]:
        """Return the rows of example `index`, for every site or for `sites`.

        Raises:
            IndexError: There is no such example.
            NotCapturedError: The example has rows that are not captured yet.
            UnknownSiteError: `sites` matches no stored site.
        """
        start, stop = self.example_table.rows(index)
        if stop > self.n_rows:  # a slice would silently end there
            raise NotCapturedError(
                f"example {index} is not fully captured: it has rows {start:,} to {stop:,}, and this archive, which is "
                f"not sealed, has {self.n_rows:,} readable rows: choose an example that ends before"
            )
        names = self.sites if sites is None else self.select(sites)
        return BySite({name: self._arrays[name][start:stop] for name in names})

    def batch_of(self, example: int) -> tuple[int, ...]:
        """Return the examples of the batch in which `example` was captured, in their order, itself included.

        Replayed together they give the captured logits bit for bit. Empty if a user's own loop made the archive, for
        its batches are unknown.

        Raises:
            IndexError: There is no such example.
        """
        self.example_table.rows(example)
        plan, index = self.plan, self.example_table.index()
        if not plan.batch_tokens:
            return ()
        schedule = Schedule(index, rows_per_shard=plan.group_rows, batch_tokens=plan.batch_tokens)
        batch = schedule.batch_of(example)
        return () if batch is None else tuple(batch.examples.tolist())

    def loader(
        self, sites: str | Iterable[str], *, batch_size: int, **options: "Unpack[LoaderOptions]"
    ) -> "residua.analysis.Loader":
        """Return batches of rows for training with torch.

        >>> for batch in archive.loader("resid_post.3", batch_size=4096, seed=0):  # doctest: +SKIP
        ...     step(batch["resid_post.3"])

        Args:
            sites: Sites of a batch, by names or patterns.
            batch_size: Rows of a batch.
            **options: Further arguments of `residua.analysis.Loader` by name, for example ``where="position > 0"``.

        Raises:
            UnknownSiteError: `sites` matches no stored site.
            AnalysisError: The options contradict each other or the archive.
        """
        import residua

        make: Any = residua.analysis.Loader  # its archive is of this class under another path, for pyright
        loader: residua.analysis.Loader = make(self, sites, batch_size=batch_size, **options)
        return loader

    def text(self, row: int, context: int = 10) -> str:
        """Return the text around `row`, with the token of the row between « and ».

        Args:
            row: Number of the row.
            context: Tokens to show on either side.

        Raises:
            IndexError: There is no such row.
            ResiduaError: The archive has no tokenizer, or the row has no token.
        """
        if not -self.n_rows <= row < self.n_rows:
            raise IndexError(f"there is no row {row:,} to show the text of: {self.place} has {self.n_rows:,} rows")
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise ResiduaError(
                f"{self.place} has no tokenizer for the text of row {row}; its token id is {self.rows.token[row]}"
            )
        example, at = int(self.rows.example[row]), int(self.rows.position[row])
        table = self.example_table
        tokens = table.tokens(example).tolist() if 0 <= example < len(table) else []
        if not 0 <= at < len(tokens):
            raise UnsafeArchiveError(
                f"{self.place}: row {row:,} should be position {at} of example {example}, which has no such token: run "
                "residua verify on the archive"
            )
        if tokens[at] == NO_TOKEN:
            raise ResiduaError(
                f"row {row} of {self.place} has no token, because its example was recorded without tokens"
            )
        return text_around(tokenizer, tokens, at, context)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer in the archive (of the `tokenizers` package), or None."""
        content = self.side_file(_TOKENIZER)
        return None if content is None else read_tokenizer(content, self.path / _TOKENIZER)

    def side_file(self, name: str) -> bytes | None:
        """Return the content of a sidecar file, for example ``head/attention.json``; None if there is none.

        Raises:
            DamagedArchiveError: The file is missing or was altered.
        """
        if digest := self.metadata.files.get(name):
            self.file(name, SIDECAR_FOLDERS[PurePosixPath(name).parts[0]], digest)
        return read_sidecar(self.path, self.metadata, name)

    def file(self, name: str, most_bytes: int, sha256: str | None = None) -> Path:  # noqa: ARG002  # for addresses
        """Return where a file of the archive is on this machine; there may be none.

        Args:
            name: Its path inside the archive.
            most_bytes: Largest size, if it has to come over the network first.
            sha256: What it should be, in hex, if that is known.
        """
        return self.path / name

    @property
    def head(self) -> Path:
        """The folder of the LM head, on this machine; there may be none."""
        return self.path / "head"

    @property
    def group(self) -> zarr.Group:
        """The archive as a Zarr group, read-only, for zarr-python and Dask.

        Values of bfloat16 and float16 come as float32, as everywhere. Reading rows that are not captured yet raises
        NotCapturedError, and reading rows that are lost DamagedArchiveError, where a plain Zarr reader shows zeros.
        """
        captured = range(len(self.commits)) if isinstance(self.commits, PackedIndex) else frozenset(self.commits)
        return open_zarr_group(ArchiveStore(self.path, self.plan, captured, self._missing))

    def to_xarray(self, sites: str | Iterable[str] | None = None) -> "xarray.Dataset":
        """Return the archive as an xarray Dataset: a variable for each site, and the row columns as coordinates.

        Nothing is read before it is used. Values of bfloat16 and float16 come as float32. Call ``.chunk({"row": n})``
        with a multiple of the archive's `plan.rows_per_shard` for Dask arrays.

        Args:
            sites: Sites to include; all by default.

        Raises:
            MissingPackageError: xarray is not installed.
            UnknownSiteError: `sites` matches no stored site.
            NotCapturedError: (when values are used) Rows are not captured yet.

        Example:
            >>> archive.to_xarray("resid_post.*").sel(row=slice(0, 9))  # doctest: +SKIP
        """
        from residua.store.read.xarray_dataset import as_dataset

        names = self.sites if sites is None else self.select(sites)
        return as_dataset(
            self.place, self.plan, [self.plan.site(name) for name in names], self.arrays, self.group.store
        )


def _missing_rows(path: Path, progress: Progress, was_finished: bool, is_repeatable: bool, first: int) -> ResiduaError:
    """Return the error for rows from `first` on, whose shard is not captured."""
    total = "" if progress.total_rows is None else f" of {progress.total_rows:,}"
    if not was_finished:
        return NotCapturedError(
            f"rows from {first:,} on are not captured yet ({progress.rows:,}{total} are): "
            "run the same capture again to continue it, then open the archive again"
        )
    again = ", or run the same capture again, which captures them again" if is_repeatable else ""
    return DamagedArchiveError(
        f"{path} was finished and has lost shards since: {progress.shards:,} of {progress.total_shards:,} have a "
        f"record, and rows from {first:,} on have none: restore the files in commits/ from a copy{again}"
    )

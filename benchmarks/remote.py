"""What archives cost at an address: `python benchmarks/remote.py`.

An archive of 128 MiB of trained bfloat16 residuals, stored with `fast` in shards of 32 MiB, lies on two servers on
this machine: SeaweedFS (S3) and the web server of the tests. Both are asked through a link in a process of its own,
which counts requests and bytes. It delays requests by 0 or 20 ms, or by 20 ms on a line of 1 Gbit/s. Nothing is kept in
a cache on the disk.

- open: `residua.open`; requests only.
- random rows: 4,096 rows from anywhere, in the open archive.
- scan: all rows, in blocks of a shard, as analyses read them.
- loader: one epoch of shuffled batches of 4,096 rows, with a buffer of 64 MiB.
- push and pull: the archive to the bucket and back to the disk; where the line has no limit, one of four times the rows
  as well.
- capture: a trained model of 1M parameters over 8,192 tokens and, where the line has no limit, over four times as many,
  all sites of the residual stream with queries and keys, to the disk and straight into the bucket.

The same archive stored `raw` is scanned and loaded where the line has no limit: what is left there beside fetching is
what the reader itself costs, and for the loader the shuffling.

`obstore` is obstore alone moving the same bytes, without looking at them: ranges of 8 MiB, 16 at once; for push and
pull files, eight at once, written to the disk durably as a pull writes them. zarr-python reads the same archive
through its own `ObjectStore`, and through `FsspecStore` over obstore's file system.

A push asks three things one after the other that obstore alone does not, whatever the size: what lies there, and at the
end the root, while it lists what has arrived, and the removal of its journal. A pull asks one: the root with the index.
At 20 ms without a limit of the line this is most of what a push takes longer.

Client, link and server share two cores. Where the line has no limit, these are what limits all cases, and decoding,
which obstore alone does not do, counts in full: `decoding alone, from memory` is what checking and decoding the same
chunks takes in one thread, with nothing fetched. That is more processor time than obstore takes for fetching them, and
client, link and server keep both cores nearly busy without it. So no reader that decodes reaches 0.8 of obstore's rate
there.

What a scan of `fast` chunks takes beyond obstore alone, by a profile over the web server: 40 percent is zstd's Huffman
decoder, at 2 GB/s a core; 15 the kernel clearing pages of the arrays that the caller gets, which obstore alone spares
by using its buffers again; 11 c-blosc's copies of planes and its unshuffle; 6 crc32c; 5 obstore clearing the memory of
an answer that it streams; about 20 Python and threads that wake each other. Only these last can still shrink. Stored
`raw`, one copy takes the decoder's place: checksums lie between the chunks, so a view of what arrived is no array of
the rows. The loader also gathers every row in random order, at the speed of memory, and makes over five times the
requests, because the blocks of a shuffled epoch lie apart: joining them would fetch the rows between them as well.
"""

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import obstore
import zarr
from measure import Timing, in_turns, machine, parser, publish, speedups, spread, table
from obstore.fsspec import FsspecStore as ObstoreFiles
from obstore.store import HTTPStore, S3Store
from residuals import SITE, residual_archive, trained_residuals
from slow_link import Counts, Link, slow_link
from transformers import AutoModelForCausalLM
from zarr.storage import FsspecStore, ObjectStore

import residua
from residua.store.encoding.codecs import decode_chunk
from residua.store.format.archive_metadata import read_metadata
from residua.store.read.shard_files import stored_chunks
from residua.store.sealing.seal import seal

sys.path.append(str(Path(__file__).parent.parent))  # of the tests' servers
from tests.servers.files import serving_files
from tests.servers.s3 import S3Server, serving_s3

WIDTH = 512
BATCH_ROWS = 4_096
BUFFER_BYTES = 64 * 2**20
RANGE_BYTES = 8 * 2**20
AT_ONCE, FILES_AT_ONCE = 16, 8
GBIT = 125e6
LINES = {"0 ms": (0.0, 0.0), "20 ms": (0.02, 0.0), "20 ms, 1 Gbit/s": (0.02, GBIT)}
ALONE, OURS, OBJECT_STORE, FSSPEC = "obstore", "Residua", "zarr-python, ObjectStore", "zarr-python, fsspec"
DECODING = "decoding alone, from memory"
OPEN, RANDOM, SCAN, LOAD, PUSH, PULL = "open", "4,096 random rows", "scan", "loader", "push", "pull"
RAW, LARGE = "raw", "512 MiB"
SCAN_RAW, LOAD_RAW, PUSH_LARGE, PULL_LARGE = f"{SCAN}, {RAW}", f"{LOAD}, {RAW}", f"{PUSH}, {LARGE}", f"{PULL}, {LARGE}"
CAPTURE, CAPTURE_MORE, DISK = "capture", "capture of 32,768 tokens", "to the disk"
TIMES_CAPTURES = 3  # as many rounds: their processor time varies most
NEEDS = (PUSH, PUSH_LARGE, PULL, PULL_LARGE, CAPTURE, CAPTURE_MORE)  # less is better, else rates
N_EXAMPLES = 32
MODEL = Path(__file__).parent.parent / "models" / "pydoc-1m"
TARGETS = {
    (RANDOM, OURS): "at most a request a chunk",
    (SCAN, OURS): "rate at least 0.8",
    (LOAD, OURS): "rate at least 0.8",
    (SCAN_RAW, OURS): "rate at least 0.8",
    (LOAD_RAW, OURS): "rate at least 0.8",
    (PUSH, OURS): "time at most 1.15",
    (PULL, OURS): "time at most 1.15",
    (PUSH_LARGE, OURS): "time at most 1.15",
    (PULL_LARGE, OURS): "time at most 1.15",
    (CAPTURE, OURS): "CPU at most 1.2",
    (CAPTURE_MORE, OURS): "CPU at most 1.2",
}
Work = Callable[[int], object]


@dataclass
class Run:
    """The runs of one case.

    Attributes:
        timings: By round.
        counts: What passed the link in the last round.
    """

    timings: list[Timing] = field(default_factory=list)
    counts: Counts = field(default_factory=lambda: Counts(0, 0, 0))


Measured = dict[tuple[str, str, str], dict[str, Run]]


@dataclass(frozen=True)
class Place:
    """A server behind a link.

    Attributes:
        name: Of the server.
        link: The link.
        options: `storage_options` of the archive there, through the link.
        base: Address of the folder that has the archive.
        store: obstore's store of that folder.
        folder: Where the archive is on the disk.
        objects: The archive's files below `folder`, with their sizes; objects of these names are at the server.
        variant: What sets the archive apart: `RAW`, stored without compression, is only scanned and loaded; `LARGE` is
            only pushed and pulled. Both only where the line has no limit.
    """

    name: str
    link: Link
    options: Mapping[str, Any]
    base: str
    store: Any
    folder: Path
    objects: Mapping[str, int]
    variant: str = ""

    @property
    def archive(self) -> str:
        """Address of the archive."""
        return f"{self.base}/acts.zarr"

    @property
    def shards(self) -> Mapping[str, int]:
        """Objects of the site that is read, with their sizes."""
        return {name: size for name, size in self.objects.items() if "/resid_post/0/c/" in name}

    def open(self) -> residua.Archive:
        """Open the archive."""
        return residua.open(self.archive, storage_options=self.options, cache=False)


def make(folder: Path, preset: str = "fast", times: int = 1) -> Path:
    """Write the archive, with its rows so many times."""
    folder.mkdir()
    rows = np.tile(trained_residuals().reshape(-1, WIDTH), (times, 1))
    path = residual_archive(folder, rows, preset).path
    seal(path, read_metadata(path))
    return path.rename(folder / "acts.zarr")


def _serve_files(folder: Path, ready: Connection) -> None:
    with serving_files(folder) as server:
        ready.send(urlsplit(server.url).port)
        ready.recv()


@contextmanager
def file_server(folder: Path) -> Iterator[int]:
    """Run the web server of the tests in a process of its own, and yield its port."""
    here, there = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_serve_files, args=(folder, there))
    process.start()
    try:
        yield here.recv()
    finally:
        here.send(None)
        process.join()


def files_place(link: Link, folder: Path, variant: str = "") -> Place:
    """Return the archive on the web server."""
    base = f"http://127.0.0.1:{link.port}"
    store = HTTPStore.from_url(base, client_options={"allow_http": True})
    return Place("files over HTTP", link, {}, base, store, folder, _objects(folder), variant)


def s3_place(link: Link, server: S3Server, folder: Path, variant: str = "") -> Place:
    """Return the archive in the bucket, where it is put first."""
    name = variant.split()[0] if variant else "there"
    options: dict[str, Any] = {**server.options, "endpoint": f"http://127.0.0.1:{link.port}"}
    store = S3Store(
        server.bucket, prefix=name, client_options={"allow_http": True}, retry_config={"max_retries": 30}, **options
    )
    place = Place("SeaweedFS", link, options, server.address(name), store, folder, _objects(folder), variant)
    residua.push(folder / "acts.zarr", place.archive, storage_options=options)
    return place


def _objects(folder: Path) -> dict[str, int]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "commits"]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def fetch(place: Place, _: int) -> None:
    """Fetch the site's bytes with obstore alone."""
    ranges = [
        (name, start, min(start + RANGE_BYTES, size))
        for name, size in place.shards.items()
        for start in range(0, size, RANGE_BYTES)
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _found in pool.map(lambda x: obstore.get_range(place.store, x[0], start=x[1], end=x[2]), ranges):
            pass


def put_files(place: Place, number: int) -> None:
    """Put the archive's files with obstore alone."""
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        list(pool.map(lambda x: obstore.put(place.store, f"put-{number}/{x}", place.folder / x), place.objects))


def get_files(place: Place, folder: Path, number: int) -> None:
    """Get the archive's files with obstore alone, and write them durably."""

    def get(name: str) -> None:
        path = folder / f"got-{number}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for piece in obstore.get(place.store, name).stream(min_chunk_size=RANGE_BYTES):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        list(pool.map(get, place.objects))


def scan(array: Any, height: int, _: int) -> None:
    """Read all rows, block by block."""
    for start in range(0, array.shape[0], height):
        array[start : start + height]


def load(archive: residua.Archive, epoch: int) -> None:
    """Read the batches of one epoch."""
    loader = archive.loader(SITE, batch_size=BATCH_ROWS, buffer_bytes=BUFFER_BYTES)
    loader.set_epoch(epoch)
    for _ in loader:
        pass


class Decoding:
    """The stored chunks of a site in memory, and what it takes to check and decode them in one thread."""

    def __init__(self, archive: residua.Archive, height: int) -> None:
        (self._spec,) = archive[SITE].specs
        self._chunks = [chunk for shard in archive.commits for chunk in stored_chunks(archive, self._spec, shard)]
        self._per_block = height // self._spec.rows_per_chunk

    def __call__(self, _: int) -> None:
        """Decode all chunks, into new memory for each block."""
        spec = self._spec
        for start in range(0, len(self._chunks), self._per_block):
            chunks = self._chunks[start : start + self._per_block]
            out = np.empty((len(chunks), spec.rows_per_chunk, *spec.row_shape), spec.storage_dtype)
            for chunk, values in zip(chunks, out, strict=True):
                decode_chunk(chunk, values, spec.preset)


class Stored:
    """A site whose rows come as they are stored, without a conversion."""

    def __init__(self, archive: residua.Archive) -> None:
        self._array = archive[SITE]
        self.shape = self._array.shape

    def __getitem__(self, rows: Any) -> Any:
        return self._array.numpy(rows, dtype=self._array.stored_dtype)


def zarr_arrays(place: Place) -> dict[str, Any]:
    """Return the site as zarr-python opens it."""
    path = f"sites/{SITE.replace('.', '/')}"
    make: Any = ObstoreFiles
    files = make(urlsplit(place.base).scheme, asynchronous=True, **_fsspec_options(place))
    stores: dict[str, Any] = {
        OBJECT_STORE: ObjectStore(_below(place, "acts.zarr"), read_only=True),
        FSSPEC: FsspecStore(files, read_only=True, path=_fsspec_path(place)),
    }
    return {name: zarr.open_array(store, path=path, mode="r", zarr_format=3) for name, store in stores.items()}


def _below(place: Place, name: str) -> Any:
    client: Any = {"allow_http": True}
    if isinstance(place.store, HTTPStore):
        return HTTPStore.from_url(f"{place.base}/{name}", client_options=client)
    return S3Store("acts", prefix=f"there/{name}", client_options=client, **place.options)


def _fsspec_options(place: Place) -> dict[str, Any]:
    return {**({} if isinstance(place.store, HTTPStore) else place.options), "client_options": {"allow_http": True}}


def _fsspec_path(place: Place) -> str:
    return place.archive if isinstance(place.store, HTTPStore) else place.archive.removeprefix("s3://")


def reading(place: Place, height: int) -> dict[str, dict[str, Work]]:
    """Return the cases of the jobs that read."""
    archive, others = place.open(), {} if place.variant else zarr_arrays(place)
    rng = np.random.default_rng(0)
    batches = [np.sort(rng.choice(archive.n_rows, BATCH_ROWS, replace=False)) for _ in range(8)]
    alone = partial(fetch, place)
    return {
        OPEN: {OURS: lambda _: place.open()},
        RANDOM: {
            OURS: lambda n: archive[SITE].bits(batches[n]),
            **{name: partial(lambda array, n: array.oindex[batches[n]], each) for name, each in others.items()},
        },
        SCAN: {
            ALONE: alone,
            OURS: partial(scan, Stored(archive), height),
            DECODING: Decoding(residua.open(place.folder / "acts.zarr"), height),
            **{name: partial(scan, each, height) for name, each in others.items()},
        },
        LOAD: {ALONE: alone, OURS: partial(load, archive)},
    }


def moving(place: Place, folder: Path, line: str) -> dict[str, dict[str, Work]]:
    """Return the cases of the jobs that copy, to places of their own for each line: what is there is not sent again."""
    own = line.replace(" ", "").replace("/", "").replace(",", "-")

    def push(number: int) -> None:
        target = f"{place.base}/pushed-{own}-{number}.zarr"
        residua.push(place.folder / "acts.zarr", target, storage_options=place.options)

    def pull(number: int) -> None:
        residua.pull(place.archive, folder / f"pulled-{number}.zarr", storage_options=place.options)

    jobs: dict[str, dict[str, Work]] = {PULL: {ALONE: partial(get_files, place, folder), OURS: pull}}
    if isinstance(place.store, S3Store):
        jobs[PUSH] = {ALONE: partial(put_files, place), OURS: push}
    return jobs


def capturing(place: Place, folder: Path, n_examples: int) -> dict[str, Work]:
    """Return the cases of a capture, for a place in a bucket."""
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    tokens = [np.random.default_rng(i).integers(3, 1024, 256).tolist() for i in range(n_examples)]
    capture = partial(residua.capture_dataset, model, tokens, sites="resid_post.*,q.*,k.*", head=False)

    def to_disk(_: int) -> None:
        shutil.rmtree(folder / "captured.zarr", ignore_errors=True)
        capture(out=folder / "captured.zarr")

    def to_bucket(number: int) -> None:
        address = f"{place.base}/captured-{number}-{secrets.token_hex(4)}.zarr"
        capture(out=address, storage_options=place.options)

    return {DISK: to_disk, OURS: to_bucket}


def jobs_of(place: Place, folder: Path, height: int, line: str) -> dict[str, dict[str, Work]]:
    """Return the jobs at one place over one line, with their cases."""
    if place.variant:
        if LINES[line][1]:
            return {}
        some = reading(place, height) if place.variant == RAW else moving(place, folder, line)
        names = (SCAN, LOAD) if place.variant == RAW else some
        return {f"{name}, {place.variant}": some[name] for name in names}
    jobs = reading(place, height) | moving(place, folder, line)
    if isinstance(place.store, S3Store):
        jobs[CAPTURE] = capturing(place, folder, N_EXAMPLES)
        if not LINES[line][1]:
            jobs[CAPTURE_MORE] = capturing(place, folder, 4 * N_EXAMPLES)
    return jobs


def counted(place: Place, work: Work, run: Run, number: int) -> None:
    """Do one run, and note what passed the link."""
    before = place.link.counts()
    work(number)
    run.counts = Counts(*(now - then for now, then in zip(place.link.counts(), before, strict=True)))


def measure(place: Place, folder: Path, rounds: int) -> Measured:
    """Return the runs of every job at one server."""
    found: Measured = {}
    height = place.open().plan.rows_per_shard
    for name_of_line, line in LINES.items():
        place.link.set_line(0)
        jobs = jobs_of(place, folder, height, name_of_line)
        place.link.set_line(*line)
        for job, cases in jobs.items():
            runs = {name: Run() for name in cases}
            works = {name: partial(counted, place, work, runs[name]) for name, work in cases.items()}
            times = TIMES_CAPTURES if job in (CAPTURE, CAPTURE_MORE) else 1
            for name, timings in in_turns(works, rounds=times * rounds + 1).items():
                runs[name].timings = timings[1:]  # the first one opens connections
            found[place.name, name_of_line, job] = runs
        for left in [*folder.glob("got-*"), *folder.glob("pulled-*")]:
            shutil.rmtree(left)
    return found


def table_line(place: str, line: str, job: str, case: str, runs: Mapping[str, Run]) -> list[str]:
    """Return one line of the table."""
    run = runs[case]
    base = runs.get(ALONE, runs.get(DISK, runs[OURS])).timings
    rates = speedups(base, run.timings, clock="cpu" if job in (CAPTURE, CAPTURE_MORE) else "wall")
    ratios = [1 / rate for rate in rates] if job in NEEDS else rates
    return [
        f"{job}, {case}",
        place,
        line,
        f"{run.counts.requests:,}",
        f"{(run.counts.sent + run.counts.received) / 2**20:,.1f}",
        spread([1000 * each.wall for each in run.timings], 0),
        spread([1000 * each.cpu for each in run.timings], 0),
        "" if job == OPEN else spread(ratios),
        TARGETS.get((job, case), "at most 3 requests" if job == OPEN else ""),
    ]


def report(measured: Measured, rounds: int) -> str:
    """Return the table."""
    lines = [
        table_line(place, line, job, case, runs)
        for job in (OPEN, RANDOM, SCAN, SCAN_RAW, LOAD, LOAD_RAW, *NEEDS)
        for (place, line, its_job), runs in measured.items()
        if its_job == job
        for case in runs
    ]
    head = ["job", "server", "line", "requests", "MiB", "ms", "CPU ms", "ratio", "target"]
    return "\n".join(
        [
            f"Median (least to greatest) of {rounds} rounds, for captures of {TIMES_CAPTURES * rounds}. Requests and "
            "bytes are those of one run. The ratio is the rate over that of obstore, or of Residua where obstore has "
            "no case; for push and pull the time over obstore's, for captures the CPU time over that of a capture "
            "to the disk.",
            machine("obstore", "zarr", "numpy"),
            "",
            table(head, lines),
        ]
    )


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__ or "", rounds=3).parse_args()
    folder = Path(tempfile.mkdtemp(prefix="residua-remote-", dir=arguments.folder))
    measured: Measured = {}
    try:
        data, raw, large, copies, bucket = (folder / name for name in ("data", "raw", "large", "copies", "bucket"))
        copies.mkdir()
        bucket.mkdir()
        make(data)
        make(raw, "raw")
        make(large, times=4)
        with ExitStack() as open_:
            server = open_.enter_context(serving_s3(bucket, n_volumes=350))
            objects = open_.enter_context(slow_link(urlsplit(server.options["endpoint"]).port))
            for each, variant in ((data, ""), (raw, RAW), (large, LARGE)):
                files = open_.enter_context(slow_link(open_.enter_context(file_server(each))))
                measured |= measure(files_place(files, each, variant), copies, arguments.rounds)
                measured |= measure(s3_place(objects, server, each, variant), copies, arguments.rounds)
    finally:
        shutil.rmtree(folder)
    publish(report(measured, arguments.rounds), arguments.out)


if __name__ == "__main__":
    main()

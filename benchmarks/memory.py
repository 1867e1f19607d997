"""Peak memory of each kind of work, and its growth with the rows: `python benchmarks/memory.py [--times 1 8 64]`.

The dataset is an eighth of the topics of Python's own documentation, once and several times, each time with another
first word of every text. The shipped model captures every `resid_post` in bfloat16, with at most 16 MiB of host buffers
(`host_memory`). The same capture also goes straight into a bucket on this machine (SeaweedFS), with 48 MiB for buffers
and uploads. A probe (`position > 10`), a lens, statistics, a pass of the loader and a replay with an ablation then use
the archive on the disk. Probe and statistics may take 384 MiB (`memory_limit`), a lens 512 MiB; a probe keeps rows
between passes in half of what libraries leave of it. The loader's buffer may take 16 MiB (`buffer_bytes`).

Each runs in a process of its own, with one thread, which first does the same for ten texts, so that libraries are
loaded. The table shows what the process had allocated then (`RssAnon`), and what it added to that at its peak; and of
the largest dataset the pages of files that it mapped in addition (`RssFile`), which the system takes back when it needs
them. All are read every five milliseconds. Probe, lens and statistics run as in a worker of Dask, which sets
`MALLOC_TRIM_THRESHOLD_=65536`, so that memory that was given back leaves the process.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from measure import machine, parser, publish, table

import residua

sys.path.append(str(Path(__file__).parent.parent))  # of the tests' servers
from tests.servers.s3 import serving_s3

HOST_MEMORY, UPLOAD_MEMORY, BUFFER_BYTES = 16 * 2**20, 32 * 2**20, 16 * 2**20
MEMORY, LENS_MEMORY = "384MiB", "512MiB"
AS_IN_WORKERS = {"MALLOC_TRIM_THRESHOLD_": "65536"}
MODEL = Path(__file__).parent.parent / "models" / "pydoc-1m"
SITES, SITE = "resid_post.*", "resid_post.2"
TOPICS = sorted(topics.items())[::8]
FEW = 0  # times the dataset: ten texts
_SERVERS = ExitStack()


def texts(times: int) -> Iterator[str]:
    """Yield the topics `times` times, each time with another first word."""
    for turn in range(times):
        for title, text in TOPICS:
            yield f"{turn} {title}\n{text}"


def resident() -> tuple[int, int]:
    """Return the bytes of this process that it allocated, and those of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
    return found["RssAnon"], found["RssFile"]


def measured(job: Callable[[], object]) -> dict[str, float]:
    """Run a job; return what was allocated before, and what it added at its peak, allocated and mapped."""
    before, ended = resident(), threading.Event()
    peaks = list(before)

    def watch() -> None:
        while not ended.wait(0.005):
            peaks[:] = map(max, peaks, resident())

    thread, start = threading.Thread(target=watch), time.process_time()
    thread.start()
    try:
        job()
    finally:
        ended.set()
        thread.join()
    seconds = round(time.process_time() - start, 1)
    return {"before": before[0], "allocated": peaks[0] - before[0], "mapped": peaks[1] - before[1], "seconds": seconds}


def loaded() -> Any:
    """Return the shipped model."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL).train(False)


def capture(folder: Path) -> Callable[[int], object]:
    """Capture the dataset."""
    from transformers import AutoTokenizer

    model, tokenizer = loaded(), AutoTokenizer.from_pretrained(MODEL)
    options: Any = {"sites": SITES, "dtype": "bfloat16", "max_length": 128, "host_memory": HOST_MEMORY}

    def job(times: int, out: str | Path = "", **more: Any) -> object:
        given = texts(times) if times else islice(texts(1), 10)
        out = out or folder / f"{times}.zarr"
        return residua.capture_dataset(model, given, tokenizer=tokenizer, out=out, **{**options, **more})

    return job


def capture_to_bucket(folder: Path) -> Callable[[int], object]:
    """Capture the dataset into a bucket, whose server runs until this process ends."""
    bucket = Path(tempfile.mkdtemp(prefix="bucket-", dir=folder))
    server = _SERVERS.enter_context(serving_s3(bucket, n_volumes=100))
    to_disk: Any = capture(folder)

    def job(times: int) -> object:
        out = server.address(f"{times}.zarr")
        return to_disk(times, out, storage_options=server.options, host_memory=HOST_MEMORY + UPLOAD_MEMORY)

    return job


def analysis(
    work: Callable[[residua.Archive, Any], object], folder: Path, memory_limit: str = MEMORY
) -> Callable[[int], object]:
    """Return the analysis of an archive."""

    def job(times: int) -> object:
        with residua.analysis.connect("inline", memory_limit=memory_limit) as cluster:
            return work(residua.open(folder / f"{times}.zarr"), cluster)

    return job


def probe(archive: residua.Archive, cluster: Any) -> object:
    """Probe one site."""
    return residua.probe(archive, "position > 10", SITE, cluster=cluster)


def lens(archive: residua.Archive, cluster: Any) -> object:
    """Train a lens of one layer on all rows, by its closed form."""
    return residua.TunedLens.fit(archive, sites=SITE, cluster=cluster, refine=False)


def stats(archive: residua.Archive, cluster: Any) -> object:
    """Take the statistics of one site."""
    return residua.stats(archive, SITE, cluster=cluster)


def loader(folder: Path) -> Callable[[int], object]:
    """Read every row of one site once, shuffled."""

    def job(times: int) -> object:
        archive = residua.open(folder / f"{times}.zarr")
        return sum(1 for _ in archive.loader(SITE, batch_size=256, seed=0, buffer_bytes=BUFFER_BYTES))

    return job


def replay(folder: Path) -> Callable[[int], object]:
    """Run all examples again with one block's rows set to zero."""
    model = loaded()
    edits = [{"site": SITE, "edit": "zero"}]

    def job(times: int) -> object:
        archive = residua.open(folder / f"{times}.zarr")
        return residua.replay_dataset(model, archive, edits=edits, out=folder / f"{times}-replay", force=True)

    return job


WORK: dict[str, tuple[str, Callable[[Path], Callable[[int], object]]]] = {
    "capture": ("16 MiB of buffers", capture),
    "capture into a bucket": ("48 MiB of buffers and uploads", capture_to_bucket),
    "probe": ("384 MiB in all", lambda folder: analysis(probe, folder)),
    "lens": ("512 MiB in all", lambda folder: analysis(lens, folder, LENS_MEMORY)),
    "stats": ("384 MiB in all", lambda folder: analysis(stats, folder)),
    "loader": ("16 MiB of buffer", loader),
    "replay": ("", replay),
}


def main() -> None:
    """Measure and report."""
    options = parser(__doc__ or "", rounds=1)
    options.add_argument(
        "--times", type=int, nargs="+", default=[1, 8, 64], help="sizes of the dataset (default: 1 8 64)"
    )
    options.add_argument("--work", choices=WORK, help="do this, in this process, for the first of --times")
    arguments = options.parse_args()
    if arguments.work:
        with _SERVERS:
            job = WORK[arguments.work][1](arguments.folder)
            job(FEW)
            print(json.dumps(measured(lambda: job(arguments.times[0]))))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in WORK}
    with tempfile.TemporaryDirectory(prefix="residua-memory-", dir=arguments.folder) as folder:
        for times in arguments.times:
            for name in WORK:
                command = [sys.executable, __file__, "--work", name, "--times", str(times), "--folder", folder]
                env = {**os.environ, "OMP_NUM_THREADS": "1", **(AS_IN_WORKERS if "in all" in WORK[name][0] else {})}
                shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
                found[name].append(json.loads(shown.stdout.splitlines()[-1]))
                print(times, name, found[name][-1], file=sys.stderr, flush=True)
        rows = [residua.open(Path(folder) / f"{times}.zarr").n_rows for times in arguments.times]
    publish("\n".join([machine("torch", "transformers", "pyarrow"), "", report(found, rows)]), arguments.out)


def report(found: dict[str, list[dict[str, float]]], rows: list[int]) -> str:
    """Return the table of peaks, by work and number of rows."""
    head = ["MiB", "limit", "before", *(f"{n:,} rows" for n in rows), "mapped", "CPU s"]
    lines = []
    for name, runs in found.items():
        sizes = [runs[-1]["before"], *(run["allocated"] for run in runs), runs[-1]["mapped"]]
        seconds = " / ".join(f"{run['seconds']:,}" for run in runs)
        lines.append([name, WORK[name][0], *(f"{size / 2**20:,.0f}" for size in sizes), seconds])
    return table(head, lines)


if __name__ == "__main__":
    main()

"""Peak memory of each kind of work, and its growth with the rows: `python benchmarks/memory.py [--times 1 8 64]`.

The dataset is Python's own documentation, once and several times, each time with another first word of every text. The
shipped model captures every `resid_post` in bfloat16, with at most 64 MiB of host buffers (`host_memory`). A probe
(`position > 10`), a lens, statistics, a pass of the loader and a replay with an ablation then use that archive. All
but the capture may take 512 MiB where they take a limit.

Each runs in a process of its own, with one thread. The table shows what it added at its peak to the memory that the
process had with the model and the open archive, libraries that it loads included: memory that it allocated
(`RssAnon`), and pages of files that it mapped (`RssFile`), which the system takes back when it needs them. Both are
read every five milliseconds.
"""

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from measure import machine, parser, publish, table

HOST_MEMORY = 64 * 2**20
MEMORY = "512MiB"
MODEL = Path(__file__).parent.parent / "models" / "pydoc-1m"
SITES = "resid_post.*"


def texts(times: int) -> Iterator[str]:
    """Yield the topics `times` times, each time with another first word."""
    for turn in range(times):
        for title, text in sorted(topics.items()):
            yield f"{turn} {title}\n{text}"


def resident() -> tuple[int, int]:
    """Return the bytes of this process that it allocated, and those of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
    return found["RssAnon"], found["RssFile"]


def measured(job: Callable[[], object]) -> dict[str, int]:
    """Run a job; return what it added at its peak, allocated and mapped."""
    before, ended = resident(), threading.Event()
    peaks = list(before)

    def watch() -> None:
        while not ended.wait(0.005):
            peaks[:] = map(max, peaks, resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        job()
    finally:
        ended.set()
        thread.join()
    return {"allocated": peaks[0] - before[0], "mapped": peaks[1] - before[1]}


def loaded() -> Any:
    """Return the shipped model, after a first run, which makes room that stays."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL)
    model.train(False)
    with torch.inference_mode():
        model(torch.zeros(64, 128, dtype=torch.long))
    return model


def capture(folder: Path, times: int) -> dict[str, int]:
    """Capture the dataset."""
    from transformers import AutoTokenizer

    import residua

    model, tokenizer = loaded(), AutoTokenizer.from_pretrained(MODEL)
    options: Any = {"sites": SITES, "dtype": "bfloat16", "max_length": 128, "host_memory": HOST_MEMORY}
    out = folder / f"{times}.zarr"
    found = measured(lambda: residua.capture_dataset(model, texts(times), tokenizer=tokenizer, out=out, **options))
    return {**found, "rows": residua.open(out).n_rows}


def probe(folder: Path, times: int) -> dict[str, int]:
    """Probe one site."""
    import residua

    archive = residua.open(folder / f"{times}.zarr")
    with residua.analysis.connect("inline", memory_limit=MEMORY) as cluster:
        return measured(lambda: residua.probe(archive, "position > 10", "resid_post.2", cluster=cluster))


def lens(folder: Path, times: int) -> dict[str, int]:
    """Train a lens of one layer on all rows, by its closed form."""
    import residua

    archive = residua.open(folder / f"{times}.zarr")
    with residua.analysis.connect("inline", memory_limit=MEMORY) as cluster:
        return measured(lambda: residua.TunedLens.fit(archive, sites="resid_post.2", cluster=cluster, refine=False))


def stats(folder: Path, times: int) -> dict[str, int]:
    """Take the statistics of one site."""
    import residua

    archive = residua.open(folder / f"{times}.zarr")
    with residua.analysis.connect("inline", memory_limit=MEMORY) as cluster:
        return measured(lambda: residua.stats(archive, "resid_post.2", cluster=cluster))


def loader(folder: Path, times: int) -> dict[str, int]:
    """Read every row of one site once, shuffled."""
    import residua

    archive = residua.open(folder / f"{times}.zarr")
    batches = archive.loader("resid_post.2", batch_size=1024, seed=0)
    return measured(lambda: sum(1 for _ in batches))


def replay(folder: Path, times: int) -> dict[str, int]:
    """Run all examples again with one block's rows set to zero."""
    import residua

    model, archive = loaded(), residua.open(folder / f"{times}.zarr")
    edits = [{"site": "resid_post.2", "edit": "zero"}]
    out = folder / f"{times}-replay"
    return measured(lambda: residua.replay_dataset(model, archive, edits=edits, out=out, force=True))


WORK: dict[str, Callable[[Path, int], dict[str, int]]] = {
    work.__name__: work for work in (capture, probe, lens, stats, loader, replay)
}


def main() -> None:
    """Measure and report."""
    options = parser(__doc__ or "", rounds=1)
    options.add_argument("--times", type=int, nargs="+", default=[1, 8], help="sizes of the dataset (default: 1 8)")
    options.add_argument("--work", choices=WORK, help="do this, in this process, for the first of --times")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    if arguments.work:
        print(json.dumps(WORK[arguments.work](arguments.folder, arguments.times[0])))
        return
    found: dict[str, list[dict[str, int]]] = {name: [] for name in WORK}
    with tempfile.TemporaryDirectory(prefix="residua-memory-", dir=arguments.folder) as folder:
        for times in arguments.times:
            for name in WORK:
                command = [sys.executable, __file__, "--work", name, "--times", str(times), "--folder", folder]
                shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found[name].append(json.loads(shown.stdout.splitlines()[-1]))
    head = ["added at the peak, MiB", *(f"{run['rows']:,} rows" for run in found["capture"]), "mapped, of the last"]
    lines = [
        [name, *(f"{run['allocated'] / 2**20:,.0f}" for run in runs), f"{runs[-1]['mapped'] / 2**20:,.0f}"]
        for name, runs in found.items()
    ]
    publish("\n".join([machine("torch", "transformers", "pyarrow"), "", table(head, lines)]), arguments.out)


if __name__ == "__main__":
    main()

"""What it costs to open a sealed archive of many shards: with its packed index, and from its commit records.

The archive is made up: metadata, records and index of 36 arrays, and no shard. Opening reads none, so its cost is that
of a real archive. `python benchmarks/opening.py [--shards 500 4000 32000 244000]`; archives of more shards than
`--most-records` are opened with the index alone. Time is the best of three for the index, and of one for the records;
memory is what the process that opens the archive added to what it had.
"""

import base64
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
from measure import machine, parser, publish, table

from residua.store.base.canonical import canonical_json, digest_of
from residua.store.encoding.shard import shard_bytes, shard_digest, shard_rows
from residua.store.examples.index import Example
from residua.store.examples.writer import ExampleWriter
from residua.store.format.archive_metadata import read_metadata
from residua.store.format.commits import FOLDER, record_name
from residua.store.format.create import create_archive, workspace
from residua.store.format.plan import Plan, SitePlan
from residua.store.sealing.packed_index import INDEX
from residua.store.sealing.seal import seal

N_SITES = 33

READ = """
import json, sys, time
import residua
from residua.store.read.summary import Archive
from residua.store.format.commits import check_commits, read_commits
path, way = sys.argv[1:]
def resident():
    return int(open("/proc/self/statm").read().split()[1]) / 256
before = resident()
wall, cpu = time.perf_counter(), time.process_time()
archive = Archive(path)
if way == "records":
    commits = read_commits(archive.path, archive.plan.digest)
    check_commits(archive.path, archive.plan, commits, archive.n_rows)
else:
    commits = archive.commits
    assert archive.is_sealed
n = len(commits)
took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
print(json.dumps({**took, "mib": resident() - before, "shards": n}))
"""


def make(path: Path, n_shards: int, height: int) -> None:
    """Write metadata and records of an archive of `n_shards` shards of 36 arrays and `height` rows, and seal it."""
    sites = [SitePlan(name=f"resid_post.{i}", row_shape=(4096,), dtype="bfloat16", codec="raw") for i in range(N_SITES)]
    n_rows = n_shards * height
    with workspace(path) as folder:
        writer = ExampleWriter(folder / "examples")
        ids = np.zeros(height, np.int32)
        writer.add(Example(input_ids=ids, positions=np.arange(height, dtype=np.int32)))
        writer.close()
        plan = Plan(model={}, dataset={}, rules={}, sites=tuple(sites), rows_per_shard=height, n_rows=n_rows)
        create_archive(folder, path, plan, {})
    arrays = {}
    for spec in plan.arrays:
        n_chunks = -(-shard_rows(spec, n_rows, 0) // spec.rows_per_chunk)
        table = np.full((n_chunks, 2), spec.chunk_bytes + 4, "<u4")
        arrays[spec.key] = {
            "n_bytes": shard_bytes(table, spec),
            "digest": shard_digest(table, spec),
            "chunks": base64.b64encode(table.tobytes()).decode(),
        }
    for shard in range(n_shards):
        rows = [shard * height, (shard + 1) * height]
        record = {"plan": plan.digest, "shard": shard, "rows": rows, "arrays": arrays}
        text = canonical_json({"record": record, "sha256": digest_of(record)})
        (path / FOLDER / record_name(shard)).write_bytes(text)
    with patch("residua.store.sealing.seal._check_file", lambda *_: None):  # there are no shards
        seal(path, read_metadata(path))


def measure(path: Path, way: str) -> dict[str, float]:
    """Open the archive in a process of its own, and return seconds, CPU seconds and MiB that it took."""
    words = [sys.executable, "-c", READ, str(path), way]
    shown = subprocess.run(words, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(shown.stdout)
    return found


def main() -> None:
    """Make the archives, open each both ways, and report."""
    options = parser(__doc__ or "", rounds=3)
    options.add_argument("--shards", type=int, nargs="+", default=[500, 4_000, 32_000, 244_000])
    options.add_argument("--height", type=int, default=512, help="rows of a shard (default: one chunk of 4 MiB)")
    options.add_argument("--most-records", type=int, default=32_000, help="open larger archives with the index alone")
    arguments = options.parse_args()
    lines = []
    for n_shards in arguments.shards:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            path = Path(folder) / "a.zarr"
            make(path, n_shards, arguments.height)
            size = (path / INDEX).stat().st_size / n_shards
            for way in ("index", "records") if n_shards <= arguments.most_records else ("index",):
                rounds = arguments.rounds if way == "index" else 1
                found = min((measure(path, way) for _ in range(rounds)), key=lambda x: x["cpu"])
                numbers = (1000 * found["wall"], 1000 * found["cpu"], found["mib"])
                lines.append([f"{n_shards:,}", way, *(f"{number:,.1f}" for number in numbers), f"{size:,.0f}"])
                print(lines[-1], file=sys.stderr, flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    head = ["shards of 36 arrays", "from", "ms", "CPU ms", "MiB", "index, bytes a shard"]
    report = [
        machine("numpy"),
        "",
        table(head, lines),
        "",
        f"- Most memory of what made and sealed them: {peak:,.0f} MiB.",
    ]
    publish("\n".join(report), arguments.out)


if __name__ == "__main__":
    main()

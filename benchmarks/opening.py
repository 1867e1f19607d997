"""What it costs to open a sealed archive of many shards: with its packed index, and from its commit records.

The archive is made up: metadata, records and index of 36 arrays, and no shard. Opening reads none, so its cost is that
of a real archive.

    python benchmarks/opening.py                    # 500, 4,000 and 32,000 shards; about three minutes
    python benchmarks/opening.py --shards 244000 --height 512 --packed-only
"""

import argparse
import base64
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np

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
    with patch("residua.store.sealing.seal._check_file"):  # there are no shards
        seal(path, read_metadata(path))


def measure(path: Path, way: str) -> dict[str, float]:
    """Open the archive in a process of its own, and return seconds, CPU seconds and MiB that it took."""
    words = [sys.executable, "-c", READ, str(path), way]
    shown = subprocess.run(words, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(shown.stdout)
    return found


def main() -> None:
    """Make the archives, open each both ways, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[500, 4000, 32000])
    parser.add_argument("--height", type=int, default=4096, help="rows of a shard (default: 32 MiB of a site)")
    parser.add_argument("--packed-only", action="store_true", help="do not read the records")
    parser.add_argument("--folder", type=Path, help="place of the archives (default: a temporary folder)")
    options = parser.parse_args()
    print("| shards | way | ms | CPU ms | MiB | index, bytes a shard |")
    print("| --- | --- | --- | --- | --- | --- |")
    for n_shards in options.shards:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            path = Path(folder) / "a.zarr"
            make(path, n_shards, options.height)
            size = (path / INDEX).stat().st_size / n_shards
            for way in ("index",) if options.packed_only else ("index", "records"):
                found = min((measure(path, way) for _ in range(3 if way == "index" else 1)), key=lambda x: x["cpu"])
                numbers = (1000 * found["wall"], 1000 * found["cpu"], found["mib"])
                print(f"| {n_shards:,} | {way} |", *(f"{number:,.1f} |" for number in numbers), f"{size:,.0f} |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak of the process that made and sealed them: {peak:,.0f} MiB")


if __name__ == "__main__":
    main()

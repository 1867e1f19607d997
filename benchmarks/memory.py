"""Peak memory of a capture, for a dataset and for one eight times as large: `python benchmarks/memory.py`.

Each capture runs in its own process: the shipped model over Python's own documentation, every `resid_post` in
bfloat16, with at most 64 MiB of host buffers (`host_memory`). The table shows the peak resident memory of the process,
and how much the capture added after model and libraries were loaded.
"""

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from measure import machine, parser, publish, table

HOST_MEMORY = 64 * 2**20
TIMES = (1, 2, 4, 8)
MODEL = Path(__file__).parent.parent / "models" / "pydoc-1m"


def texts(times: int) -> Iterator[str]:
    """Yield the topics `times` times, each time with another first word."""
    for turn in range(times):
        for title, text in sorted(topics.items()):
            yield f"{turn} {title}\n{text}"


def peak_bytes() -> int:
    """Return the peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def capture(times: int, out: str) -> None:
    """Capture in this process, and print rows and memory as JSON."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import residua

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    model.train(False)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    with torch.inference_mode():
        model(torch.zeros(64, 128, dtype=torch.long))
    before = peak_bytes()
    result = residua.capture_dataset(
        model,
        texts(times),
        tokenizer=tokenizer,
        out=out,
        sites="resid_post.*",
        dtype="bfloat16",
        max_length=128,
        host_memory=HOST_MEMORY,
    )
    rows = result.archive.n_rows
    buffers = 2 * result.archive.plan.rows_per_shard * sum(site.row_bytes for site in result.archive.plan.sites)
    print(json.dumps({"rows": rows, "before": before, "peak": peak_bytes(), "buffers": buffers}))


def main() -> None:
    """Measure and report."""
    options = parser(__doc__ or "", rounds=1)
    options.add_argument("--capture", type=int, metavar="TIMES", help="capture once, in this process")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="residua-memory-", dir=arguments.folder) as folder:
        if arguments.capture:
            capture(arguments.capture, f"{folder}/a.zarr")
            return
        found = []
        for times in TIMES:
            command = [sys.executable, __file__, "--capture", str(times), "--folder", folder]
            shown = subprocess.run(command, check=True, capture_output=True, text=True)
            found.append(json.loads(shown.stdout.splitlines()[-1]))
    mib = 2.0**20
    lines = [
        [
            f"{times}x",
            f"{run['rows']:,}",
            f"{run['rows'] * 6 * 256 / mib:,.0f}",
            f"{run['buffers'] / mib:,.0f}",
            f"{run['before'] / mib:,.0f}",
            f"{run['peak'] / mib:,.0f}",
            f"{(run['peak'] - run['before']) / mib:,.0f}",
        ]
        for times, run in zip(TIMES, found, strict=True)
    ]
    head = [
        "dataset",
        "rows",
        "values, MiB",
        "host buffers, MiB",
        "peak before, MiB",
        "peak, MiB",
        "capture added, MiB",
    ]
    growth = np.array([run["peak"] for run in found])
    text = "\n".join(
        [
            machine("torch", "transformers", "pyarrow"),
            "",
            table(head, lines),
            "",
            f"- Eight times the dataset takes {growth[-1] / growth[0]:.2f} times the peak memory; "
            f"the bound on host buffers was {HOST_MEMORY / mib:.0f} MiB.",
        ]
    )
    publish(text, arguments.out)


if __name__ == "__main__":
    main()

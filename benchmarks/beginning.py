"""How long a capture takes to begin: `python benchmarks/beginning.py [--tokens 12500000 100000000]`.

Two datasets in Parquet files: token ids, lists of 1,024, and texts of 8,000 characters, which are the source of the
Python library, as often as it takes. The shipped model, which is loaded before, captures the last position of
examples of 256 tokens, with `grow` and without. The table shows seconds on the clock from the call of
`residua.capture_dataset` until the plan is there and the model begins, and until the first batch is done, where the
run is ended; and the processor time of all threads until then. All cores tokenize.

Then `residua.replay_dataset` over a million rows (`--rows`), with an edit of most of them: seconds until the first
batch is done, if a condition selects them, and if they are listed.
"""

import os
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measure import machine, parser, publish, table
from transformers import AutoModelForCausalLM, AutoTokenizer

import residua

SHIPPED = Path(__file__).parent.parent / "models" / "pydoc-1m"
ROW_TOKENS, TEXT_CHARACTERS, TEXTS = 1_024, 8_000, 500


class _Begun(Exception):  # noqa: N818  # no error: the first batch is done
    pass


def ids(path: Path, n_tokens: int) -> None:
    """Write lists of token ids."""
    rng = np.random.default_rng(0)
    schema = pa.schema([("input_ids", pa.list_(pa.int32()))])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, n_tokens, ROW_TOKENS * 1_024):
            n_rows = -(-min(ROW_TOKENS * 1_024, n_tokens - first) // ROW_TOKENS)
            values = rng.integers(3, 1_000, n_rows * ROW_TOKENS, np.int32)
            bounds = np.arange(n_rows + 1, dtype=np.int32) * ROW_TOKENS
            writer.write_table(pa.table([pa.ListArray.from_arrays(bounds, values)], schema=schema))


def sources() -> Iterator[str]:
    """Yield the source of Python's standard library, cut into texts."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(errors="replace")
        yield from (text[at : at + TEXT_CHARACTERS] for at in range(0, len(text), TEXT_CHARACTERS))


def texts(path: Path, n_tokens: int) -> None:
    """Write texts that have about `n_tokens` tokens."""
    found = list(sources())
    tokenizer: Any = AutoTokenizer.from_pretrained(SHIPPED)
    each = sum(map(len, tokenizer(found[::20], verbose=False)["input_ids"])) / len(found[::20])
    rest, schema = cycle(found), pa.schema([("text", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, round(n_tokens / each), TEXTS):
            here = list(islice(rest, min(TEXTS, round(n_tokens / each) - first)))
            writer.write_table(pa.table([here], schema=schema))


def begin(model: Any, tokenizer: Any, dataset: Path, out: Path, *, grow: bool) -> tuple[float, float, float]:
    """Begin a capture; return the seconds to its plan and to its first batch, and its processor seconds."""
    started, cpu, planned = time.perf_counter(), time.process_time(), 0.0

    def plan(*_: object) -> None:
        nonlocal planned
        planned = time.perf_counter() - started

    def stop(stats: Any) -> None:
        if stats.rows:
            raise _Begun

    options: dict[str, Any] = {"positions": "last", "max_length": 256, "long_examples": "split", "grow": grow}
    try:
        residua.capture_dataset(
            model, str(dataset), out=out, tokenizer=tokenizer, on_plan=plan, on_batch=stop, **options
        )
    except _Begun:
        return planned, time.perf_counter() - started, time.process_time() - cpu
    raise RuntimeError("the capture ended before its first batch")


def replays(model: Any, folder: Path, n_rows: int) -> str:
    """Begin replays of an archive with edits of many rows; return the table."""
    tokens = np.random.default_rng(0).integers(3, 1_000, (n_rows // 128, 128)).tolist()
    archive = residua.capture_dataset(model, tokens, sites="resid_post.0", out=folder / "rows.zarr").archive
    chosen = np.random.default_rng(1).permutation(archive.n_rows)[: archive.n_rows * 9 // 10]
    selections: dict[str, dict[str, Any]] = {
        "position > 5": {"where": "position > 5"},
        f"a list of {len(chosen):,}": {"rows": chosen.tolist()},
    }
    lines = []
    for number, (name, selection) in enumerate(selections.items()):
        started, cpu = time.perf_counter(), time.process_time()
        edits = [{"site": "resid_post.0", "edit": "zero", **selection}]
        try:
            residua.replay_dataset(model, archive, out=folder / f"replay-{number}", edits=edits, on_example=stop_replay)
        except _Begun:
            figures = time.perf_counter() - started, time.process_time() - cpu
            lines.append([name, *(f"{one:.1f}" for one in figures)])
    return table([f"rows of {archive.n_rows:,}", "first batch done, s", "CPU s"], lines)


def stop_replay(*_: int) -> None:
    """End a replay."""
    raise _Begun


def main() -> None:
    """Measure and report."""
    options = parser(__doc__ or "", rounds=1)
    options.add_argument("--tokens", type=int, nargs="+", default=[12_500_000, 100_000_000], help="sizes")
    options.add_argument("--most-texts", type=int, default=100_000_000, help="more tokens of texts: with grow alone")
    options.add_argument("--rows", type=int, default=1_000_000, help="rows of the replayed archive")
    arguments = options.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(SHIPPED), AutoTokenizer.from_pretrained(SHIPPED)
    lines = []
    folder = Path(tempfile.mkdtemp(prefix="residua-beginning-", dir=arguments.folder))
    try:
        for kind, make in (("token ids", ids), ("texts", texts)):
            for n_tokens in arguments.tokens:
                path = folder / f"{kind.split()[-1]}.parquet"
                make(path, n_tokens)
                for way in ("grow", "whole") if kind == "token ids" or n_tokens <= arguments.most_texts else ("grow",):
                    out = folder / "out.zarr"
                    figures = begin(model, tokenizer, path, out, grow=way == "grow")
                    shutil.rmtree(out, ignore_errors=True)
                    size = f"{path.stat().st_size / 2**20:,.0f}"
                    lines.append([f"{kind}, {n_tokens:,}", size, way, *(f"{one:.1f}" for one in figures)])
                    print(lines[-1], file=sys.stderr, flush=True)
                path.unlink()
        replayed = replays(model, folder, arguments.rows)
    finally:
        shutil.rmtree(folder)
    head = ["tokens", "MiB", "plan", "model begins, s", "first batch done, s", "CPU s"]
    publish(
        "\n".join([machine("transformers", "tokenizers", "pyarrow"), "", table(head, lines), "", replayed]),
        arguments.out,
    )


if __name__ == "__main__":
    main()
